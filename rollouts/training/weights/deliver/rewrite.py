"""Write a checkpoint in memory (tmpfs) again in place. Its pages exist and are mapped, so this costs just a copy.

A new file costs more than twice that, nearly all of it to make, zero and map its pages.
"""

import json
import mmap
import shutil
import struct
from pathlib import Path

import torch
from torch import Tensor, nn

from rollouts.training import distributed
from rollouts.training.weights.gather import UnpublishableModel, fill, plan_buckets
from rollouts.training.weights.wire import WireTensor

_FILE = "model.safetensors"
_LENGTH = struct.Struct("<Q")  # of the header, which comes before the data
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class MappedCheckpoint:
    """A directory with one safetensors file, mapped for as long as this lives, wherever the directory is moved."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file of tensors of other kinds; OSError."""
        self.path = path
        with (path / _FILE).open("r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), 0)
        (size,) = _LENGTH.unpack_from(self._mapping)
        start = _LENGTH.size + size
        header = json.loads(self._mapping[_LENGTH.size : start])
        header.pop("__metadata__", None)
        placed = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        if not {item["dtype"] for item in header.values()} <= set(_DTYPES):
            raise ValueError(f"{path / _FILE} has tensors that are not floating-point ones")
        self.entries = tuple(
            WireTensor(name, tuple(item["shape"]), _DTYPES[item["dtype"]]) for name, item in placed
        )
        self.flat: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, offset=start)

    def move(self, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)
        self.path.rename(path)
        self.path = path


def rewrite(model: nn.Module, *, spare: MappedCheckpoint | None, dtype: torch.dtype | None) -> bool:
    """Put the model's current values into `spare`, which is rank 0's. Return whether it has this model's tensors.

    Every rank calls it, on the thread that works on the model. False: nothing was written.
    """
    entries = distributed.broadcast_object(spare.entries if spare else None)
    if entries is None or set(entries) != _tensors_of(model, dtype):
        return False
    fill(model, entries, spare.flat if spare else None)
    return True


def _tensors_of(model: nn.Module, dtype: torch.dtype | None) -> set[WireTensor]:
    try:
        return {entry for bucket in plan_buckets(model, dtype, 2**62) for entry in bucket}
    except UnpublishableModel:  # a checkpoint of it has other tensors
        return set()
