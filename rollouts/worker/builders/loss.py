"""The RL loss and the loop's settings that the config describes."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from rollouts.config import CISPO, GRPO, PPO, RLConfig, ValueModel
from rollouts.training.rl_losses import ClipRange, policy_loss
from rollouts.training.types import RLTrainingConfig


def rl_loss(rl: RLConfig) -> Callable[..., Tensor]:
    """Return the loss that the config describes: a function of logits and a batch's keys."""
    loss, options = rl.loss, dict[str, Any]()
    if not isinstance(loss, GRPO):
        options |= {"clip_range": (loss.clip_low, loss.clip_high), "dual_clip": loss.dual_clip}
    elif loss.importance is not None:
        options |= {"importance": loss.importance.kind, "importance_cap": loss.importance.cap}
    if rl.kl is not None:
        options |= {"kl_coef": rl.kl.coef, "kl_kind": rl.kl.kind}
    if isinstance(rl.baseline, ValueModel):
        options |= {"value_coef": rl.baseline.coef, "value_clip": rl.baseline.clip}
    return partial(
        policy_loss,
        loss=loss.kind,
        aggregation=loss.aggregation,
        length_norm=rl.max_new_tokens,
        entropy_coef=loss.entropy_coef,
        **options,
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
