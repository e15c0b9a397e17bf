"""Gather a model's weights as engines take them: whole tensors under checkpoint names, in buckets of bounded size.

Every rank calls these functions in the same order, on the thread that works on the model. Sharded tensors are gathered
one at a time: a rank holds one whole tensor beyond its shards, and rank 0 a bucket.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import transformers.core_model_loading
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rollouts.training import lora
from rollouts.training.weights.wire import WireTensor, views


class UnpublishableModel(ValueError):
    """A model whose tensors have other names in memory than engines know."""


def plan_buckets(
    model: nn.Module, dtype: torch.dtype | None, bucket_bytes: int
) -> list[tuple[WireTensor, ...]]:
    """Return all tensors of `model` in its order, LoRA merged, tied ones once, in buckets of `bucket_bytes` at most.

    `dtype`: what floating-point tensors are sent as; None: as they are. A bucket has one dtype. It is larger only if
    its single tensor is. The result is the same on every rank. Raises UnpublishableModel.
    """
    entries = [
        WireTensor(name, tuple(tensor.shape), _sent_as(tensor, dtype))
        for name, (tensor, _) in _sources(model).items()
    ]
    _check_names(model, entries)
    buckets: list[list[WireTensor]] = []
    room = 0
    for entry in entries:
        if not buckets or entry.nbytes > room or entry.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(entry)
        room -= entry.nbytes
    return [tuple(bucket) for bucket in buckets]


@torch.no_grad()
def fill(model: nn.Module, entries: Sequence[WireTensor], flat: Tensor | None) -> None:
    """Copy the current values of `entries` into the buffer `flat` (uint8, see `wire.views`); None on ranks but 0.

    Returns when they are there, on a GPU too.
    """
    sources = _sources(model)
    into = [view for _, view in views(flat, entries)] if flat is not None else [None] * len(entries)
    for entry, view in zip(entries, into, strict=True):
        own = sources[entry.name][1]()
        whole = own.full_tensor() if isinstance(own, DTensor) else own
        if view is not None:
            _copy(view, whole.detach())
    if flat is not None and flat.is_cuda:
        torch.cuda.current_stream(flat.device).synchronize()  # the receiver reads on another stream


def _copy(into: Tensor, source: Tensor) -> None:
    """Do `into.copy_(source)`. memcpy, where possible, takes a seventh less CPU time than one thread of torch."""
    alike = into.is_cpu and source.is_cpu and into.dtype == source.dtype and source.is_contiguous()
    if alike and torch.get_num_threads() == 1:
        np.copyto(
            into.view(-1).view(torch.uint8).numpy(), source.view(-1).view(torch.uint8).numpy()
        )
    else:
        into.copy_(source)


def buffer_bytes(buckets: Sequence[Sequence[WireTensor]]) -> int:
    """Return the size of the largest bucket."""
    return max(sum(entry.nbytes for entry in bucket) for bucket in buckets)


def _sources(model: nn.Module) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """Return by name the parameter (for its shape), and a function that makes the value to send."""
    if lora.is_lora(model):
        found = lora.merged_parts(model)
    else:
        state = model.state_dict(keep_vars=True)  # tied ones are one object
        found = {name: (tensor, partial(_itself, tensor)) for name, tensor in state.items()}
    seen: set[int] = set()
    once = {}
    for name, (tensor, make) in found.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            once[name] = (tensor, make)
    return once


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _sent_as(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


def _check_names(model: nn.Module, entries: Sequence[WireTensor]) -> None:
    """Raise UnpublishableModel if transformers keeps tensors (fused experts) otherwise than checkpoints do."""
    here = {
        entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries
    }
    stored = transformers.core_model_loading.revert_weight_conversion(model, dict(here))  # type: ignore[arg-type]
    if {name: tensor.shape for name, tensor in stored.items()} != {
        name: t.shape for name, t in here.items()
    }:
        other = next(iter(sorted(set(here) - set(stored)) or sorted(here)))
        raise UnpublishableModel(
            f"{type(model).__name__} keeps {other} otherwise in memory than in a checkpoint, so engines do not know "
            "it: set engine.weight_sync=DiskSync(...), which writes a checkpoint"
        )
