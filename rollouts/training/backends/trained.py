"""The model under training, with all that is placed, saved and stepped together with it."""

from dataclasses import dataclass

import torch
from torch import nn

from rollouts.training.backends.placement import Placement
from rollouts.training.backends.precision import Precision
from rollouts.training.reference import Reference
from rollouts.training.value_head import ValueHead


@dataclass
class Trained:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    placement: Placement
    precision: Precision
    reference: Reference | None
    value_head: ValueHead | None
    step: int = 0  # optimizer steps applied

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained; the value head has an optimizer and parameters of its own."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
