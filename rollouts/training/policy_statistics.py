"""What a step's metrics say about a policy beside its sampler and its reference: sums over the trained tokens.

B sequences, T tokens, V vocabulary entries. Inputs as in `rl_losses`.
"""

import torch
from torch import Tensor

from rollouts.training.loss_terms import ClipRange, k3, ratio_bounds
from rollouts.training.token_selection import Logits, aligned, select

STATISTICS = (
    "tokens",
    "entropy",
    "logp",
    "logp_diff_abs",
    "kl_sampler",
    "clip_fraction",
    "kl_reference",
)


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
    `clip_range`, and with `ref_log_probs` "kl_reference" = k3 estimate of KL(trainer || reference).
    """
    sums = policy_sums(
        logits,
        labels,
        loss_mask,
        old_log_probs,
        ref_log_probs,
        temperature=temperature,
        clip_range=clip_range,
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
    """Return the same in float64 on the device, in the order of STATISTICS."""
    tokens = select(logits, labels, loss_mask, temperature, with_entropy=True)
    log_probs_N = tokens.log_probs_N
    old_N = aligned("old_log_probs", old_log_probs, tokens, needed_by="policy_statistics")
    low, high = ratio_bounds(clip_range)
    ratio_N = torch.exp(log_probs_N - old_N)
    assert tokens.entropy_N is not None
    terms = [
        torch.ones_like(log_probs_N),
        tokens.entropy_N,
        log_probs_N,
        (log_probs_N - old_N).abs(),
        k3(old_N, log_probs_N),
        ((ratio_N < low) | (ratio_N > high)).to(log_probs_N.dtype),
    ]
    if ref_log_probs is not None:
        terms.append(k3(log_probs_N, aligned("ref_log_probs", ref_log_probs, tokens, needed_by="")))
    return torch.stack(terms).sum(1, dtype=torch.float64)
