"""What the micro-batches of an optimizer step add up to, kept on the device until somebody must know.

A number costs a wait for the device, so a step whose micro-batches were announced is read once.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rollouts.training import distributed
from rollouts.training.policy_statistics import STATISTICS


class StepSums:
    """The loss, and the sums of the policy statistics: of all but "kl_reference" without a reference."""

    def __init__(self, device: torch.device, *, with_reference: bool) -> None:
        self._device = device
        self._names = [key for key in STATISTICS if with_reference or key != "kl_reference"]
        self.start_over()

    def start_over(self) -> None:
        """Forget what has gathered since the last optimizer step."""
        self.micro_batches = 0
        # loss first
        self._totals = torch.zeros(1 + len(self._names), dtype=torch.float64, device=self._device)
        self._announced = 0

    def announce(self, micro_batches: int) -> None:
        """Take the next `micro_batches` for the whole of an optimizer step."""
        self._announced = micro_batches

    def begin(self) -> tuple[bool, bool]:
        """Count off one micro-batch. Return whether it was announced, and whether it may be the step's last."""
        was_announced = self._announced > 0
        self._announced -= was_announced
        return was_announced, not self._announced

    def add(self, found: Tensor) -> None:
        """Add a micro-batch's loss and sums."""
        self.micro_batches += 1
        self._totals[: len(found)] += found

    def of_micro_batch(self, found: Tensor, norm: Tensor) -> dict[str, float]:
        """Read one micro-batch's loss, the gradient's norm so far, and the means of its statistics."""
        grad_norm, loss, *statistics = self._read([norm], found)
        named = dict(zip(self._names, statistics, strict=False))
        return {"loss": loss, "grad_norm": grad_norm, **(_means(named) if named else {})}

    def of_step(self, norms: Sequence[Tensor]) -> tuple[list[float], dict[str, float]]:
        """Read the norms, and over all ranks the step's loss and the means of its statistics.

        Raises ValueError where no rank has a micro-batch.
        """
        numbers = self._read(norms, self._totals)
        read_norms, totals = numbers[: len(norms)], numbers[len(norms) :]
        micro_batches, loss, *statistics = distributed.all_reduce_floats(
            [self.micro_batches, *totals]
        )
        if not micro_batches:
            raise ValueError(
                "optim_step: no forward_backward since the last one, so there is nothing to apply"
            )
        return read_norms, {"loss": loss, **_means(dict(zip(self._names, statistics, strict=True)))}

    def _read(self, norms: Sequence[Tensor], sums: Tensor) -> list[float]:
        """Read all of them, waiting once for the device."""
        flat = [norm.detach().to(self._device, torch.float64).reshape(1) for norm in norms]
        return torch.cat([*flat, sums]).tolist()


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of the policy statistics; none where no token was counted."""
    if not sums["tokens"]:
        return {}
    return {
        key: sums[key] / sums["tokens"] for key in STATISTICS if key != "tokens" and key in sums
    }
