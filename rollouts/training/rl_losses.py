"""Losses and policy statistics: tensors in, tensors out. No model, optimizer, I/O or config.

B sequences, T tokens, V vocabulary entries, N trained tokens. Log-probabilities are natural logs, taken in float32
(float64 when the logits are). Every function does the next-token shift itself: `labels[:, t]` is the token at position
t, predicted by `logits[:, t - 1]`; `loss_mask[:, t]` and `old_log_probs[:, t]` belong to that token too. Position 0 is
predicted by nothing and never counts.

Only trained positions are ever read: they are selected before the softmax, so padding may hold inf or NaN without
touching the loss or its gradient, and nothing of size [B, T, V] is upcast.

`tokens_global` is the number of trained tokens of the whole optimizer step, over all micro-batches and ranks
(`trained_tokens`). Each loss divides by it once, so that the losses and gradients of micro-batches add up to the same
step however it was cut. None: this batch is the whole step.
"""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**24  # statistics look at this many logits at a time: 64 MiB in float32


def sft_loss(logits: Tensor, labels: Tensor, loss_mask: Tensor, *, tokens_global: float | None = None) -> Tensor:
    """Mean negative log-likelihood of the trained tokens: a scalar.

    `logits` [B, T, V], `labels` [B, T] token ids, `loss_mask` [B, T] weights, 0 for what is not trained on.
    Raises ValueError for shapes that do not fit, or for a batch without a trained token and no `tokens_global`.
    """
    _, weights_N, log_probs_N = _trained_log_probs(logits, labels, loss_mask, temperature=1.0)
    return -(weights_N * log_probs_N).sum() / _denominator(weights_N, tokens_global)


def grpo_loss(
    logits: Tensor,
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
    `advantages` [B], one per sequence; the other inputs as in `sft_loss`. `temperature` is the sampler's: it divides
    the logits, so that the log-probs are those of the distribution that was sampled from.
    """
    keep, weights_N, log_probs_N = _trained_log_probs(logits, labels, loss_mask, temperature)
    advantages_N = _per_token(advantages, keep, log_probs_N.dtype)
    return -(weights_N * advantages_N * log_probs_N).sum() / _denominator(weights_N, tokens_global)


def ppo_loss(  # noqa: PLR0917 — the order users know; call it by keyword
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    clip_range: float = 0.2,
    *,
    tokens_global: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Clipped surrogate (PPO, arXiv 1707.06347 eq. 7) per trained token: a scalar.

    `old_log_probs` [B, T] are the sampler's, aligned to tokens (entry t is the log-prob of token t), at `temperature`.
    The ratio is p / p_old, and the loss -mean(min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A)).
    The other inputs as in `grpo_loss`.
    """
    keep, weights_N, log_probs_N = _trained_log_probs(logits, labels, loss_mask, temperature)
    _check_shape("old_log_probs", old_log_probs, labels.shape)
    advantages_N = _per_token(advantages, keep, log_probs_N.dtype)
    ratio_N = torch.exp(log_probs_N - old_log_probs[:, 1:][keep].to(log_probs_N.dtype))
    clipped_N = ratio_N.clamp(1 - clip_range, 1 + clip_range)
    surrogate_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    return -(weights_N * surrogate_N).sum() / _denominator(weights_N, tokens_global)


def trained_tokens(loss_mask: Tensor) -> float:
    """The summed weight of the tokens of `loss_mask` [B, T] that a loss trains on: all but position 0."""
    return float(loss_mask[:, 1:].sum(dtype=torch.float64))


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """The estimate r - 1 - log r of KL(p || reference) for tokens drawn from p, with r = reference / p; elementwise.

    Unbiased and never negative (Schulman, "Approximating KL divergence", k3). Exactly 0 where both agree.
    """
    log_ratio = reference_log_probs - log_probs
    return torch.expm1(log_ratio) - log_ratio


STATISTICS = ("tokens", "entropy", "logp", "logp_diff_abs", "kl_sampler", "clip_fraction")


@torch.no_grad()
def policy_statistics(
    logits: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    old_log_probs: Tensor,
    *,
    temperature: float = 1.0,
    clip_range: float = 0.2,
) -> dict[str, float]:
    """Sums over the trained tokens, so that micro-batches and ranks add up; divide by "tokens" for the mean.

    "tokens" (a count), "entropy" of the policy (nats), "logp" of the sampled tokens, "logp_diff_abs" = |log p - log
    p_old|, "kl_sampler" = k3 estimate of KL(sampler || trainer), "clip_fraction" = tokens whose ratio lies outside
    1 ± clip_range. Inputs as in `ppo_loss`. Works through the tokens in chunks: no second [N, V] in float32.
    """
    _check_shape("old_log_probs", old_log_probs, labels.shape)
    keep, _, positions_N = _trained_positions(logits, labels, loss_mask)
    old_N, targets_N = old_log_probs[:, 1:][keep], labels[:, 1:][keep]
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    sums = torch.zeros(len(STATISTICS), dtype=torch.float64)
    for start in range(0, len(positions_N), chunk):
        part = slice(start, start + chunk)
        log_probs_NV = _log_softmax(logits.flatten(0, 1).index_select(0, positions_N[part]), temperature)
        log_probs_n = log_probs_NV.gather(-1, targets_N[part, None]).squeeze(-1)
        old_n = old_N[part].to(log_probs_n.dtype)
        ratio_n = torch.exp(log_probs_n - old_n)
        terms = (
            torch.ones_like(log_probs_n),
            torch.special.entr(log_probs_NV.exp()).sum(-1),  # 0 where p = 0, unlike -p log p
            log_probs_n,
            (log_probs_n - old_n).abs(),
            k3(old_n, log_probs_n),
            ((ratio_n - 1).abs() > clip_range).to(log_probs_n.dtype),
        )
        sums += torch.stack([term.sum() for term in terms]).double().cpu()
    return dict(zip(STATISTICS, sums.tolist(), strict=True))


def _trained_positions(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """keep [B, T-1] bool, and for each trained token its weight [N] and where its logits stand among the B x T."""
    if logits.ndim != 3 or logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)}: needs [B, T, V] with T >= 2, else nothing is predicted")
    _check_shape("labels", labels, logits.shape[:2])
    _check_shape("loss_mask", loss_mask, logits.shape[:2])
    keep = loss_mask[:, 1:] != 0
    rows, columns = keep.nonzero(as_tuple=True)
    return keep, loss_mask[:, 1:][keep], rows * logits.shape[1] + columns


def _trained_log_probs(
    logits: Tensor, labels: Tensor, loss_mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """keep [B, T-1] bool, weights [N] and log-probs [N] of the trained tokens."""
    keep, weights_N, positions_N = _trained_positions(logits, labels, loss_mask)
    log_probs_NV = _log_softmax(logits.flatten(0, 1).index_select(0, positions_N), temperature)
    log_probs_N = log_probs_NV.gather(-1, labels[:, 1:][keep, None]).squeeze(-1)
    return keep, weights_N.to(log_probs_N.dtype), log_probs_N


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    dtype = torch.float64 if logits_NV.dtype is torch.float64 else torch.float32
    if temperature == 1.0:
        return torch.log_softmax(logits_NV, -1, dtype=dtype)
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: needs > 0; greedy samples have no distribution to learn from")
    return torch.log_softmax(logits_NV.to(dtype) / temperature, -1)


def _per_token(advantages: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    _check_shape("advantages", advantages, keep.shape[:1])
    return advantages[:, None].expand(keep.shape)[keep].to(dtype)


def _denominator(weights_N: Tensor, tokens_global: float | None) -> float | Tensor:
    if tokens_global is None:
        if not len(weights_N):
            raise ValueError("loss_mask has no trained token after position 0, so the mean over them does not exist")
        return weights_N.sum()
    if tokens_global <= 0:
        raise ValueError(f"tokens_global={tokens_global}: needs > 0, the trained tokens of the optimizer step")
    return tokens_global


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} {tuple(tensor.shape)}: needs {tuple(shape)} to fit logits [B, T, V]")
