"""The trained tokens of a batch: their log-probs, and what else of the batch belongs to each of them.

B sequences, T tokens, V vocabulary entries, N trained tokens. A token at position t is predicted at t - 1, so position
0 never counts. "Aligned" values [B, T] have at entry t what belongs to the token at position t.
"""

import torch
from torch import Tensor

from rollouts.training.log_probs import TokenLogProbs, selected_log_probs
from rollouts.training.loss_terms import spread, take

Logits = Tensor | TokenLogProbs  # [B, T, V], or what a backend takes in their place


def trained_tokens(loss_mask: Tensor) -> float:
    """Return the summed weight of the tokens of `loss_mask` [B, T] that a loss trains on: all but position 0."""
    return float(loss_mask[:, 1:].sum(dtype=torch.float64))


def trained_sequences(loss_mask: Tensor) -> float:
    """Return how many rows of `loss_mask` [B, T] have a token that a loss trains on."""
    return float((loss_mask[:, 1:] != 0).any(1).sum())


@torch.no_grad()
def token_log_probs(
    logits: Logits, labels: Tensor, loss_mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Log-probs [B, T] of the trained tokens, aligned to tokens, 0 elsewhere; no gradient: for a reference model."""
    tokens = select(logits, labels, loss_mask, temperature)
    log_probs = tokens.log_probs_N.new_zeros(labels.shape)
    log_probs[:, 1:] = spread(tokens.log_probs_N, tokens.keep, tokens.places)
    return log_probs


def select(
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    temperature: float,
    *,
    with_entropy: bool = False,
) -> TokenLogProbs:
    """Return the trained tokens' log-probs. Raises ValueError for shapes that do not fit."""
    if isinstance(logits, TokenLogProbs):
        if logits.temperature != temperature or (with_entropy and logits.entropy_N is None):
            raise ValueError(
                f"log-probs at temperature={logits.temperature} with entropy: {logits.entropy_N is not None}; the "
                f"loss needs temperature={temperature} with entropy: {with_entropy}"
            )
        return logits
    if logits.ndim != 3 or logits.shape[1] < 2:
        raise ValueError(
            f"logits {tuple(logits.shape)}: needs [B, T, V] with T >= 2, else nothing is predicted"
        )
    _check_shape("labels", labels, logits.shape[:2])
    _check_shape("loss_mask", loss_mask, logits.shape[:2])
    keep = loss_mask[:, 1:] != 0
    places = keep.flatten().nonzero().squeeze(1)
    return select_from_logits(
        logits, labels, keep, places, temperature=temperature, with_entropy=with_entropy
    )


def select_from_logits(
    logits: Tensor,
    labels: Tensor,
    keep: Tensor,
    places: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
) -> TokenLogProbs:
    """Return log-probs of the tokens at `places` of `keep` [B, T-1], flattened, from logits [B, T, V]."""
    width = max(1, keep.shape[1])
    positions_N = places // width * logits.shape[1] + places % width
    log_probs_N, entropy_N = selected_log_probs(
        logits.flatten(0, 1),
        positions_N,
        take(labels[:, 1:], keep, places),
        temperature=temperature,
        with_entropy=with_entropy,
    )
    return TokenLogProbs(keep, log_probs_N, entropy_N, temperature, places=places)


def aligned(
    name: str,
    values_BT: Tensor | None,
    tokens: TokenLogProbs,
    *,
    needed_by: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the trained tokens' [N] of the batch's `name`. `dtype` None: that of the log-probs.

    Raises ValueError where the batch lacks it or its shape does not fit.
    """
    if values_BT is None:
        raise ValueError(f"{name}=None: {needed_by} needs them, [B, T] aligned to tokens")
    rows, columns = tokens.keep.shape
    _check_shape(name, values_BT, torch.Size((rows, columns + 1)))
    return chosen(values_BT, tokens).to(dtype or tokens.log_probs_N.dtype)


def per_token(advantages: Tensor, tokens: TokenLogProbs) -> Tensor:
    """Return advantages [N] of `advantages` [B], one per sequence, or [B, T], one per token."""
    if advantages.ndim == 2:
        return aligned("advantages", advantages, tokens, needed_by="")
    rows, columns = tokens.keep.shape
    _check_shape("advantages", advantages, tokens.keep.shape[:1])
    each = take(advantages[:, None].expand(rows, columns), tokens.keep, tokens.places)
    return each.to(tokens.log_probs_N.dtype)


def chosen(values_BT: Tensor, tokens: TokenLogProbs) -> Tensor:
    """Return the trained tokens' [N] of values aligned to tokens."""
    return take(values_BT[:, 1:], tokens.keep, tokens.places)


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} {tuple(tensor.shape)}: needs {tuple(shape)} to fit logits [B, T, V]"
        )
