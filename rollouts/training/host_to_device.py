"""A batch's tensors from the host to a device: one copy that nobody waits for."""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)
_ALIGNMENT = 16  # bytes: no dtype is wider


def to_device(tensors: Mapping[K, Tensor], device: torch.device) -> dict[K, Tensor]:
    """Return `tensors` on `device`; to CUDA all that lie on the host travel as one, from pinned memory.

    The pinned memory is torch's to keep until the copy is done.
    """
    on_host = {key: tensor for key, tensor in tensors.items() if tensor.device.type == "cpu"}
    if device.type != "cuda":
        return {key: tensor.to(device) for key, tensor in tensors.items()}
    buffer, places = join(on_host, pin_memory=True)
    moved = split(buffer.to(device, non_blocking=True), places)
    return {
        key: moved[key] if key in moved else tensor.to(device) for key, tensor in tensors.items()
    }


def join(
    tensors: Mapping[K, Tensor], **options: Any
) -> tuple[Tensor, dict[K, tuple[int, torch.dtype, torch.Size]]]:
    """Return the bytes of all `tensors` in one new tensor, and where each begins, its dtype and shape; `options` of
    empty."""
    places: dict[K, tuple[int, torch.dtype, torch.Size]] = {}
    end = 0
    for key, tensor in tensors.items():
        places[key] = (end, tensor.dtype, tensor.shape)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, **options)
    for key, part in split(buffer, places).items():
        part.copy_(tensors[key])
    return buffer, places


def split(
    buffer: Tensor, places: Mapping[K, tuple[int, torch.dtype, torch.Size]]
) -> dict[K, Tensor]:
    """Return the tensors of `join` as views of `buffer`."""
    return {
        key: buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for key, (start, dtype, shape) in places.items()
    }
