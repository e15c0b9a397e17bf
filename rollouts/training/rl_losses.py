"""Losses and policy statistics: tensors in, tensors out. No model, optimizer, I/O or config.

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

`policy_loss` is every RL loss; `grpo_loss`, `ppo_loss`, `gspo_loss` and `cispo_loss` are its plain forms. What each
computes, with its source: docs/reference/losses.md.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from rollouts.training.log_probs import TokenLogProbs, selected_log_probs
from rollouts.training.loss_terms import (
    ClipRange,
    check_choice,
    clipped_surrogate,
    held_exp,
    importance_weights,
    k1,
    k2,
    k3,
    ratio_bounds,
    sequence_mean,
    spread,
    take,
    token_shares,
    value_loss,
)

LOSSES = ("grpo", "ppo", "gspo", "cispo")
KL_KINDS = {"k1": k1, "k2": k2, "k3": k3}

Logits = Tensor | TokenLogProbs
LossFn = TypeVar("LossFn", bound=Callable[..., Tensor])


def reads_log_probs(loss_fn: LossFn) -> LossFn:
    """Mark a loss function that takes `TokenLogProbs` as its `logits`: a backend then makes no others."""
    loss_fn.reads_log_probs = True  # type: ignore[attr-defined]
    return loss_fn


def is_log_prob_loss(loss_fn: Callable[..., Any]) -> bool:
    """Whether `loss_fn`, or the function under its `functools.partial`, is so marked."""
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    return getattr(loss_fn, "reads_log_probs", False)


@reads_log_probs
def sft_loss(logits: Logits, labels: Tensor, loss_mask: Tensor, *, tokens_global: float | None = None) -> Tensor:
    """Mean negative log-likelihood of the trained tokens: a scalar.

    `logits` [B, T, V], `labels` [B, T] token ids, `loss_mask` [B, T] weights, 0 for what is not trained on.
    Raises ValueError for shapes that do not fit, or for a batch without a trained token and no `tokens_global`.
    """
    tokens = _trained(logits, labels, loss_mask, temperature=1.0)
    shares_BT = token_shares(loss_mask.to(tokens.log_probs_N.dtype), tokens_global=tokens_global)
    return -(_chosen(shares_BT, tokens) * tokens.log_probs_N).sum()


@reads_log_probs
def policy_loss(
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    loss: str = "grpo",
    clip_range: ClipRange = 0.2,
    dual_clip: float | None = None,
    importance: str = "none",
    importance_cap: float = 2.0,
    aggregation: str = "token_mean",
    length_norm: float | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy_coef: float = 0.0,
    returns: Tensor | None = None,
    old_values: Tensor | None = None,
    value_coef: float = 0.0,
    value_clip: float | None = None,
    tokens_global: float | None = None,
    sequences_global: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Any of the RL losses: a scalar, sum over trained tokens of share x (policy + kl_coef KL - entropy_coef entropy).

    `advantages` [B], one per sequence, or [B, T], one per token. `old_log_probs` [B, T], the sampler's, and
    `ref_log_probs` [B, T], a frozen reference model's, are aligned to tokens (entry t is the log-prob of token t), both
    at `temperature`, the sampler's, which divides the logits. The ratio is p / p_old. Others as in `sft_loss`.

    `loss`: "grpo" is -A log p, the gradient of an on-policy step; `importance` corrects it for a sampler that differs.
    "ppo" is `clipped_surrogate` of each token's ratio, with `dual_clip`; "gspo" is that of the sequence's ratio, the
    geometric mean of its tokens'; "cispo" is -clip(ratio) A log p with no gradient through the clipped ratio.
    `importance`, `importance_cap`: `importance_weights`. `aggregation`, `length_norm`: the shares, `token_shares`.
    `kl_kind`: which estimate of KL(p || reference), as a term of the loss: `k1`, `k2`, `k3`.
    `value_coef`: adds that times the token mean of `value_loss` of the value head's values (in `logits`, from a backend
    that has a head) towards `returns` [B, T], with `value_clip` held near `old_values` [B, T]. All aligned to tokens.
    Raises ValueError for an unknown name, shapes that do not fit, or an input that the choice needs and is not there.
    """
    _check_combination(loss, importance, dual_clip)
    tokens = _trained(logits, labels, loss_mask, temperature, with_entropy=entropy_coef != 0)
    dtype, mask = tokens.log_probs_N.dtype, loss_mask.to(tokens.log_probs_N.dtype)
    advantages_N = _per_token(advantages, tokens, dtype)
    if loss == "grpo" and importance == "none":
        terms_N = -advantages_N * tokens.log_probs_N
    else:
        old_N = _aligned("old_log_probs", old_log_probs, labels, tokens, needed_by=f"loss={loss!r}").to(dtype)
        log_ratio_N = tokens.log_probs_N - old_N
        if loss in ("ppo", "gspo"):
            if loss == "gspo":
                log_ratio_N = sequence_mean(log_ratio_N, tokens.keep, mask[:, 1:], tokens.places)
            terms_N = -clipped_surrogate(held_exp(log_ratio_N), advantages_N, clip_range, dual_clip)
        else:
            if loss == "cispo":
                constants_N = held_exp(log_ratio_N).clamp(*ratio_bounds(clip_range)).detach()
            else:
                constants_N = importance_weights(log_ratio_N, tokens.keep, importance, importance_cap, tokens.places)
            terms_N = -constants_N * advantages_N * tokens.log_probs_N
    if kl_coef:
        check_choice("kl_kind", kl_kind, KL_KINDS)
        ref_N = _aligned("ref_log_probs", ref_log_probs, labels, tokens, needed_by=f"kl_coef={kl_coef}").to(dtype)
        terms_N = terms_N + kl_coef * KL_KINDS[kl_kind](tokens.log_probs_N, ref_N)
    if entropy_coef:
        assert tokens.entropy_N is not None
        terms_N = terms_N - entropy_coef * tokens.entropy_N
    shares_BT = token_shares(
        mask,
        aggregation,
        tokens_global=tokens_global,
        sequences_global=sequences_global,
        length_norm=length_norm,
    )
    policy = (_chosen(shares_BT, tokens) * terms_N).sum()
    if not value_coef:
        return policy
    values_N = _value_terms(tokens, labels, returns, old_values, value_clip)
    mean_BT = token_shares(mask, tokens_global=tokens_global)
    return policy + value_coef * (_chosen(mean_BT, tokens) * values_N).sum()


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
    return policy_loss(
        logits, labels, loss_mask, advantages, loss="grpo", tokens_global=tokens_global, temperature=temperature
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
    return policy_loss(
        logits,
        labels,
        loss_mask,
        advantages,
        old_log_probs=old_log_probs,
        loss="ppo",
        clip_range=clip_range,
        tokens_global=tokens_global,
        temperature=temperature,
    )


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
    return policy_loss(
        logits,
        labels,
        loss_mask,
        advantages,
        old_log_probs=old_log_probs,
        loss="gspo",
        clip_range=clip_range,
        aggregation="sequence_mean_token_mean",
        sequences_global=sequences_global,
        temperature=temperature,
    )


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

    The clipped ratio is a constant weight, so that no token loses its gradient. A low of 1 is no lower bound, as
    published. Inputs as in `policy_loss`.
    """
    return policy_loss(
        logits,
        labels,
        loss_mask,
        advantages,
        old_log_probs=old_log_probs,
        loss="cispo",
        clip_range=clip_range,
        tokens_global=tokens_global,
        temperature=temperature,
    )


def trained_tokens(loss_mask: Tensor) -> float:
    """The summed weight of the tokens of `loss_mask` [B, T] that a loss trains on: all but position 0."""
    return float(loss_mask[:, 1:].sum(dtype=torch.float64))


def trained_sequences(loss_mask: Tensor) -> float:
    """How many rows of `loss_mask` [B, T] have a token that a loss trains on."""
    return float((loss_mask[:, 1:] != 0).any(1).sum())


@torch.no_grad()
def token_log_probs(logits: Logits, labels: Tensor, loss_mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probs [B, T] of the trained tokens, aligned to tokens, 0 elsewhere; no gradient: for a reference model."""
    tokens = _trained(logits, labels, loss_mask, temperature)
    log_probs = tokens.log_probs_N.new_zeros(labels.shape)
    log_probs[:, 1:] = spread(tokens.log_probs_N, tokens.keep, tokens.places)
    return log_probs


STATISTICS = ("tokens", "entropy", "logp", "logp_diff_abs", "kl_sampler", "clip_fraction", "kl_reference")


def policy_statistics(
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor | None = None,
    *,
    temperature: float = 1.0,
    clip_range: ClipRange = 0.2,
) -> dict[str, float]:
    """Sums over the trained tokens, so that micro-batches and ranks add up; divide by "tokens" for the mean.

    "tokens" (a count), "entropy" of the policy (nats), "logp" of the sampled tokens, "logp_diff_abs" = |log p - log
    p_old|, "kl_sampler" = k3 estimate of KL(sampler || trainer), "clip_fraction" = tokens whose ratio lies outside
    `clip_range`, and with `ref_log_probs` "kl_reference" = k3 estimate of KL(trainer || reference). Inputs as in
    `policy_loss`.
    """
    sums = policy_sums(
        logits, labels, loss_mask, old_log_probs, ref_log_probs, temperature=temperature, clip_range=clip_range
    ).tolist()
    return dict(zip(STATISTICS, sums, strict=False))  # without a reference there is one term less


@torch.no_grad()
def policy_sums(
    logits: Logits,
    labels: Tensor,
    loss_mask: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor | None = None,
    *,
    temperature: float = 1.0,
    clip_range: ClipRange = 0.2,
) -> Tensor:
    """What `policy_statistics` gives, in float64 on the device, in the order of STATISTICS."""
    tokens = _trained(logits, labels, loss_mask, temperature, with_entropy=True)
    log_probs_N, dtype = tokens.log_probs_N, tokens.log_probs_N.dtype
    old_N = _aligned("old_log_probs", old_log_probs, labels, tokens, needed_by="policy_statistics").to(dtype)
    low, high = ratio_bounds(clip_range)
    ratio_N = torch.exp(log_probs_N - old_N)
    assert tokens.entropy_N is not None
    terms = [
        torch.ones_like(log_probs_N),
        tokens.entropy_N,
        log_probs_N,
        (log_probs_N - old_N).abs(),
        k3(old_N, log_probs_N),
        ((ratio_N < low) | (ratio_N > high)).to(dtype),
    ]
    if ref_log_probs is not None:
        ref_N = _aligned("ref_log_probs", ref_log_probs, labels, tokens, needed_by="").to(dtype)
        terms.append(k3(log_probs_N, ref_N))
    return torch.stack(terms).sum(1, dtype=torch.float64)


def _trained(
    logits: Logits, labels: Tensor, loss_mask: Tensor, temperature: float, *, with_entropy: bool = False
) -> TokenLogProbs:
    if isinstance(logits, TokenLogProbs):
        if logits.temperature != temperature or (with_entropy and logits.entropy_N is None):
            raise ValueError(
                f"log-probs at temperature={logits.temperature} with entropy: {logits.entropy_N is not None}; the "
                f"loss needs temperature={temperature} with entropy: {with_entropy}"
            )
        return logits
    if logits.ndim != 3 or logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)}: needs [B, T, V] with T >= 2, else nothing is predicted")
    _check_shape("labels", labels, logits.shape[:2])
    _check_shape("loss_mask", loss_mask, logits.shape[:2])
    keep = loss_mask[:, 1:] != 0
    places = keep.flatten().nonzero().squeeze(1)
    return of_logits(logits, labels, keep, places, temperature=temperature, with_entropy=with_entropy)


def of_logits(
    logits: Tensor, labels: Tensor, keep: Tensor, places: Tensor, *, temperature: float, with_entropy: bool
) -> TokenLogProbs:
    """Log-probs of the tokens at `places` of `keep` [B, T-1], flattened, from logits [B, T, V]."""
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


def _check_combination(loss: str, importance: str, dual_clip: float | None) -> None:
    check_choice("loss", loss, LOSSES)
    if importance != "none" and loss != "grpo":
        raise ValueError(f"importance={importance!r}: only for loss='grpo'; the ratio of {loss!r} is to the sampler")
    if dual_clip is not None and loss not in ("ppo", "gspo"):
        raise ValueError(f"dual_clip={dual_clip}: only for loss='ppo' and 'gspo'; {loss!r} clips nothing that it holds")


def _value_terms(
    tokens: TokenLogProbs, labels: Tensor, returns: Tensor | None, old_values: Tensor | None, clip: float | None
) -> Tensor:
    if tokens.values_N is None:
        raise ValueError("value_coef: needs values, of a backend with a value head; these logits have none")
    dtype = tokens.values_N.dtype
    returns_N = _aligned("returns", returns, labels, tokens, needed_by="value_coef").to(dtype)
    old_N = None
    if clip is not None:
        old_N = _aligned("old_values", old_values, labels, tokens, needed_by="value_clip").to(dtype)
    return value_loss(tokens.values_N, returns_N, old_N, clip)


def _per_token(advantages: Tensor, tokens: TokenLogProbs, dtype: torch.dtype) -> Tensor:
    rows, columns = tokens.keep.shape
    if advantages.ndim == 2:
        _check_shape("advantages", advantages, torch.Size((rows, columns + 1)))
        return _chosen(advantages, tokens).to(dtype)
    _check_shape("advantages", advantages, tokens.keep.shape[:1])
    return take(advantages[:, None].expand(rows, columns), tokens.keep, tokens.places).to(dtype)


def _aligned(name: str, values: Tensor | None, labels: Tensor, tokens: TokenLogProbs, *, needed_by: str) -> Tensor:
    if values is None:
        raise ValueError(f"{name}=None: {needed_by} needs them, [B, T] aligned to tokens")
    _check_shape(name, values, labels.shape)
    return _chosen(values, tokens)


def _chosen(values_BT: Tensor, tokens: TokenLogProbs) -> Tensor:
    """The trained tokens' [N] of values aligned to tokens."""
    return take(values_BT[:, 1:], tokens.keep, tokens.places)


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} {tuple(tensor.shape)}: needs {tuple(shape)} to fit logits [B, T, V]")
