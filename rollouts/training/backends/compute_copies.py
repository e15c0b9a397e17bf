"""Copies of a model's float32 parameters in another dtype, to compute with, as FSDP's mixed precision does.

The float32 ones stay the model's at rest: what the optimizer moves, checkpoints keep and engines get. While a pass runs
the copies stand in their place, and what arrives at a copy as its gradient is added to its master's, in float32.
Activations then have the copies' dtype throughout; under autocast norms and residuals would lift them to float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Slot(NamedTuple):
    """Where a parameter stands. A tied one has several slots, one master and one copy."""

    module: nn.Module
    name: str
    master: nn.Parameter
    copy: nn.Parameter


def use_copies(device: torch.device) -> bool:
    """Say whether bfloat16 on `device` computes with copies. CPUs keep autocast: they gain nothing by it."""
    return device.type == "cuda"


def hold_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the frozen `model` have its parameters in `dtype` for good. Buffers stay as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


class ComputeCopies:
    """Copies in `dtype` of the parameters of `model`, which stays on its device and has no parameters added."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        copies: dict[nn.Parameter, nn.Parameter] = {}
        self._slots: list[_Slot] = []
        for module in model.modules():
            for name, master in module.named_parameters(recurse=False, remove_duplicate=False):
                if master.dtype is not torch.float32:
                    continue
                if master not in copies:
                    copies[master] = _copy_of(master, dtype)
                self._slots.append(_Slot(module, name, master, copies[master]))
        self._masters: list[Tensor] = list(copies)
        self._copies: list[Tensor] = list(copies.values())
        self._stale = False  # whether masters have changed since they were copied
        self._in_place = False

    def masters_changed(self) -> None:
        """Copy the masters again before the next pass."""
        self._stale = True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the copies in the masters' place, for forward and backward passes. May be nested."""
        if self._in_place:
            yield
            return
        if self._stale:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._masters)
            self._stale = False
        self._in_place = True
        for slot in self._slots:
            slot.module._parameters[slot.name] = slot.copy
        try:
            yield
        finally:
            for slot in self._slots:
                slot.module._parameters[slot.name] = slot.master
            self._in_place = False


def _copy_of(master: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    copy = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)
    if copy.requires_grad:
        copy.register_post_accumulate_grad_hook(partial(_hand_on, master))
    return copy


def _hand_on(master: nn.Parameter, copy: Tensor) -> None:
    """Add the copy's gradient to its master's, and free it."""
    assert copy.grad is not None
    if master.grad is None:
        master.grad = copy.grad.to(master.dtype)
    else:
        master.grad.add_(copy.grad)
    copy.grad = None
