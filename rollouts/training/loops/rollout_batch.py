"""From a step's rollouts to the batch that it trains on: advantages, the sampler's log-probs, aligned to tokens.

B sequences, T tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rollouts.training.advantages import compute_advantages
from rollouts.training.loops.batching import collate, pad
from rollouts.training.rewards.reward_fn import RewardError
from rollouts.training.rl_losses import ClipRange, trained_sequences
from rollouts.training.seams import Batch
from rollouts.training.types import RLTrainingConfig, RolloutBatch, Sample

REWARD_MAX = 1e30  # sums and squares of a step's advantages stay within float32's range of 3e38


@dataclass(frozen=True)
class BatchOptions:
    """What a batch of rollouts is prepared with, beside the loop's config."""

    pad_token_id: int = 0
    temperature: float = 1.0  # the sampler's, by which the losses divide the logits
    clip_range: ClipRange | None = None  # for losses, and statistics, that take one


def prepare_grpo_batch(
    batch: RolloutBatch,
    rewards: Sequence[float],
    config: RLTrainingConfig,
    *,
    pad_token_id: int = 0,
    temperature: float = 1.0,
    clip_range: ClipRange | None = None,
) -> Batch:
    """Return the whole step's batch: `collate`'s keys, "sequences_global", "advantages" [B] and "temperature".

    Where they are known it also has "clip_range", and "old_log_probs" [B, T], the sampler's, aligned to tokens (0
    outside the response). With baseline "value" it has "rewards" [B] in place of advantages: those take the value
    head's estimates. Raises ValueError when the parts of `batch` do not fit each other, or nothing in it is trained on.
    """
    counts = {
        "tokens": len(batch.tokens),
        "loss_masks": len(batch.loss_masks),
        "rewards": len(rewards),
    }
    if len(set(counts.values())) != 1 or not batch.tokens:
        raise ValueError(
            f"rollout batch: needs one of each per sample, and at least one; it has {counts}"
        )
    prepared = collate(batch.tokens, batch.loss_masks, pad_token_id=pad_token_id)
    if not prepared["tokens_global"]:
        raise ValueError(
            f"rollout batch: no trained token in {len(batch.tokens)} samples: were all responses empty?"
        )
    _check_rewards(rewards, batch.samples)
    prepared["temperature"] = temperature
    prepared |= _scores(rewards, batch.group_ids or None, config)
    prepared["sequences_global"] = trained_sequences(prepared["loss_mask"])
    known = [sample.rollout_log_probs is not None for sample in batch.samples]
    if any(known):
        if not all(known) or len(known) != len(batch.tokens):
            raise ValueError(
                f"rollout batch: {sum(known)} of {len(batch.tokens)} samples have rollout_log_probs"
            )
        prepared["old_log_probs"] = _aligned_log_probs(
            batch.samples, prepared["input_ids"].shape[1]
        )
    if clip_range is not None:
        prepared["clip_range"] = clip_range
    return prepared


def _check_rewards(rewards: Sequence[float], samples: Sequence[Sample]) -> None:
    """Raise RewardError, naming the prompt, for a reward that float32 cannot hold: losses are computed in it."""
    for place, reward in enumerate(rewards):
        if not abs(reward) <= REWARD_MAX:  # NaN is not either
            sample = samples[place] if place < len(samples) else Sample(prompt=f"of sample {place}")
            raise RewardError(
                f"reward {reward} of {sample.response[:80]!r}: needs a magnitude of {REWARD_MAX:g} at most (prompt "
                f"{str(sample.prompt)[:200]})"
            )


def _scores(
    rewards: Sequence[float], group_ids: Sequence[int] | None, config: RLTrainingConfig
) -> Batch:
    if config.baseline == "value":
        return {"rewards": torch.tensor(rewards, dtype=torch.float32)}
    advantages = compute_advantages(
        rewards, config.baseline, group_ids=group_ids, norm=config.advantage_norm
    )
    return {"advantages": torch.tensor(advantages, dtype=torch.float32)}


def _aligned_log_probs(samples: Sequence[Sample], width: int) -> torch.Tensor:
    rows = [
        [0.0] * (len(s.tokens) - s.response_length) + list(s.rollout_log_probs or ())
        for s in samples
    ]
    return pad(rows, width, 0.0, torch.float32)
