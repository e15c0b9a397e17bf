"""Optimizer steps: gradients that gather over micro-batches, summed over ranks, clipped and applied."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rollouts.training.backends.passes import Passes
from rollouts.training.backends.step_sums import StepSums
from rollouts.training.backends.trained import Trained
from rollouts.training.seams import Batch


class OptimizerSteps:
    """On one thread at a time, in order. Gradients are clipped to the global L2 norm `max_grad_norm`."""

    def __init__(
        self,
        trained: Trained,
        passes: Passes,
        *,
        max_grad_norm: float,
        lr_schedule: Callable[[int], float] | None,
    ) -> None:
        self._trained = trained
        self._passes = passes
        self._max_grad_norm = max_grad_norm
        self._lr_schedule = lr_schedule
        self._base_lrs = [float(group["lr"]) for group in trained.optimizer.param_groups]
        self.sums = StepSums(trained.device, with_reference=trained.reference is not None)

    def forward_backward(self, batch: Batch) -> dict[str, float]:
        """Add the gradient of `batch`. Return its numbers, or {} where it was announced."""
        if not self.sums.micro_batches:
            self._passes.start_update()
        announced, may_be_last = self.sums.begin()
        self._trained.placement.reduce_now(self._trained.model, now=may_be_last)
        found = self._passes.backward(batch)
        self.sums.add(found)
        if announced:
            return {}
        norm = _total_norm([p.grad for p in self._trained.parameters if p.grad is not None])
        return self.sums.of_micro_batch(found, norm)

    def optim_step(self) -> dict[str, float]:
        """Apply what has gathered, and start over. Raises, with parameters as they are, where it cannot be applied."""
        trained, parameters = self._trained, self._trained.parameters
        for parameter in parameters:
            # no sequence on this rank, or unused: every rank and every split does the same
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        trained.placement.sum_gradients(gradients)
        norms = [_total_norm(gradients)]
        if trained.value_head is not None:
            norms.append(trained.value_head.gradient_norm())
        read_norms, metrics = self.sums.of_step(norms)
        self._check_finite(read_norms, metrics["loss"])
        torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norms[0])
        factor = self._set_lr()
        trained.optimizer.step()
        trained.precision.weights_changed()
        trained.optimizer.zero_grad(set_to_none=True)
        if trained.value_head is not None:
            trained.value_head.step(factor, self._max_grad_norm, norms[1])
        trained.step += 1
        self.sums.start_over()
        first = {
            "step": trained.step,
            "lr": trained.optimizer.param_groups[0]["lr"],
            "grad_norm": read_norms[0],
        }
        return {**first, **metrics}

    def _check_finite(self, norms: Sequence[float], loss: float) -> None:
        grad_norm, *value_norm = norms
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"grad_norm={grad_norm} at step {self._trained.step + 1} (loss={loss}): not applied. Lower the "
                "learning rate, or look at this step's batch and at the sampler's log-probs."
            )
        if not all(map(math.isfinite, value_norm)):
            raise FloatingPointError(
                f"grad_norm={value_norm[0]} of the value head at step {self._trained.step + 1} (loss={loss}): not "
                "applied. Lower its learning rate, or look at this step's rewards and returns."
            )

    def _set_lr(self) -> float:
        """Set the learning rates of this step. Return the schedule's factor."""
        factor = self._lr_schedule(self._trained.step) if self._lr_schedule else 1.0
        for group, base_lr in zip(
            self._trained.optimizer.param_groups, self._base_lrs, strict=True
        ):
            group["lr"] = base_lr * factor
        return factor


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm of them all, a scalar; of sharded ones (every rank calls it then) over all shards."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
