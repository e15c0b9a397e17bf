"""Advantages from a value model: per token, by GAE over the trained tokens of each sequence.

B sequences, T tokens. The reward comes with a sequence's last trained token, where the episode ends. Tokens
that are not trained on (a tool's output) are not actions: GAE skips them.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from rollouts.training import distributed
from rollouts.training.advantages import CONTRAST_MIN, gae
from rollouts.training.seams import Batch, TrainingBackend

Estimate = Literal["returns", "old_values", "advantages"]


async def add_value_advantages(
    backend: TrainingBackend,
    micro_batches: list[Batch],
    *,
    gamma: float,
    gae_lambda: float,
    norm: str,
) -> dict[str, float]:
    """Add "old_values", "returns" and "advantages" [B, T] to each micro-batch, which has "rewards" [B].

    `norm` "batch" standardises the advantages over all trained tokens of the step; "none" leaves them. The numbers are
    the step's, over all ranks: "explained_variance" = 1 - Var(return - value) / Var(return), and "value_loss", half the
    mean squared error of the values. Every rank calls this.
    """
    pending = [backend.values(batch) for batch in micro_batches]
    for batch, future in zip(micro_batches, pending, strict=True):
        batch["old_values"] = await future.result()
        batch["advantages"], batch["returns"] = _estimates(batch, gamma, gae_lambda)
    kept = [batch["loss_mask"][:, 1:] != 0 for batch in micro_batches]

    def trained(key: Estimate) -> Tensor:
        parts = [batch[key][:, 1:][keep] for batch, keep in zip(micro_batches, kept, strict=True)]
        return torch.cat(parts or [torch.zeros(0)]).double()

    errors_N = trained("returns") - trained("old_values")
    _, return_variance, return_square = _moments(trained("returns"))
    _, error_variance, square = _moments(errors_N)
    if norm == "batch":
        mean, variance, advantage_square = _moments(trained("advantages"))
        # returns minus values were rounded
        contrast = _has_contrast(variance, max(advantage_square, return_square))
        for batch, keep in zip(micro_batches, kept, strict=True):
            standard = (
                (batch["advantages"][:, 1:] - mean) / math.sqrt(variance) if contrast else 0.0
            )
            batch["advantages"][:, 1:] = torch.where(keep, standard, 0.0)
    explained = (
        1 - error_variance / return_variance
        if _has_contrast(return_variance, return_square)
        else 0.0
    )
    return {"explained_variance": explained, "value_loss": square / 2}


def _has_contrast(variance: float, square: float) -> bool:
    """Return whether numbers of this variance differ by more than rounding explains, at this mean square."""
    return variance > CONTRAST_MIN**2 * square


def _estimates(batch: Batch, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    advantages_BT, returns_BT = (torch.zeros_like(batch["old_values"]) for _ in range(2))
    keep = batch["loss_mask"] != 0
    keep[:, 0] = False  # predicted by nothing
    for row, reward in enumerate(batch["rewards"].tolist()):
        values = batch["old_values"][row][keep[row]].tolist()
        if values:
            advantages, returns = gae(
                [0.0] * (len(values) - 1) + [reward], values, gamma=gamma, lam=gae_lambda
            )
            advantages_BT[row][keep[row]] = torch.tensor(advantages, dtype=advantages_BT.dtype)
            returns_BT[row][keep[row]] = torch.tensor(returns, dtype=returns_BT.dtype)
    return advantages_BT, returns_BT


def _moments(values_N: Tensor) -> tuple[float, float, float]:
    """Return mean, variance (ddof 1; 0 if all are equal) and mean square of a step's numbers, over all ranks."""
    count, total = distributed.all_reduce_floats([float(len(values_N)), values_N.sum().item()])
    mean = total / max(1.0, count)
    spread, square = distributed.all_reduce_floats(
        [(values_N - mean).square().sum().item(), values_N.square().sum().item()]
    )
    return mean, spread / max(1.0, count - 1), square / max(1.0, count)
