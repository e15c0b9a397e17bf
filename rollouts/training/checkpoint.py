"""Checkpoints on disk: `<checkpoint_dir>/step_000123/` in Hugging Face layout, with all that an exact resume needs.

    model.safetensors, config.json, generation_config.json, tokenizer files: what an engine loads as it stands
    optimizer/            the optimizer's tensors by parameter name, sharded (torch.distributed.checkpoint)
    training_state.pt     RNG states by rank, counters, and the caller's `extra` (plain data: a data cursor)
    adapter/              with LoRA: the adapter in peft's layout and base.json; the weights above are merged
    metadata.json         {"stage", "step", "time", "metrics", "world_size", "versions"}
    manifest.json         every file with size and SHA-256, written last

Written to `.tmp-…`, synced to disk, renamed; `latest` is a relative symlink, replaced atomically after that. A reader
sees a whole checkpoint or none. One run writes a `checkpoint_dir` at a time; on several nodes all of them see it.
Weights are gathered, the optimizer's state is not: nothing but its own shards of that passes through a rank's memory.
"""

import copy
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rollouts.manifest import MANIFEST_FILE, manifest_problems, write_manifest
from rollouts.training import distributed, lora, optimizer_state
from rollouts.training.datasets.turn_end import end_of_turn_ids, own_generation_config
from rollouts.training.metrics import json_text
from rollouts.training.optimizer_state import CheckpointError
from rollouts.training.seams import Tokenizer

__all__ = ["CheckpointError", "Retention", "Snapshot", "list_checkpoints", "read_metadata", "write_checkpoint"]
METADATA_FILE = "metadata.json"
TRAINING_STATE_FILE = "training_state.pt"
OPTIMIZER_DIRECTORY = "optimizer"
LATEST_LINK = "latest"
_STEP_NAME = re.compile(r"step_(\d{6,})")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A training state that later steps do not change, ready to be written while they run."""

    step: int
    weights: Mapping[str, Tensor]  # whole, on the CPU; on rank 0 alone, empty elsewhere
    adapter: Mapping[str, Tensor]  # likewise, of a model with LoRA, whose weights are merged ones; else empty
    optimizer: Mapping[str, Tensor]  # this rank's part: `optimizer_state.Staging`
    training_state: Mapping[str, Any]  # plain data and tensors
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `keep_last` (-1: all), and the best by a metric that they were saved with.

    `latest` and what a run resumed from always stay. `on_remove(path)` is called on rank 0 before one goes.
    """

    keep_last: int = -1
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    on_remove: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        if self.keep_last != -1 and self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last}: needs >= 1, or -1 to keep all")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"best_mode={self.best_mode!r}: needs 'min' or 'max'")


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def list_checkpoints(checkpoint_dir: Path) -> list[Path]:
    """The completed checkpoints (those with a manifest) in the order of their step *numbers*."""
    if not checkpoint_dir.is_dir():
        return []
    found = [(match, path) for path in checkpoint_dir.iterdir() if (match := _STEP_NAME.fullmatch(path.name))]
    complete = [(int(match[1]), path) for match, path in found if (path / MANIFEST_FILE).is_file()]
    return [path for _, path in sorted(complete)]


def latest_checkpoint(checkpoint_dir: Path) -> Path | None:
    """The completed checkpoint with the highest step, or None."""
    return next(reversed(list_checkpoints(checkpoint_dir)), None)


def write_checkpoint(
    checkpoint_dir: Path,
    snapshot: Snapshot,
    *,
    model: nn.Module,
    tokenizer: Tokenizer | None,
    retention: Retention,
    protected: Collection[Path] = (),
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `step_<step>`, replacing one of that name, point `latest` at it, then remove what `retention` lets go.

    Every rank of `group` calls it (None: a world of one), each with its own part of the snapshot, and returns once it
    is complete. Of `model` only the config is read. `protected` directories are never removed.
    """
    final = checkpoint_dir / step_name(snapshot.step)
    temporary = distributed.on_rank_0(lambda: _begin(final), group)
    optimizer_state.write(snapshot.optimizer, temporary / OPTIMIZER_DIRECTORY, group)

    def finish() -> None:
        optimizer_state.check_complete(temporary / OPTIMIZER_DIRECTORY)
        write_model(model, temporary, snapshot.weights, tokenizer)
        if lora.is_lora(model):
            lora.write_adapter(model, temporary / lora.ADAPTER_DIR, snapshot.adapter)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        torch.save(dict(snapshot.training_state), temporary / TRAINING_STATE_FILE)
        record = {"stage": checkpoint_dir.name, "step": snapshot.step, "time": time.time(), **snapshot.metadata}
        record |= {"versions": _versions()}
        (temporary / METADATA_FILE).write_text(json_text(record, indent=1) + "\n")
        write_manifest(temporary)
        _sync_tree(temporary)
        _put_in_place(temporary, final)
        _point_latest(checkpoint_dir, final.name)
        _remove_expired(checkpoint_dir, retention, protected)

    distributed.on_rank_0(finish, group)
    return final


def read_metadata(path: Path) -> dict[str, Any]:
    """A checkpoint's `metadata.json`, after every file was found to be what the manifest says.

    Raises CheckpointError for a path that is no checkpoint, one never completed, or one that was changed or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    problems = manifest_problems(path)
    if problems:
        raise CheckpointError("\n".join([*problems, f"{path} cannot be used: choose another step, or copy it again"]))
    return json.loads((path / METADATA_FILE).read_text())


def read_training_state(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given as `training_state`; tensors on the CPU.

    Only plain data is unpickled. Raises CheckpointError for a file that holds anything else.
    """
    try:
        state = torch.load(path / TRAINING_STATE_FILE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path / TRAINING_STATE_FILE}: is not plain data, so it is not read: {reason}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path / TRAINING_STATE_FILE}: holds {type(state).__name__}, needs a dict: was it edited?"
        )
    return state


def write_model(
    model: nn.Module, directory: Path, weights: Mapping[str, Tensor], tokenizer: Tokenizer | None = None
) -> None:
    """`weights` (safetensors; tied ones once), config.json and generation_config.json into `directory`.

    With a tokenizer, the generation config names every token that ends a turn, so that engines which load the directory
    stop where the chat template ends a turn, and not at the tokenizer's eos_token alone.
    """
    with _no_progress_bar():
        model.save_pretrained(directory, state_dict=dict(weights))  # type: ignore[operator]
    _name_dtype(directory / "config.json", weights)
    generation = copy.deepcopy(
        own_generation_config(model)
    )  # save_pretrained takes what an evaluation put in its place
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
    if len(dtypes) == 1 and config.get("dtype") != (name := str(dtypes.pop()).removeprefix("torch.")):
        config_file.write_text(json.dumps({**config, "dtype": name}, indent=2, sort_keys=True) + "\n")


def write_weights(model: nn.Module, path: Path, weights: Mapping[str, Tensor]) -> Path:
    """What an engine needs to load new weights, at `path`, complete when it appears there; not synced to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    write_model(model, temporary, weights)
    _put_in_place(temporary, path, durable=False)
    return path


@torch.no_grad()
def whole_weights(model: nn.Module, *, copy: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict, LoRA merged, every tensor whole and on the CPU, on rank 0; {} elsewhere. Every rank calls it.

    Sharded tensors are gathered one at a time: on a device there is never more than one whole tensor, in rank 0's host
    memory there are all. Tied ones share memory. `copy`: none is the model's own memory, which the next step changes.
    `dtype`: of floating-point tensors; None: as they are.
    """
    state = lora.merged_state_dict(model) if lora.is_lora(model) else model.state_dict(keep_vars=True)
    return _whole_tensors(state, copy=copy, dtype=dtype)


@torch.no_grad()
def whole_adapter(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A copy of the adapter's tensors, as `whole_weights`; {} for a model without LoRA."""
    return _whole_tensors(lora.adapter_state_dict(model), copy=True, dtype=dtype) if lora.is_lora(model) else {}


def _whole_tensors(tensors: Mapping[str, Tensor], *, copy: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    seen: dict[int, Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:  # gathered once by every rank, or they would wait for each other
            whole = _whole(tensor.detach(), copy=copy)
            seen[id(tensor)] = whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole
        if distributed.rank() == 0:
            found[name] = seen[id(tensor)]
    return found


def _whole(own: Tensor, *, copy: bool) -> Tensor:
    """`own` on rank 0's CPU, gathered where it is sharded; an empty tensor on other ranks."""
    local, whole = (own.to_local(), own.full_tensor()) if isinstance(own, DTensor) else (own, own)
    if distributed.rank() != 0:
        return torch.empty(0)
    if copy and whole.is_cuda:
        return torch.empty_like(whole, device="cpu", pin_memory=True).copy_(
            whole
        )  # torch keeps the memory for the next
    on_cpu = whole.cpu()
    return on_cpu.clone() if copy and on_cpu.data_ptr() == local.data_ptr() else on_cpu


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
    parameters = lora.adapter_state_dict(model) if lora.is_lora(model) else model.state_dict(keep_vars=True)
    filled: set[int] = set()
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{index}: names the file {name!r}, outside of the checkpoint")
        with safetensors.safe_open(path / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                tensor, target = file.get_tensor(key), parameters.get(key)
                if target is None or target.shape != tensor.shape:
                    expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
                    raise CheckpointError(f"{path / name}: {key} {tuple(tensor.shape)}, this model has {expected}")
                _copy_into(target.detach(), tensor)
                filled.add(id(target))
    missing = [key for key, target in parameters.items() if id(target) not in filled]  # tied ones are one object
    if missing:
        raise CheckpointError(f"{path}: no tensor for {', '.join(missing)}: saved from another architecture?")


def _copy_into(target: Tensor, whole: Tensor) -> None:
    """Without communication: each rank takes its shard of what it has read itself."""
    if isinstance(target, DTensor):
        local = target.to_local()
        shard = distribute_tensor(whole.to(local.device), target.device_mesh, target.placements, src_data_rank=None)
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


def rng_state(device: torch.device) -> dict[str, Any]:
    """The global generators of Python, NumPy and torch (and of the CUDA device) as plain data and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def expired(
    found: Sequence[tuple[Path, Mapping[str, Any]]], retention: Retention, protected: Collection[Path]
) -> list[Path]:
    """Which of the checkpoints `found`, (directory, metrics) in the order of their steps, may go. Pure."""
    if retention.keep_last == -1:
        return []
    kept = {path for path, _ in found[-retention.keep_last :]} | set(protected)
    values = [(metrics.get(retention.best_metric or ""), path) for path, metrics in found]
    numbers = [(value, path) for value, path in values if isinstance(value, (int, float)) and math.isfinite(value)]
    if numbers:
        best = (min if retention.best_mode == "min" else max)(value for value, _ in numbers)
        kept.add(next(path for value, path in reversed(numbers) if value == best))  # of equals the last
    return [path for path, _ in found if path not in kept]


def _remove_expired(checkpoint_dir: Path, retention: Retention, protected: Collection[Path]) -> None:
    latest = (checkpoint_dir / LATEST_LINK).resolve()
    found = [(path, json.loads((path / METADATA_FILE).read_text())) for path in list_checkpoints(checkpoint_dir)]
    metrics = {path.resolve(): record["metrics"] for path, record in found}
    if retention.best_metric is not None and retention.best_metric not in metrics[latest]:
        logger.warning(
            "%s was saved without the metric %r, so it cannot be kept as the best; it has: %s",
            *(latest, retention.best_metric, ", ".join(metrics[latest])),
        )
    keep = {latest, *(path.resolve() for path in protected)}
    for path in expired(list(metrics.items()), retention, keep):
        if retention.on_remove is not None:
            retention.on_remove(checkpoint_dir / path.name)
        going = checkpoint_dir / f".tmp-removed-{path.name}"  # never half a checkpoint under its name
        path.rename(going)
        shutil.rmtree(going)


def _begin(final: Path) -> Path:
    """The directory to write to: cleared of what a killed writer left, and made."""
    final.parent.mkdir(parents=True, exist_ok=True)
    _recover(final.parent)
    temporary = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    temporary.mkdir()
    return temporary


def _recover(checkpoint_dir: Path) -> None:
    """Clear what a killed writer left: half-written directories go, one that was being replaced comes back."""
    for path in checkpoint_dir.glob(".tmp-*"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    for path in checkpoint_dir.glob(".old-*"):
        original = checkpoint_dir / path.name.removeprefix(".old-")
        if original.exists():
            shutil.rmtree(path)
        else:
            path.rename(original)


def _put_in_place(temporary: Path, final: Path, *, durable: bool = True) -> None:
    """Rename; a directory already at `final` is set aside first and removed after: one of them always exists.

    `durable`: returns when the disk has the new name, which takes milliseconds of waiting.
    """
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    if durable:
        _sync(final.parent)


def _point_latest(checkpoint_dir: Path, name: str) -> None:
    temporary = checkpoint_dir / f".tmp-{LATEST_LINK}-{os.getpid()}"
    temporary.symlink_to(name)
    temporary.replace(checkpoint_dir / LATEST_LINK)
    _sync(checkpoint_dir)


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
