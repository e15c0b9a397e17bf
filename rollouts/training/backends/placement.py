"""Where a model's parameters are: whole on every rank, here, or sharded over ranks (`sharded`)."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from rollouts.training import distributed
from rollouts.training.forward import Layout
from rollouts.training.seams import Batch
from rollouts.training.token_selection import Logits

Compute = Callable[[nn.Module, Batch, Layout | None], Logits]


class Placement(Protocol):
    """How ranks share a model. Every rank makes each call, in the same order."""

    @property
    def device(self) -> torch.device:
        """This rank's."""

    @property
    def collective(self) -> bool:
        """Whether ranks hold parts of parameters and state, so that every pass needs all of them."""

    def place(self, model: nn.Module) -> None:
        """Bring `model` to this rank's device, in place, with rank 0's parameters."""

    def run(
        self, compute: Compute, model: nn.Module, inputs: Batch, layout: Layout | None
    ) -> Logits:
        """Return `compute(model, inputs, layout)`, with the parameters that it needs at hand."""

    def reduce_now(self, model: nn.Module, *, now: bool) -> None:
        """Say whether the next backward pass is the last of an optimizer step."""

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Replace the gradients of a whole step by their sums over ranks, unless backward passes have done it."""

    def at_rest(self, model: nn.Module) -> None:
        """Bring parameters back to where they are between passes: a caller may have run the model."""


class WholeCopy:
    """The whole model on every rank."""

    collective = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, model: nn.Module) -> None:
        model.to(self.device)
        distributed.broadcast_tensors([parameter.detach() for parameter in model.parameters()])

    def run(
        self, compute: Compute, model: nn.Module, inputs: Batch, layout: Layout | None
    ) -> Logits:
        return compute(model, inputs, layout)

    def reduce_now(self, model: nn.Module, *, now: bool) -> None:
        """Do nothing: gradients are summed once a step."""

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        distributed.all_reduce_sum(gradients)

    def at_rest(self, model: nn.Module) -> None:
        """Do nothing: parameters never leave their place."""
