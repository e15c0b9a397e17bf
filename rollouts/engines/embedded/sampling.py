"""From logits to sampled tokens. Pure tensors; B rows, V tokens; log-probs are natural logs in fp32.

A draw is inverse-CDF sampling with one uniform per row, and that uniform is a hash of (seed, row of the n-fold group,
position). It does not depend on batch-mates, timing or a global generator.
"""

from dataclasses import dataclass

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014, with Stafford's constants) to [B] uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def row_keys(seed: int, rows: int) -> np.ndarray:
    """Return [rows] uint64: one independent stream for each row of an n-fold group with this seed."""
    base = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN)
    return _mix(base + np.arange(1, rows + 1, dtype=np.uint64) * _GOLDEN)


def uniforms(keys_B: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
    """Return [B] float64 in the open interval (0, 1): the draw of each stream at each output position."""
    bits = _mix(keys_B + (positions_B.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((bits >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32


@dataclass(frozen=True)
class RowFilters:
    """What each row rules out; every value has a neutral one for rows without that filter."""

    top_k_B1: torch.Tensor
    top_p_B1: torch.Tensor
    min_p_B1: torch.Tensor


@dataclass(frozen=True)
class RowSampling:
    """How each row is sampled. A field is None where no row needs it, which saves a pass over the vocabulary."""

    temperature_B1: torch.Tensor | None = None  # None: all rows at 1
    greedy_B: torch.Tensor | None = None
    filters: RowFilters | None = None


def sample(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, how: RowSampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [B] int64 and their log-probs [B] float32: log softmax(logits / temperature), before any filter.

    A row's result does not depend on whether its batch-mates are filtered: the draw walks the vocabulary in id order
    always.
    """
    scaled_BV = (
        logits_BV.float() if how.temperature_B1 is None else logits_BV.float() / how.temperature_B1
    )
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    weights_BV = logprobs_BV.exp()
    if how.filters is not None:
        weights_BV = _filter(weights_BV, how.filters)
    cdf_BV = weights_BV.double().cumsum(dim=-1)
    # u < 1 - 2**-33 and cdf is float64: the product stays below the total, so the index is a token of weight > 0.
    thresholds_B1 = uniforms_B[:, None] * cdf_BV[:, -1:]
    # (The clamp is for NaN, whose log-prob the caller sees.)
    tokens_B1 = torch.searchsorted(cdf_BV, thresholds_B1, right=True).clamp_(
        max=cdf_BV.shape[-1] - 1
    )
    if how.greedy_B is not None:
        tokens_B1 = torch.where(
            how.greedy_B[:, None], logits_BV.argmax(dim=-1, keepdim=True), tokens_B1
        )
    return tokens_B1[:, 0], logprobs_BV.gather(1, tokens_B1)[:, 0]


def _filter(probs_BV: torch.Tensor, filters: RowFilters) -> torch.Tensor:
    """Zero the weights that top-k, top-p and min-p rule out, in that order, as SGLang's PyTorch sampler does."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_BV.shape[-1], device=probs_BV.device)
    keep_BV = rank_V < filters.top_k_B1
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    keep_BV &= before_BV <= filters.top_p_B1
    keep_BV &= sorted_BV >= sorted_BV[:, :1] * filters.min_p_B1
    return torch.zeros_like(probs_BV).scatter(1, order_BV, sorted_BV * keep_BV)
