"""The losses by name: tensors in, tensors out. No model, optimizer, I/O or config.

B sequences, T tokens, V vocabulary entries, N trained tokens. Log-probabilities are natural logs, taken in float32
(float64 when the logits are). Every function does the next-token shift itself: `labels[:, t]` is the token at position
t, predicted by `logits[:, t - 1]`; `loss_mask[:, t]` and `old_log_probs[:, t]` belong to that token too. Position 0 is
predicted by nothing and never counts.

`logits` are a tensor [B, T, V], or the `TokenLogProbs` that a backend takes in their place. Only trained positions are
ever read: they are selected before the softmax, so padding may hold inf or NaN without touching the loss or its
gradient, and nothing of size [B, T, V] is upcast.

`tokens_global` and `sequences_global` count the trained tokens and the sequences that have any, over all micro-batches
and ranks of the optimizer step (`trained_tokens`, `trained_sequences`). A loss divides by one of them once, so that the
losses and gradients of micro-batches add up to the same step however it was cut. None: this batch is the whole step.

`grpo_loss`, `ppo_loss`, `gspo_loss` and `cispo_loss` are the published forms. Any other is composed as
`policy_loss.RLLoss`, or by the flat `policy_loss`. What each computes, with its source: docs/reference/losses.md.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, Unpack, cast

from torch import Tensor

from rollouts.training.loss_terms import ClipRange, check_choice, k3, token_shares
from rollouts.training.policy_loss import (
    ClippedRatio,
    ClippedSequenceRatio,
    ClippedWeight,
    KLPenalty,
    PolicyGradient,
    PolicyInputs,
    PolicyTerm,
    RLLoss,
    Shares,
    ValueTerm,
    WeightedGradient,
)
from rollouts.training.policy_statistics import policy_statistics
from rollouts.training.token_selection import (
    Logits,
    chosen,
    select,
    token_log_probs,
    trained_sequences,
    trained_tokens,
)

__all__ = [
    "ClipRange",
    "Logits",
    "RLLoss",
    "cispo_loss",
    "grpo_loss",
    "gspo_loss",
    "is_log_prob_loss",
    "k3",
    "policy_loss",
    "policy_statistics",
    "ppo_loss",
    "reads_log_probs",
    "sft_loss",
    "token_log_probs",
    "trained_sequences",
    "trained_tokens",
]
LOSSES = ("grpo", "ppo", "gspo", "cispo")
LossFn = TypeVar("LossFn", bound=Callable[..., Tensor])


def reads_log_probs(loss_fn: LossFn) -> LossFn:
    """Mark a loss function that takes `TokenLogProbs` as its `logits`: a backend then makes no others."""
    loss_fn.reads_log_probs = True  # type: ignore[attr-defined]
    return loss_fn


def is_log_prob_loss(loss_fn: Callable[..., Any]) -> bool:
    """Return whether `loss_fn`, or the function under its `functools.partial`, is so marked."""
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    return getattr(loss_fn, "reads_log_probs", False)


@reads_log_probs
def sft_loss(
    logits: Logits, labels: Tensor, loss_mask: Tensor, *, tokens_global: float | None = None
) -> Tensor:
    """Mean negative log-likelihood of the trained tokens: a scalar.

    `logits` [B, T, V], `labels` [B, T] token ids, `loss_mask` [B, T] weights, 0 for what is not trained on.
    Raises ValueError for shapes that do not fit, or for a batch without a trained token and no `tokens_global`.
    """
    tokens = select(logits, labels, loss_mask, temperature=1.0)
    shares_BT = token_shares(loss_mask.to(tokens.log_probs_N.dtype), tokens_global=tokens_global)
    return -(chosen(shares_BT, tokens) * tokens.log_probs_N).sum()


class PolicySettings(PolicyInputs, total=False):
    """`policy_loss`'s options: the inputs of a batch, and flat settings of `RLLoss`."""

    loss: str  # "grpo", "ppo", "gspo", "cispo"
    clip_range: ClipRange  # 0.2
    dual_clip: float | None  # of "ppo" and "gspo"
    importance: str  # of "grpo": the kind of `importance_weights`; "none"
    importance_cap: float  # 2.0
    aggregation: str  # of `token_shares`; "token_mean"
    length_norm: float | None
    kl_coef: float  # 0: no penalty
    kl_kind: str  # "k3"
    entropy_coef: float  # 0: no bonus
    value_coef: float  # 0: no value model
    value_clip: float | None


@reads_log_probs
def policy_loss(
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    **options: Unpack[PolicySettings],
) -> Tensor:
    """Any of the RL losses, by flat options: a scalar.

    `loss`: "grpo" is `PolicyGradient`, with `importance` `WeightedGradient`; "ppo" is `ClippedRatio`, "gspo"
    `ClippedSequenceRatio`, "cispo" `ClippedWeight`. Raises ValueError for an unknown name, an option that the choice
    does not take, shapes that do not fit, or an input that the choice needs and the batch lacks.
    """
    unknown = sorted(set(options) - set(PolicySettings.__annotations__))
    if unknown:
        raise TypeError(f"policy_loss: unknown options {', '.join(unknown)}")
    inputs = {key: value for key, value in options.items() if key in PolicyInputs.__annotations__}
    return _composed(options)(logits, labels, loss_mask, advantages, **cast(PolicyInputs, inputs))


def _composed(options: PolicySettings) -> RLLoss:
    kl_coef, value_coef = options.get("kl_coef", 0.0), options.get("value_coef", 0.0)
    return RLLoss(
        policy=_policy_term(options),
        shares=Shares(options.get("aggregation", "token_mean"), options.get("length_norm")),
        kl=KLPenalty(kl_coef, options.get("kl_kind", "k3")) if kl_coef else None,
        entropy_coef=options.get("entropy_coef", 0.0),
        value=ValueTerm(value_coef, options.get("value_clip")) if value_coef else None,
    )


def _policy_term(options: PolicySettings) -> PolicyTerm:
    loss, importance, dual_clip = (
        options.get("loss", "grpo"),
        options.get("importance", "none"),
        options.get("dual_clip"),
    )
    check_choice("loss", loss, LOSSES)
    if importance != "none" and loss != "grpo":
        raise ValueError(
            f"importance={importance!r}: only for loss='grpo'; the ratio of {loss!r} is to the sampler"
        )
    if dual_clip is not None and loss not in ("ppo", "gspo"):
        raise ValueError(
            f"dual_clip={dual_clip}: only for loss='ppo' and 'gspo'; {loss!r} keeps what it clips"
        )
    clip_range = options.get("clip_range", 0.2)
    if loss == "ppo":
        return ClippedRatio(clip_range, dual_clip)
    if loss == "gspo":
        return ClippedSequenceRatio(clip_range, dual_clip)
    if loss == "cispo":
        return ClippedWeight(clip_range)
    cap = options.get("importance_cap", 2.0)
    return PolicyGradient() if importance == "none" else WeightedGradient(importance, cap)


@reads_log_probs
def grpo_loss(
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    *,
    tokens_global: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """On-policy policy gradient with group-relative advantages: a scalar, the mean of -A log p over trained tokens.

    GRPO (arXiv 2402.03300) for samples of the current policy, where its ratio is 1 and nothing is clipped, with the
    mean over all tokens of the step instead of 1/|o| per response (arXiv 2503.20783: no length bias).
    Inputs as in `policy_loss`.
    """
    loss = RLLoss(PolicyGradient())
    return loss(
        logits, labels, loss_mask, advantages, tokens_global=tokens_global, temperature=temperature
    )


@reads_log_probs
def ppo_loss(  # noqa: PLR0917 — the order users know; call it by keyword
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    clip_range: ClipRange = 0.2,
    *,
    tokens_global: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Clipped surrogate (PPO, arXiv 1707.06347 eq. 7), the mean over trained tokens: a scalar.

    -mean(min(ratio A, clip(ratio, 1 - low, 1 + high) A)). A pair (low, high) as `clip_range` is DAPO's clip-higher.
    Inputs as in `policy_loss`.
    """
    inputs = PolicyInputs(
        old_log_probs=old_log_probs, tokens_global=tokens_global, temperature=temperature
    )
    return RLLoss(ClippedRatio(clip_range))(logits, labels, loss_mask, advantages, **inputs)


@reads_log_probs
def gspo_loss(  # noqa: PLR0917 — the order of ppo_loss
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    clip_range: ClipRange = (3e-4, 4e-4),
    *,
    sequences_global: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """GSPO (arXiv 2507.18071 eq. 5): the clipped surrogate of each sequence's ratio, the mean over sequences.

    The ratio is the geometric mean of the tokens', so it stays near 1: the default range is the paper's (section 5.1).
    Inputs as in `policy_loss`.
    """
    loss = RLLoss(ClippedSequenceRatio(clip_range), Shares("sequence_mean_token_mean"))
    inputs = PolicyInputs(
        old_log_probs=old_log_probs, sequences_global=sequences_global, temperature=temperature
    )
    return loss(logits, labels, loss_mask, advantages, **inputs)


@reads_log_probs
def cispo_loss(  # noqa: PLR0917 — the order of ppo_loss
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    clip_range: ClipRange = (1.0, 4.0),
    *,
    tokens_global: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """CISPO (MiniMax-M1, arXiv 2506.13585 eq. 4): -clip(ratio) A log p, the mean over trained tokens.

    The clipped ratio is a constant weight, so that no token loses its gradient. low=1 disables the
    lower bound, as in the paper. Inputs as in `policy_loss`.
    """
    inputs = PolicyInputs(
        old_log_probs=old_log_probs, tokens_global=tokens_global, temperature=temperature
    )
    return RLLoss(ClippedWeight(clip_range))(logits, labels, loss_mask, advantages, **inputs)
