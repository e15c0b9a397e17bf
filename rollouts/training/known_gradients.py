"""Gradients that are known before log-probs are: of losses that are linear in them, with factors from the batch alone.

The output head then makes its gradient from the logits that it has, and does not compute them again (`log_probs`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rollouts.training.loss_terms import token_shares
from rollouts.training.rl_losses import sft_loss


def known_gradient(
    loss_fn: Callable[..., Any], inputs: Mapping[str, Any]
) -> Callable[[torch.dtype], Tensor] | None:
    """Return what makes d loss / d log-probs [B, T] on a batch, in a dtype; None where it depends on log-probs."""
    if loss_fn is not sft_loss or inputs.get("tokens_global") is None:
        return None
    return functools.partial(_of_sft, inputs["loss_mask"], inputs["tokens_global"])


def _of_sft(loss_mask: Tensor, tokens_global: float, dtype: torch.dtype) -> Tensor:
    return -token_shares(loss_mask.to(dtype), tokens_global=tokens_global)
