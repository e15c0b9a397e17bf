"""Reinforcement learning: sampling, rewards, loss, and how far generation may run ahead."""

from dataclasses import dataclass
from typing import Literal

from rollouts.config.schema.loss import CISPO, GRPO, GSPO, PPO, KLConfig, ValueModel
from rollouts.config.schema.optimizer import OptimizerConfig

ENGINE_SOURCES = (
    "engine",
    "engine_only",
)  # sampling.source where rollouts come from an engine, not from a file


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Rollouts of several turns in an environment with tools. docs/reference/agents.md."""

    environment: str  # dotted path of a class, or of a function without arguments that makes one
    tool_format: Literal[
        "hermes", "json"
    ]  # how the model writes its calls: <tool_call>, or all of a turn one object
    turns_max: int  # of the policy
    tokens_max: int  # of a whole episode, prompt included
    timeout_s: float  # of a whole episode


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a sample earns. docs/reference/rewards.md."""

    fn: str  # dotted path of a function: Sample -> float, or None for not scorable
    workers: int  # processes that a plain function runs in; 0: the trainer's, where none is cut off


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Where rollouts come from, and which are kept."""

    source: str  # "engine": sample and train; "engine_only": sample and score alone; or a rollouts.jsonl to train on
    seed: int  # of prompt order and sampling
    sync_every: int  # optimizer steps between weight updates of the engine
    filter_fn: str | None  # dotted path of a function: list[Sample] of one group -> keep it?
    over_sampling_factor: float  # groups started per group needed
    retries_max: int  # more rounds of generation where too few groups were left


@dataclass(frozen=True, kw_only=True)
class AheadConfig:
    """Generation that runs ahead of training. docs/design/asynchronous.md."""

    policy_lag_steps_max: int  # how many optimizer steps ahead, at most
    # weights change under running requests, which go on; False: they are waited for
    in_flight_updates: bool


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning: what is sampled, how it is rewarded, and how it is trained on."""

    num_epochs: int  # steps = prompts * num_epochs // examples_per_step; of saved rollouts, their steps * num_epochs
    examples_per_step: int  # prompts per optimizer step
    num_samples: int  # per prompt; one sample has no baseline
    batch_size: int  # sequences per rank and forward pass, where micro_batch_tokens is -1
    micro_batch_tokens: int  # tokens per rank and forward pass, filled best-fit with whole sequences; -1: batch_size
    max_new_tokens: int  # of an answer; of a turn with rl.agent
    temperature: float  # of sampling; log-probs of the loss use the same
    top_k: int  # sample among the k likeliest tokens; -1: all
    unembedding_lr: float  # learning rate of the output head
    embedding_lr: float  # learning rate of the token embeddings
    matrix_lr: float  # learning rate of all other weights, and of LoRA adapters
    weight_decay: float  # decoupled; norms and biases have none
    init_lr_frac: float  # factor on all learning rates
    optimizer: OptimizerConfig  # its constants and its schedule
    eval_every: int  # steps between exact-match evaluations; -1: only before and after the stage
    # rows of eval_mixture in those; -1: all. The ones before and after always take all
    eval_examples: int
    save_every: int  # steps; -1: only after the last step
    log_every: int  # steps between lines of metrics.jsonl
    baseline: (
        float | Literal["group_mean", "leave_one_out"] | ValueModel
    )  # taken from a reward; a group: one prompt's
    loss: GRPO | PPO | GSPO | CISPO  # the policy's loss: docs/reference/losses.md
    kl: KLConfig | None  # None: no reference model is loaded
    reward: RewardConfig | None  # None: the environment of `agent` gives rewards
    agent: AgentConfig | None  # None: one answer a prompt
    sampling: SamplingConfig  # where rollouts come from
    ahead: AheadConfig | None  # None: generation and training take turns

    @property
    def policy_lag_steps_max(self) -> int:
        """Return how many optimizer steps generation may run ahead; 0 if they take turns."""
        return self.ahead.policy_lag_steps_max if self.ahead is not None else 0

    @property
    def in_flight_updates(self) -> bool:
        """Return whether weights change under running requests."""
        return self.ahead is not None and self.ahead.in_flight_updates

    @property
    def reward_fn(self) -> str | None:
        """Return the dotted path of the reward; None if an environment gives rewards."""
        return self.reward.fn if self.reward is not None else None
