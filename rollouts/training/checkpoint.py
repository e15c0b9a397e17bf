"""Checkpoints on disk: `<checkpoint_dir>/step_000123/` in Hugging Face layout, with all that an exact resume needs.

    model.safetensors, config.json, generation_config.json, tokenizer files: what an engine loads as it stands
    optimizer/            the optimizer's tensors by parameter name, sharded (torch.distributed.checkpoint)
    training_state.pt     RNG states by rank, counters, and the caller's `extra` (plain data: a data cursor)
    adapter/              with LoRA: the adapter in peft's layout and base.json; the weights above are merged
    metadata.json         {"stage", "step", "time", "metrics", "world_size", "versions"}
    manifest.json         every file with size and SHA-256, written last

Written to `.tmp-…`, synced to disk, renamed; `latest` is a relative symlink, replaced atomically after that. A reader
sees a whole checkpoint or none. One run writes a `checkpoint_dir` at a time. It lies on rank 0's host, where shards are
brought that ranks of other hosts wrote. Weights are gathered, the optimizer's state is not: nothing but its own shards
of that passes through a rank's memory, and on rank 0 pieces of what comes from other hosts.
"""

import json
import os
import pickle
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from rollouts.manifest import MANIFEST_FILE, manifest_problems, write_manifest
from rollouts.training import distributed, host_files, lora, optimizer_state
from rollouts.training.metrics import json_text
from rollouts.training.model_files import write_model
from rollouts.training.optimizer_state import CheckpointError
from rollouts.training.retention import Retention, remove_expired
from rollouts.training.seams import Tokenizer
from rollouts.training.whole_directories import begin, put_in_place, sync, sync_tree

__all__ = [
    "CheckpointError",
    "Retention",
    "Snapshot",
    "list_checkpoints",
    "read_metadata",
    "write_checkpoint",
]
METADATA_FILE = "metadata.json"
TRAINING_STATE_FILE = "training_state.pt"
OPTIMIZER_DIRECTORY = "optimizer"
LATEST_LINK = "latest"
_STEP_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Snapshot:
    """A training state that later steps do not change, ready to be written while they run."""

    step: int
    weights: Mapping[str, Tensor]  # whole, on the CPU; on rank 0 alone, empty elsewhere
    # likewise, of a model with LoRA, whose weights are merged ones; else empty
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]  # this rank's part: `optimizer_state.Staging`
    training_state: Mapping[str, Any]  # plain data and tensors
    metadata: Mapping[str, Any]


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def list_checkpoints(checkpoint_dir: Path) -> list[Path]:
    """Return the completed checkpoints (those with a manifest) in the order of their step *numbers*."""
    if not checkpoint_dir.is_dir():
        return []
    found = [
        (match, path)
        for path in checkpoint_dir.iterdir()
        if (match := _STEP_NAME.fullmatch(path.name))
    ]
    complete = [(int(match[1]), path) for match, path in found if (path / MANIFEST_FILE).is_file()]
    return [path for _, path in sorted(complete)]


def latest_checkpoint(checkpoint_dir: Path) -> Path | None:
    """Return the completed checkpoint with the highest step, or None."""
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
    temporary = checkpoint_dir / distributed.on_rank_0(lambda: begin(final).name, group)
    optimizer_state.write(snapshot.optimizer, temporary / OPTIMIZER_DIRECTORY, group)
    host_files.collect(
        temporary / OPTIMIZER_DIRECTORY,
        lambda: optimizer_state.absent_files(temporary / OPTIMIZER_DIRECTORY),
        group,
    )

    def finish() -> None:
        optimizer_state.check_complete(temporary / OPTIMIZER_DIRECTORY)
        write_model(model, temporary, snapshot.weights, tokenizer)
        if lora.is_lora(model):
            lora.write_adapter(model, temporary / lora.ADAPTER_DIR, snapshot.adapter)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        torch.save(dict(snapshot.training_state), temporary / TRAINING_STATE_FILE)
        record = {
            "stage": checkpoint_dir.name,
            "step": snapshot.step,
            "time": time.time(),
            **snapshot.metadata,
        }
        record |= {"versions": _versions()}
        (temporary / METADATA_FILE).write_text(json_text(record, indent=1) + "\n")
        write_manifest(temporary)
        sync_tree(temporary)
        put_in_place(temporary, final)
        _point_latest(checkpoint_dir, final.name)
        saved = [
            (path, json.loads((path / METADATA_FILE).read_text()))
            for path in list_checkpoints(checkpoint_dir)
        ]
        metrics = [(path, record["metrics"]) for path, record in saved]
        remove_expired(metrics, checkpoint_dir / LATEST_LINK, retention, protected)

    distributed.on_rank_0(finish, group)
    return final


def read_metadata(path: Path) -> dict[str, Any]:
    """Return a checkpoint's `metadata.json`, after every file was found to be what the manifest says.

    Raises CheckpointError for a path that is no checkpoint, one never completed, or one that was changed or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    problems = manifest_problems(path)
    if problems:
        raise CheckpointError(
            "\n".join([*problems, f"{path} cannot be used: choose another step, or copy it again"])
        )
    return json.loads((path / METADATA_FILE).read_text())


def read_training_state(path: Path) -> dict[str, Any]:
    """Return what `write_checkpoint` was given as `training_state`; tensors on the CPU.

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


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _point_latest(checkpoint_dir: Path, name: str) -> None:
    temporary = checkpoint_dir / f".tmp-{LATEST_LINK}-{os.getpid()}"
    temporary.symlink_to(name)
    temporary.replace(checkpoint_dir / LATEST_LINK)
    sync(checkpoint_dir)
