"""Brings a training state back from a checkpoint: weights, optimizer, value head, counters and random numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollouts.training import checkpoint, distributed, optimizer_state
from rollouts.training.backends.trained import Trained
from rollouts.training.model_files import read_model
from rollouts.training.random_state import restore_rng_state
from rollouts.training.reference import Reference
from rollouts.training.value_head import ValueHead


def resume(trained: Trained, path: Path) -> dict[str, Any]:
    """Load the checkpoint `path` into `trained`. Return its metadata and "extra". Every rank calls it.

    Raises CheckpointError where a file is missing or differs from the manifest, or the model is another.
    """
    trained.placement.at_rest(trained.model)
    metadata = distributed.on_rank_0(lambda: checkpoint.read_metadata(path))
    _check_reference(path, trained.reference, metadata.get("reference"))
    state = checkpoint.read_training_state(path)
    read_model(trained.model, path)
    trained.precision.weights_changed()
    optimizer_directory = path / checkpoint.OPTIMIZER_DIRECTORY
    optimizer_state.restore(
        trained.model, trained.optimizer, optimizer_directory, state["optimizer"]
    )
    trained.optimizer.zero_grad(set_to_none=True)
    _load_value_head(path, trained.value_head, state.get("value_head"))
    trained.step = state["optimizer_steps"]
    own = distributed.rank() if len(state["rng"]) == distributed.world_size() else 0
    restore_rng_state(state["rng"][own], trained.device)
    return {**metadata, "extra": state["extra"]}


def _check_reference(
    path: Path, reference: Reference | None, recorded: Mapping[str, str] | None
) -> None:
    if reference is not None and recorded is not None and recorded["sha256"] != reference.sha256:
        raise checkpoint.CheckpointError(
            f"{path}: was trained with a KL penalty towards {recorded['name']} (sha256 {recorded['sha256'][:12]}); "
            f"the reference is now {reference.name} (sha256 {reference.sha256[:12]}), with other weights. Resume with "
            "the first, or start a new run from the checkpoint's weights."
        )


def _load_value_head(
    path: Path, value_head: ValueHead | None, saved: Mapping[str, Any] | None
) -> None:
    if (saved is None) != (value_head is None):
        has, needs = ("no value head", "one") if saved is None else ("a value head", "none")
        raise checkpoint.CheckpointError(
            f"{path}: was saved with {has}, and this run has {needs}. Resume with the baseline that run began with, or "
            "start a new run from the checkpoint's weights."
        )
    if value_head is not None and saved is not None:
        value_head.load_state(saved)
