"""The parts that RL losses are made of: pure functions of tensors, elementwise unless they say otherwise.

B sequences, T tokens, N trained tokens. `rl_losses` selects the tokens and puts the parts
together; docs/reference/losses.md has the table of methods. `keep` [B, T] bool marks the trained tokens; `places`
[N] are their places in it, flattened. None: they are looked for, for which a GPU's host has to wait.
"""

from collections.abc import Collection

import torch
from torch import Tensor

AGGREGATIONS = (
    "token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_mean",
    "constant_length",
)
IMPORTANCE = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

_LOG_RATIO_MAX = (
    20.0  # a ratio beyond e^20 is held there: exp would overflow, and 0 x inf be a NaN gradient
)

ClipRange = float | tuple[float, float]  # of the ratio: 1 - low to 1 + high; one number is both


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_range: ClipRange = 0.2, dual_clip: float | None = None
) -> Tensor:
    """min(ratio A, clip(ratio) A), to be maximised; with `dual_clip` c never below c A where A < 0.

    PPO (arXiv 1707.06347 eq. 7); dual clip (arXiv 1912.09729): a huge ratio cannot push a bad token without end.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(
            f"dual_clip={dual_clip}: needs > 1, else it would hold ratios that nothing has moved"
        )
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(*ratio_bounds(clip_range)) * advantages
    )
    if dual_clip is None:
        return surrogate
    return torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """Half the squared error of `values`; with `clip`, that of the worse of `values` and of `values` held within `clip`
    of `old_values`, so that one batch moves no value far (as OpenAI baselines' PPO2 and TRL).
    """
    errors = (values - returns).square()
    if clip is not None:
        if clip <= 0 or old_values is None:
            raise ValueError(f"value_clip={clip}: needs > 0, and the values from before the step")
        held = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (held - returns).square())
    return errors / 2


def take(values_BT: Tensor, keep: Tensor, places: Tensor | None) -> Tensor:
    """Select the trained tokens' values [N]."""
    return values_BT[keep] if places is None else values_BT.reshape(-1).index_select(0, places)


def spread(values_N: Tensor, keep: Tensor, places: Tensor | None) -> Tensor:
    """Put the trained tokens' values into [B, T], 0 elsewhere."""
    if places is None:
        return values_N.new_zeros(keep.shape).masked_scatter(keep, values_N)
    return values_N.new_zeros(keep.numel()).index_copy(0, places, values_N).view(keep.shape)


def importance_weights(
    log_ratio_N: Tensor, keep: Tensor, kind: str, cap: float, places: Tensor | None = None
) -> Tensor:
    """Weights [N], without gradient, that correct for a sampler whose log-probs differ: of p / p_sampler.

    `log_ratio_N` are log p - log p_sampler of the tokens that `keep` [B, T] selects. "token_*" takes each token's
    ratio, "sequence_*" the product over its sequence. "*_truncate" holds it at `cap` (TIS), "*_mask" drops what is
    above it (MIS); the shares of the other tokens stay as they are. "none": 1.
    """
    check_choice("importance", kind, IMPORTANCE)
    if cap <= 0:
        raise ValueError(f"importance_cap={cap}: needs > 0, the largest weight")
    log_ratio_N = log_ratio_N.detach()
    if kind == "none":
        return torch.ones_like(log_ratio_N)
    if kind.startswith("sequence"):
        sums_B = spread(log_ratio_N, keep, places).sum(1)
        log_ratio_N = take(sums_B[:, None].expand(keep.shape), keep, places)
    ratio_N = clamped_exp(log_ratio_N)
    if kind.endswith("truncate"):
        return ratio_N.clamp(max=cap)
    return torch.where(ratio_N <= cap, ratio_N, 0.0)


def token_shares(
    loss_mask: Tensor,
    aggregation: str = "token_mean",
    *,
    tokens_global: float | None = None,
    sequences_global: float | None = None,
    length_norm: float | None = None,
) -> Tensor:
    """Return [B, T], how much each token's term counts in the step's loss, which is the sum of share x term.

    "token_mean": all tokens alike (DAPO, arXiv 2503.14476). "sequence_mean_token_sum": the mean over sequences of the
    sum over tokens. "sequence_mean_token_mean": of the mean over tokens (GRPO as published, 1/|o|). "constant_length":
    of the sum over tokens divided by the constant `length_norm`, the longest response allowed (Dr. GRPO, 2503.20783).
    Sequences without a trained token count nowhere. `loss_mask` holds weights. Position 0 has share 0.
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    weights = loss_mask.clone()
    weights[:, 0] = 0
    if aggregation == "token_mean":
        return weights / _denominator("tokens_global", tokens_global, weights.sum())
    shares = weights / _denominator(
        "sequences_global", sequences_global, (weights != 0).any(1).sum()
    )
    if aggregation == "sequence_mean_token_mean":
        totals = weights.sum(1, keepdim=True)
        return shares / torch.where(totals == 0, 1, totals)
    if aggregation == "constant_length":
        if length_norm is None or length_norm <= 0:
            raise ValueError(
                f"length_norm={length_norm}: aggregation='constant_length' needs > 0 tokens"
            )
        return shares / length_norm
    return shares


def k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """log p - log reference: unbiased, noisy. As a loss its gradient is 0 in expectation (arXiv 2506.09477)."""
    return log_probs - reference_log_probs


def k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Half the squared log-ratio: biased, yet as a loss its gradient is that of KL(p || reference), on policy."""
    return (log_probs - reference_log_probs).square() / 2


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Return the estimate r - 1 - log r of KL(p || reference) for tokens drawn from p, with r = reference / p.

    Unbiased and never negative (Schulman, "Approximating KL divergence", k3). Exactly 0 where both agree.
    """
    log_ratio = (reference_log_probs - log_probs).clamp(max=_LOG_RATIO_MAX)
    return torch.expm1(log_ratio) - log_ratio


def clamped_exp(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(max=_LOG_RATIO_MAX))


def sequence_mean(
    values_N: Tensor, keep: Tensor, weights_BT: Tensor, places: Tensor | None = None
) -> Tensor:
    """Return each token's value replaced by the weighted mean over its sequence."""
    values_BT = spread(values_N, keep, places)
    totals_B = weights_BT.sum(1)
    means_B = (weights_BT * values_BT).sum(1) / torch.where(totals_B == 0, 1, totals_B)
    return take(means_B[:, None].expand(keep.shape), keep, places)


def ratio_bounds(clip_range: ClipRange) -> tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if low < 0 or high < 0:
        raise ValueError(
            f"clip_range={clip_range}: needs >= 0, how far the ratio may go below and above 1"
        )
    return 1 - low, 1 + high


def _denominator(name: str, count_global: float | None, count_here: Tensor) -> float | Tensor:
    if count_global is None:
        if not count_here:
            raise ValueError(
                "loss_mask has no trained token after position 0, so the mean over them does not exist"
            )
        return count_here
    if count_global <= 0:
        raise ValueError(
            f"{name}={count_global}: needs > 0, the trained ones of the optimizer step"
        )
    return count_global


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: needs one of {', '.join(map(repr, choices))}")
