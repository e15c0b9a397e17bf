"""The records that all of the library shares. Plain data: no torch, no I/O.

Tokens, mask, log-probs and weight version stay together from the engine on; no text is encoded again.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

REWARD_FAILURE = "reward_failure"  # in metadata: why a sample is not scorable, "reward_timeout" or "reward_death"
# text, or a row with "messages" and the columns that its reward needs
Prompt = str | dict[str, Any]


@dataclass
class Sample:
    """One prompt and the policy's response.

    `tokens` are the prompt's then the response's ids. `loss_mask` has one entry per token, 0.0 for tokens that are not
    trained on (the prompt, tool output). `rollout_log_probs` has one natural log-probability per *response* token, the
    sampler's at the sampling temperature; 0.0 where the token was not sampled. Both stay empty for text-only samples.
    """

    prompt: Prompt
    response: str = ""
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[float] = field(default_factory=list)
    reward: float | None = None
    rollout_log_probs: list[float] | None = None
    # "weight_version", "finish_reason", "answer", ...
    metadata: dict[str, Any] = field(default_factory=dict)
    response_length: int = 0  # tokens of the response, at the end of `tokens`

    def __post_init__(self) -> None:
        if len(self.loss_mask) != len(self.tokens):
            raise ValueError(
                f"Sample: {len(self.loss_mask)} entries in loss_mask for {len(self.tokens)} tokens"
            )
        if not 0 <= self.response_length <= len(self.tokens):
            raise ValueError(
                f"Sample: response_length={self.response_length} of {len(self.tokens)} tokens"
            )
        if (
            self.rollout_log_probs is not None
            and len(self.rollout_log_probs) != self.response_length
        ):
            raise ValueError(
                f"Sample: {len(self.rollout_log_probs)} rollout_log_probs for {self.response_length} response tokens"
            )


@dataclass
class RolloutBatch:
    """The groups kept for one optimizer step, flattened: the samples of a prompt in a row, in sampling order."""

    tokens: list[list[int]]
    loss_masks: list[list[float]]
    rewards: list[float]
    response_lengths: list[int]
    # counts: groups started, kept, dropped by which filter
    metadata: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    # one per sample: which prompt of this batch it answers
    group_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SFTTrainingConfig:
    num_steps: int
    batch_size: int  # examples per optimizer step, over all ranks
    log_every: int = 10
    checkpoint_every: int = -1  # -1: only after the last step
    micro_batch_size: int | None = (
        None  # examples per rank and forward pass; None: all of a step's at once
    )
    micro_batch_tokens: int | None = (
        None  # instead: tokens per rank and forward pass, filled with whole examples
    )


@dataclass(frozen=True)
class RLTrainingConfig:
    num_steps: int
    sync_every: int = 1  # optimizer steps between weight updates of the engines
    baseline: float | str = (
        0.0  # a constant, "group_mean", "leave_one_out", or "value": the backend's value head, GAE
    )
    log_every: int = 1
    checkpoint_every: int = -1
    advantage_norm: str = "none"  # or "group_std" or "batch": see `advantages`
    micro_batch_size: int | None = (
        None  # sequences per rank and forward pass; None: all of a step's at once
    )
    micro_batch_tokens: int | None = (
        None  # instead: tokens per rank and forward pass, filled with whole sequences
    )
    updates_per_batch: int = 1  # optimizer steps on each batch of rollouts
    gamma: float = 1.0  # of baseline "value": the discount of a reward that comes a token later
    gae_lambda: float = 0.95  # of baseline "value": 1: return minus value; 0: one-step TD error
    policy_lag_steps_max: int = (
        0  # how many steps generation may run ahead of training; 0: they take turns
    )
    in_flight_updates: bool = (
        False  # weights change under running requests; False: an update waits for those
    )


GenerateFn = Callable[..., list[Sample] | Awaitable[list[Sample]]]
RewardFn = Callable[[Sample], float | Awaitable[float | None] | None]  # None: not scorable
FilterFn = Callable[[list[Sample]], bool | Awaitable[bool]]


@dataclass(frozen=True)
class RolloutConfig:
    """The sizes and functions that make a batch of groups.

    `generate_fn(prompts)` gets one prompt's `n_samples_per_prompt` copies and returns as many Samples, in order;
    a `seed` keyword, where its signature has one, gets an int that is a function of the run's seed and the group.
    """

    batch_size: int  # groups (prompts) per batch
    n_samples_per_prompt: int = 1
    over_sampling_factor: float = 1.0
    generate_fn: GenerateFn | None = None
    reward_fn: RewardFn | None = None
    filter_fn: FilterFn | None = None
    retries_max: int = 8  # more rounds of generation when too few groups passed the filter
    seed: int = 0
