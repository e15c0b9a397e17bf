"""The RL loss and the loop's settings that the config describes."""

from rollouts.config import CISPO, GRPO, PPO, RLConfig, ValueModel
from rollouts.training.loss_terms import ClipRange
from rollouts.training.policy_loss import (
    ClippedRatio,
    ClippedSequenceRatio,
    ClippedWeight,
    KLPenalty,
    PolicyGradient,
    PolicyTerm,
    RLLoss,
    Shares,
    ValueTerm,
    WeightedGradient,
)
from rollouts.training.types import RLTrainingConfig


def rl_loss(rl: RLConfig) -> RLLoss:
    """Return the loss that the config describes: a function of logits and a batch's keys."""
    value = rl.baseline if isinstance(rl.baseline, ValueModel) else None
    return RLLoss(
        policy=_policy_term(rl),
        shares=Shares(rl.loss.aggregation, length_norm=rl.max_new_tokens),
        kl=None if rl.kl is None else KLPenalty(rl.kl.coef, rl.kl.kind),
        entropy_coef=rl.loss.entropy_coef,
        value=None if value is None else ValueTerm(value.coef, value.clip),
    )


def _policy_term(rl: RLConfig) -> PolicyTerm:
    loss = rl.loss
    if isinstance(loss, GRPO):
        weights = loss.importance
        return PolicyGradient() if weights is None else WeightedGradient(weights.kind, weights.cap)
    clip_range = (loss.clip_low, loss.clip_high)
    if isinstance(loss, CISPO):
        return ClippedWeight(clip_range)
    return (ClippedRatio if isinstance(loss, PPO) else ClippedSequenceRatio)(
        clip_range, loss.dual_clip
    )


def batch_clip_range(rl: RLConfig) -> ClipRange | None:
    """Return the range that each batch carries, by which the backend counts clipped tokens; None: it counts none.

    GRPO has no range, and GSPO's bounds the ratio of a sequence, not of a token: docs/reference/losses.md.
    """
    return (rl.loss.clip_low, rl.loss.clip_high) if isinstance(rl.loss, PPO | CISPO) else None


def rl_training_config(rl: RLConfig, num_steps: int) -> RLTrainingConfig:
    """Return the settings of the RL loop."""
    value = rl.baseline if isinstance(rl.baseline, ValueModel) else None
    gae = {"gamma": value.gamma, "gae_lambda": value.gae_lambda} if value is not None else {}
    return RLTrainingConfig(
        num_steps=num_steps,
        sync_every=rl.sampling.sync_every,
        policy_lag_steps_max=rl.policy_lag_steps_max,
        in_flight_updates=rl.in_flight_updates,
        baseline="value" if isinstance(rl.baseline, ValueModel) else rl.baseline,
        log_every=rl.log_every,
        checkpoint_every=rl.save_every,
        advantage_norm=rl.loss.advantage_norm,
        micro_batch_size=rl.batch_size,
        micro_batch_tokens=None if rl.micro_batch_tokens == -1 else rl.micro_batch_tokens,
        updates_per_batch=rl.loss.updates_per_batch,
        **gae,
    )
