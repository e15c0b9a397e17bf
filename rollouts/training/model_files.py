"""A model's weights and configs on disk in Hugging Face layout, as engines load them and training resumes."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rollouts.training import lora
from rollouts.training.datasets.turn_end import end_of_turn_ids, own_generation_config
from rollouts.training.optimizer_state import CheckpointError
from rollouts.training.seams import Tokenizer
from rollouts.training.whole_directories import put_in_place


def write_model(
    model: nn.Module,
    directory: Path,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write `weights` (safetensors; tied ones once), config.json and generation_config.json into `directory`.

    With a tokenizer, the generation config names every token that ends a turn, so that engines which load the directory
    stop where the chat template ends a turn, and not at the tokenizer's eos_token alone.
    """
    with _no_progress_bar():
        model.save_pretrained(directory, state_dict=dict(weights))  # type: ignore[operator]
    _name_dtype(directory / "config.json", weights)
    # save_pretrained takes what an evaluation put in its place
    generation = copy.deepcopy(own_generation_config(model))
    if generation is None:
        return
    ends = [] if tokenizer is None else end_of_turn_ids(tokenizer, model)
    if len(ends) > 1 or (ends and generation.eos_token_id is None):
        generation.eos_token_id = ends
        generation._from_model_config = False  # else a loader may take the model config's one again
    generation.save_pretrained(directory)


def _name_dtype(config_file: Path, weights: Mapping[str, Tensor]) -> None:
    """Let the config name the dtype of `weights`. save_pretrained asks the live model, whose pass may be running."""
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    config = json.loads(config_file.read_text())
    if len(dtypes) == 1 and config.get("dtype") != (
        name := str(dtypes.pop()).removeprefix("torch.")
    ):
        config_file.write_text(
            json.dumps({**config, "dtype": name}, indent=2, sort_keys=True) + "\n"
        )


def write_weights(model: nn.Module, path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write what an engine needs to load new weights to `path`, complete when it appears there; not synced to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    write_model(model, temporary, weights)
    put_in_place(temporary, path, durable=False)
    return path


@torch.no_grad()
def read_model(model: nn.Module, path: Path) -> None:
    """Load the safetensors under `path` into `model`, in place, keeping its dtypes, ties and sharding.

    A model with adapters gets those alone: its frozen weights must be the checkpoint's. Raises CheckpointError when
    the weights are not exactly this model's: names or shapes that differ, LoRA and none, another frozen base.
    """
    _check_base(model, path)
    index = path / "model.safetensors.index.json"
    if lora.is_lora(model):
        files = [f"{lora.ADAPTER_DIR}/{lora.ADAPTER_WEIGHTS}"]
    elif index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    parameters = (
        lora.adapter_state_dict(model) if lora.is_lora(model) else model.state_dict(keep_vars=True)
    )
    filled: set[int] = set()
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{index}: names the file {name!r}, outside of the checkpoint")
        with safetensors.safe_open(path / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                tensor, target = file.get_tensor(key), parameters.get(key)
                if target is None or target.shape != tensor.shape:
                    expected = (
                        "no such tensor" if target is None else f"shape {tuple(target.shape)}"
                    )
                    raise CheckpointError(
                        f"{path / name}: {key} {tuple(tensor.shape)}, this model has {expected}"
                    )
                _copy_into(target.detach(), tensor)
                filled.add(id(target))
    # tied ones are one object
    missing = [key for key, target in parameters.items() if id(target) not in filled]
    if missing:
        raise CheckpointError(
            f"{path}: no tensor for {', '.join(missing)}: saved from another architecture?"
        )


def _copy_into(target: Tensor, whole: Tensor) -> None:
    """Without communication: each rank takes its shard of what it has read itself."""
    if isinstance(target, DTensor):
        local = target.to_local()
        shard = distribute_tensor(
            whole.to(local.device), target.device_mesh, target.placements, src_data_rank=None
        )
        local.copy_(shard.to_local())
    else:
        target.copy_(whole)


def _check_base(model: nn.Module, path: Path) -> None:
    """Adapters go on only over the frozen weights that they were trained over; and full training over no adapter."""
    saved, own = lora.read_base(path), lora.base_record(model) if lora.is_lora(model) else None
    fix = "Resume with what the run began with, or start a new run from the checkpoint's (merged) weights."
    if (saved is None) != (own is None):
        words = ("without LoRA", "with LoRA") if saved is None else ("with LoRA", "without")
        raise CheckpointError(f"{path}: was trained {words[0]}, this run is {words[1]}. {fix}")
    if saved is not None and own is not None and saved["sha256"] != own["sha256"]:
        raise CheckpointError(
            f"{path}: its adapter belongs to the weights of {saved['name']} (sha256 {saved['sha256'][:12]}); this run "
            f"has those of {own['name']} (sha256 {own['sha256'][:12]}). {fix}"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
