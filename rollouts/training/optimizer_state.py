"""An optimizer's state on disk by parameter name, with `torch.distributed.checkpoint`: any world size can read it.

Each rank writes its shards of the sharded tensors (DTensor) and reads back only those it needs, so that a run may go on
with another number of ranks, or plain where it was sharded. State is found by the names of the model's parameters, not
by their positions. Hyperparameters are not stored: those of a resumed run are its config's.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from rollouts.training.sharded_reader import SafeReader, UnsafeIndexError, read_index

# Said by dcp.save and dcp.load for no_dist=True, which is what a world of one asks for.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message names the path, what is wrong and the fix."""


def collect(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state as tensors by "<parameter>.<entry>", not copied, and plain data.

    The plain data are {"values": {"<parameter>": {"<entry>": value}}, "groups": the parameter groups, without them}.
    """
    whole = optimizer.state_dict()
    state, groups = (
        whole["state"],
        [copy.deepcopy({**group, "params": []}) for group in whole["param_groups"]],
    )
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, name, _ in _parameters(model, optimizer):
        for entry, value in state.get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{entry}"] = value.detach()
            else:
                plain.setdefault(name, {})[entry] = value
    return tensors, {"values": plain, "groups": groups}


class Staging:
    """Copies of a state in host memory. A GPU's are pinned, and the memory is kept for the next copy."""

    def __init__(self, make: Callable[[StagingOptions], DefaultStager] = DefaultStager) -> None:
        self._make = make
        self._pinned: DefaultStager | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy that later steps do not change, and on a GPU the next `copy` does; a sharded tensor stays
        sharded."""
        if not any(tensor.device.type == "cuda" for tensor in tensors.values()):
            return self._stager(pinned=False).stage(dict(tensors))  # type: ignore[return-value]
        # to pin memory takes as long as to copy
        self._pinned = self._pinned or self._stager(pinned=True)
        return self._pinned.stage(dict(tensors))  # type: ignore[return-value]

    def _stager(self, *, pinned: bool) -> DefaultStager:
        options = {"use_pinned_memory": pinned, "use_non_blocking_copy": pinned}
        return self._make(
            StagingOptions(use_shared_memory=False, use_async_staging=False, **options)
        )


def write(tensors: Mapping[str, Tensor], directory: Path, group: dist.ProcessGroup | None) -> None:
    """Write `tensors` under `directory`; every rank of `group` calls it with its shards (None: a world of one)."""
    dcp.save(dict(tensors), checkpoint_id=directory, process_group=group, no_dist=group is None)


def absent_files(directory: Path) -> list[str]:
    """Return the files that ranks wrote and that cannot be seen from here: another host's, without a shared disk."""
    storage = read_index(directory).storage_data or {}
    return sorted(
        {
            item.relative_path
            for item in storage.values()
            if not (directory / item.relative_path).is_file()
        }
    )


def check_complete(directory: Path) -> None:
    """Raises CheckpointError where a file that a rank wrote is not to be seen from here."""
    if absent := absent_files(directory):
        raise CheckpointError(
            f"{directory}: rank 0 does not have {', '.join(absent)}, which no rank's host has either"
        )


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path, plain: Mapping[str, Any]
) -> None:
    """Load what `write` stored, and the plain data of `collect`, into `optimizer`; its hyperparameters stay its own.

    Raises CheckpointError unless the state is of exactly this optimizer's parameters. The groups that it was saved for
    are shown to the optimizer's `load_state_dict`, which may refuse them.
    """
    try:
        saved = read_index(directory).state_dict_metadata
    except UnsafeIndexError as error:
        raise CheckpointError(
            f"{error}. Fix: use a checkpoint that a run wrote, from a place that you trust."
        ) from error
    parameters = {
        name: (index, parameter) for index, name, parameter in _parameters(model, optimizer)
    }
    names = {key.rpartition(".")[0] for key in saved} | set(plain["values"])
    # frozen ones have none
    trained = {name for name, (_, parameter) in parameters.items() if parameter.requires_grad}
    for what, differing in (("unknown", names - set(parameters)), ("missing", trained - names)):
        # an optimizer that took no step, or one without state, stored nothing
        if differing and names:
            raise CheckpointError(
                f"{directory}: optimizer state of {what} parameters: {', '.join(sorted(differing)[:5])}: saved from "
                "another architecture, or with other parameters frozen?"
            )
    tensors = {
        key: _empty(item, parameters[key.rpartition(".")[0]][1]) for key, item in saved.items()
    }
    if tensors:
        try:
            dcp.load(tensors, storage_reader=SafeReader(directory), no_dist=True)
        except CheckpointException as error:  # no Exception, so that nobody else's handler knows it
            reason = " ".join(str(next(iter(error.failures.values()))[0]).split())[:300]
            raise CheckpointError(
                f"{directory}: cannot be read: {reason}. Fix: choose another step."
            ) from error
    state: dict[int, dict[str, Any]] = {
        parameters[name][0]: dict(values) for name, values in plain["values"].items()
    }
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(".")
        state.setdefault(parameters[name][0], {})[entry] = tensor
    own = optimizer.state_dict()["param_groups"]
    saved_groups = [
        {**group, "params": mine["params"]}
        for group, mine in zip(plain["groups"], own, strict=False)
    ]
    saved_groups += plain["groups"][len(own) :]
    optimizer.load_state_dict({"state": state, "param_groups": saved_groups})
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group.update({key: value for key, value in mine.items() if key != "params"})


def _parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, str, Tensor]]:
    """(its index in the optimizer's state_dict, name, parameter); one that is not the model's is named by position."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    numbered = optimizer.state_dict()["param_groups"]
    for group, (own, indices) in enumerate(zip(optimizer.param_groups, numbered, strict=True)):
        for position, (parameter, index) in enumerate(
            zip(own["params"], indices["params"], strict=True)
        ):
            yield index, names.get(id(parameter), f"group{group}.{position}"), parameter


def _empty(saved: Any, parameter: Tensor) -> Tensor:
    """Return a tensor to load into: laid out (and sharded) as the parameter where it has its shape, else whole."""
    if not isinstance(saved, TensorStorageMetadata):
        raise CheckpointError(
            f"optimizer state holds {type(saved).__name__}, needs tensors: was it edited?"
        )
    if saved.size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=saved.properties.dtype)
    return torch.empty(saved.size, dtype=saved.properties.dtype)
