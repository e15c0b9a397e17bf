"""A model's tensors whole on rank 0's CPU, gathered where they are sharded. Every rank makes each call."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rollouts.training import distributed, lora


@torch.no_grad()
def whole_weights(
    model: nn.Module, *, copy: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the state dict, LoRA merged, every tensor whole and on the CPU, on rank 0; {} elsewhere. Every rank calls
    it.

    Sharded tensors are gathered one at a time: on a device there is never more than one whole tensor, in rank 0's host
    memory there are all. Tied ones share memory. `copy`: none is the model's own memory, which the next step changes.
    `dtype`: of floating-point tensors; None: as they are.
    """
    state = (
        lora.merged_state_dict(model) if lora.is_lora(model) else model.state_dict(keep_vars=True)
    )
    return _whole_tensors(state, copy=copy, dtype=dtype)


@torch.no_grad()
def whole_adapter(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return a copy of the adapter's tensors, as `whole_weights`; {} for a model without LoRA."""
    return (
        _whole_tensors(lora.adapter_state_dict(model), copy=True, dtype=dtype)
        if lora.is_lora(model)
        else {}
    )


def _whole_tensors(
    tensors: Mapping[str, Tensor], *, copy: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    seen: dict[int, Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:  # gathered once by every rank, or they would wait for each other
            whole = _whole(tensor.detach(), copy=copy)
            seen[id(tensor)] = (
                whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole
            )
        if distributed.rank() == 0:
            found[name] = seen[id(tensor)]
    return found


def _whole(own: Tensor, *, copy: bool) -> Tensor:
    """Return `own` on rank 0's CPU, gathered where it is sharded; an empty tensor on other ranks."""
    local, whole = (own.to_local(), own.full_tensor()) if isinstance(own, DTensor) else (own, own)
    if distributed.rank() != 0:
        return torch.empty(0)
    if copy and whole.is_cuda:
        # torch keeps the memory for the next
        return torch.empty_like(whole, device="cpu", pin_memory=True).copy_(whole)
    on_cpu = whole.cpu()
    return on_cpu.clone() if copy and on_cpu.data_ptr() == local.data_ptr() else on_cpu
