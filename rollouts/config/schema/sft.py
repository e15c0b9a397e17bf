"""Supervised fine-tuning."""

from dataclasses import dataclass

from rollouts.config.schema.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning."""

    num_epochs: int  # passes over sft_mixture, where num_iterations is -1
    num_iterations: int  # optimizer steps; -1: num_epochs decides
    batch_size: int  # examples per rank and forward pass, where micro_batch_tokens is -1
    # tokens per rank and forward pass, filled best-fit with whole examples; -1: batch_size
    micro_batch_tokens: int
    target_examples_per_step: int  # examples per optimizer step, over all ranks: accumulated
    unembedding_lr: float  # learning rate of the output head
    embedding_lr: float  # learning rate of the token embeddings
    matrix_lr: float  # learning rate of all other weights, and of LoRA adapters
    weight_decay: float  # decoupled; norms and biases have none
    init_lr_frac: float  # factor on all learning rates, as in nanochat
    eval_every: int  # steps between validation losses; -1: only after the last step
    eval_steps: int  # batches per validation loss; -1: all of eval_mixture
    checkpoint_every: int  # steps; -1: only after the last step
    log_every: int  # steps between lines of metrics.jsonl
    optimizer: OptimizerConfig  # its constants and its schedule
