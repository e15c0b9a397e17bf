"""Supervised fine-tuning."""

from dataclasses import dataclass

from rollouts.config.schema.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    num_epochs: int
    num_iterations: int  # optimizer steps; -1: num_epochs decides
    batch_size: int  # examples per rank and forward pass, where micro_batch_tokens is -1
    micro_batch_tokens: int  # tokens per rank and forward pass, filled best-fit with whole examples; -1: batch_size
    target_examples_per_step: int  # examples per optimizer step, over all ranks: accumulated
    unembedding_lr: float
    embedding_lr: float
    matrix_lr: float
    weight_decay: float
    init_lr_frac: float  # factor on all learning rates, as in nanochat
    eval_every: int  # steps between validation losses; -1: only after the last step
    eval_steps: int  # batches per validation loss; -1: all of eval_mixture
    checkpoint_every: int  # steps; -1: only after the last step
    log_every: int
    optimizer: OptimizerConfig
