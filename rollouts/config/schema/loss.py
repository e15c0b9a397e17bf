"""What RL minimises: the policy's loss, what is subtracted from rewards, the penalty for leaving a reference."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class _PolicyLoss:
    """What every loss has. docs/reference/losses.md: all methods, and how to set them."""

    advantage_norm: Literal[
        "none", "group_std", "batch"
    ]  # what advantages are divided by; batch: standardised over it
    aggregation: Literal[
        "token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "constant_length"
    ]  # how token losses become one: docs/reference/losses.md
    entropy_coef: float  # of a bonus for the policy's entropy; 0: none


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """Weights for samples of older or other weights than those in training: TIS and MIS."""

    kind: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ]  # what the ratio is of, and what happens above cap
    cap: float  # the ratio to the sampler above which a token or a sequence is truncated or masked


@dataclass(frozen=True, kw_only=True)
class GRPO(_PolicyLoss):
    """Advantage times log-probability; every sample is taken as on-policy, or weighted by `importance`."""

    kind: ClassVar[Literal["grpo"]] = "grpo"
    updates_per_batch: ClassVar[int] = 1  # nothing bounds the ratio
    dual_clip: ClassVar[None] = None

    importance: ImportanceConfig | None  # None: samples count as on-policy


@dataclass(frozen=True, kw_only=True)
class _ClippedLoss(_PolicyLoss):
    """A loss with the ratio to the sampler in it, held within bounds."""

    importance: ClassVar[None] = None  # the ratio is in the loss already

    clip_low: float  # the ratio is held above 1 - clip_low; 1: no lower bound
    clip_high: float  # and below 1 + clip_high
    updates_per_batch: int  # optimizer steps on each batch of rollouts


@dataclass(frozen=True, kw_only=True)
class PPO(_ClippedLoss):
    """The ratio of each token."""

    kind: ClassVar[Literal["ppo"]] = "ppo"

    # where the advantage is negative the ratio counts at most this much; None: no bound
    dual_clip: float | None


@dataclass(frozen=True, kw_only=True)
class GSPO(_ClippedLoss):
    """The ratio of a whole sequence."""

    kind: ClassVar[Literal["gspo"]] = "gspo"

    # where the advantage is negative the ratio counts at most this much; None: no bound
    dual_clip: float | None


@dataclass(frozen=True, kw_only=True)
class CISPO(_ClippedLoss):
    """The clipped ratio of each token as a constant weight."""

    kind: ClassVar[Literal["cispo"]] = "cispo"
    dual_clip: ClassVar[None] = None


@dataclass(frozen=True, kw_only=True)
class ValueModel:
    """A value head on the policy; advantages of tokens by generalised advantage estimation (GAE)."""

    gamma: float  # discount of what comes a token later
    gae_lambda: float  # 1: return minus value; 0: one-step TD error
    coef: float  # of the value head's squared error in the loss
    clip: float | None  # how far a value may move from before the batch; None: anywhere
    lr: float  # the head's own learning rate


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """A penalty for leaving a frozen reference model."""

    coef: float  # the penalty's weight in the loss
    kind: Literal["k1", "k2", "k3"]  # which estimate of the divergence is the loss's term
    # hub id or directory on the host; None: the model that the run's rl stage started from
    reference: str | None
