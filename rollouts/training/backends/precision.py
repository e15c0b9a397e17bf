"""The dtype that a model computes in: its own, or bfloat16 by autocast or by copies of its parameters."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from rollouts.training import forward
from rollouts.training.backends.compute_copies import ComputeCopies, hold_in, use_copies
from rollouts.training.reference import Reference


class Precision:
    """`compute_dtype` of the trained `model` and its reference. Parameters stay in their own dtype.

    With "bfloat16" a model that runs `packed` on CUDA computes with copies of its parameters, and its reference is held
    in bfloat16. All others run under autocast.
    """

    def __init__(
        self,
        compute_dtype: str,
        model: nn.Module,
        reference: Reference | None,
        device: torch.device,
        *,
        packed: bool,
    ) -> None:
        self._model = model
        self._device = device
        self._is_lower = compute_dtype == "bfloat16"
        self.copies: ComputeCopies | None = None
        if self._is_lower and packed and use_copies(device):
            if reference is not None and reference.model is not model:
                hold_in(reference.model, torch.bfloat16)
            self.copies = ComputeCopies(model, torch.bfloat16)

    def computing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Put the copies in the parameters' place, where `model` has any. The backward pass needs it too."""
        return (
            self.copies.in_place()
            if self.copies is not None and model is self._model
            else nullcontext()
        )

    def autocasting(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Autocast, unless the packed `model` has parameters in bfloat16 now."""
        if not self._is_lower or (self.copies is not None and forward.packs(model)):
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    def weights_changed(self) -> None:
        """Have the copies made again before the next pass."""
        if self.copies is not None:
            self.copies.masters_changed()
