"""Reinforcement learning: sampling, rewards, loss, and how far generation may run ahead."""

from dataclasses import dataclass
from typing import Literal

from rollouts.config.schema.optimizer import OptimizerConfig

ENGINE_SOURCES = ("engine", "engine_only")  # rl.source where rollouts come from an engine, not from a file


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Rollouts of several turns in an environment with tools. docs/agents.md."""

    environment: str  # dotted path of a class, or of a function without arguments that makes one
    tool_format: Literal["hermes", "json"]  # how the model writes its calls: <tool_call>, or all of a turn one object
    turns_max: int  # of the policy
    tokens_max: int  # of a whole episode, prompt included
    timeout_s: float  # of a whole episode


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    num_epochs: int  # steps = prompts * num_epochs // examples_per_step; of saved rollouts, their steps * num_epochs
    source: str  # "engine": sample and train; "engine_only": sample and score alone; or a rollouts.jsonl to train on
    examples_per_step: int  # prompts per optimizer step
    num_samples: int  # per prompt; one sample has no baseline
    batch_size: int  # sequences per rank and forward pass, where micro_batch_tokens is -1
    micro_batch_tokens: int  # tokens per rank and forward pass, filled best-fit with whole sequences; -1: batch_size
    max_new_tokens: int
    temperature: float
    top_k: int  # sample among the k likeliest tokens; -1: all
    unembedding_lr: float
    embedding_lr: float
    matrix_lr: float
    weight_decay: float
    init_lr_frac: float
    eval_every: int  # steps between exact-match evaluations; -1: only before and after the stage
    eval_examples: int  # rows of eval_mixture in those; -1: all. The ones before and after always take all
    save_every: int  # steps; -1: only after the last step
    log_every: int
    baseline: (
        float | Literal["group_mean", "leave_one_out", "value"]
    )  # subtracted from each reward; groups are a prompt's samples. value: a value head's estimates, per token by GAE
    gamma: float  # baseline value: the discount of what comes a token later
    gae_lambda: float  # baseline value: 1: what was rewarded less the value, 0: the surprise of one token alone
    value_coef: float  # baseline value: of the value head's squared error in the loss
    value_clip: float  # baseline value: how far a value may move from before the batch; -1: anywhere
    value_lr: float  # baseline value: the head's own learning rate
    updates_per_batch: int  # optimizer steps on each batch of rollouts
    advantage_norm: Literal["none", "group_std", "batch"]  # then divided by; batch standardises over the whole step
    loss: Literal["grpo", "ppo", "gspo", "cispo"]  # docs/losses.md: all of these methods, and how to set them
    clip_low: float  # ppo, gspo, cispo: the ratio to the sampler is held above 1 - clip_low; 1: no bound
    clip_high: float  # and below 1 + clip_high
    dual_clip: float  # ppo, gspo: where the advantage is negative the ratio counts at most this much; -1: no bound
    importance: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]  # grpo: TIS, MIS
    importance_cap: float  # the ratio to the sampler at which those truncate or mask
    aggregation: Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "constant_length"]
    kl_coef: float  # of the penalty for leaving a frozen reference model; 0: none is loaded
    kl_kind: Literal["k1", "k2", "k3"]  # which estimate of that divergence is the loss's term
    kl_reference: str | None  # hub id or directory on the host; None: the model that the run's rl stage started from
    entropy_coef: float  # of a bonus for the policy's entropy; 0: none
    agent: AgentConfig | None  # None: one answer a prompt
    reward_fn: str | None  # dotted path: Sample -> float, or None for not scorable. None: the environment's own
    reward_workers: int  # processes that a plain reward function runs in; 0: the trainer's, where none is cut off
    filter_fn: str | None  # dotted path of a function: list[Sample] of one group -> keep it?
    over_sampling_factor: float  # groups started per group needed
    retries_max: int  # more rounds of generation when the filter left too few groups
    sync_every: int  # optimizer steps between weight updates of the engine
    policy_lag_steps_max: int  # how many optimizer steps generation may run ahead of training; 0: in turn
    in_flight_updates: bool  # weights change under running requests, which go on; False: they are waited for
    seed: int  # of prompt order and sampling
    optimizer: OptimizerConfig
