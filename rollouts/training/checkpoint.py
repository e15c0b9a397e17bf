"""Checkpoints on disk: `<checkpoint_dir>/step_000123/` in Hugging Face layout, with all that an exact resume needs.

    model.safetensors, config.json, generation_config.json, tokenizer files: what an engine loads as it stands
    training_state.pt     optimizer, RNG states, counters, and the caller's `extra` (plain data: a data cursor)
    adapter/              with LoRA: the adapter in peft's layout and base.json; the weights above are merged
    metadata.json         {"stage", "step", "time", "metrics", "world_size", "versions"}
    manifest.json         every file with size and SHA-256, written last

Written to `.tmp-…`, synced to disk, renamed; `latest` is a relative symlink, replaced atomically after that. A reader
sees a whole checkpoint or none. One process writes a `checkpoint_dir` at a time.
"""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import nn

from rollouts.manifest import MANIFEST_FILE, manifest_problems, write_manifest
from rollouts.training import lora

METADATA_FILE = "metadata.json"
TRAINING_STATE_FILE = "training_state.pt"
LATEST_LINK = "latest"
_STEP_NAME = re.compile(r"step_(\d{6,})")


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message names the path, what is wrong and the fix."""


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
    step: int,
    *,
    model: nn.Module,
    tokenizer: Any | None,
    training_state: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> Path:
    """Write `step_<step>` under `checkpoint_dir`, replacing one of that name, and point `latest` at it."""
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    _recover(checkpoint_dir)
    final = checkpoint_dir / step_name(step)
    temporary = checkpoint_dir / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir()
    write_model(model, temporary)
    if lora.is_lora(model):
        lora.write_adapter(model, temporary / lora.ADAPTER_DIR)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    torch.save(dict(training_state), temporary / TRAINING_STATE_FILE)
    record = {"stage": checkpoint_dir.name, "step": step, "time": time.time(), **metadata, "versions": _versions()}
    (temporary / METADATA_FILE).write_text(json.dumps(record, indent=1) + "\n")
    write_manifest(temporary)
    _sync_tree(temporary)
    _put_in_place(temporary, final)
    _point_latest(checkpoint_dir, final.name)
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
    """What `write_checkpoint` was given as `training_state`; tensors on the CPU. Only plain data is unpickled."""
    return torch.load(path / TRAINING_STATE_FILE, map_location="cpu", weights_only=True)


def write_model(model: nn.Module, directory: Path) -> None:
    """Weights (safetensors; tied ones once; LoRA merged), config.json, generation_config.json into `directory`."""
    state = lora.merged_state_dict(model) if lora.is_lora(model) else None
    with _no_progress_bar():
        model.save_pretrained(directory, state_dict=state)  # type: ignore[operator]


def write_weights(model: nn.Module, path: Path) -> Path:
    """What an engine needs to load new weights, at `path`, complete when it appears there; not synced to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    write_model(model, temporary)
    _put_in_place(temporary, path)
    return path


@torch.no_grad()
def read_model(model: nn.Module, path: Path) -> None:
    """Load the safetensors under `path` into `model`, in place, keeping its dtypes and ties.

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
        for key, tensor in safetensors.torch.load_file(path / name).items():
            target = parameters.get(key)
            if target is None or target.shape != tensor.shape:
                expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
                raise CheckpointError(f"{path / name}: {key} {tuple(tensor.shape)}, this model has {expected}")
            target.copy_(tensor)
            filled.add(target.data_ptr())
    missing = [key for key, target in parameters.items() if target.data_ptr() not in filled]  # tied ones share memory
    if missing:
        raise CheckpointError(f"{path}: no tensor for {', '.join(missing)}: saved from another architecture?")


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


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a directory already at `final` is set aside first and removed after: one of them always exists."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
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
