"""The training loops, short enough to read as the algorithm."""

from rollouts.training.loops.evaluation import validation_loss
from rollouts.training.loops.rl_loop import compute_advantages, prepare_grpo_batch, run_rl_training
from rollouts.training.loops.sft_loop import run_sft_training

__all__ = ["compute_advantages", "prepare_grpo_batch", "run_rl_training", "run_sft_training", "validation_loss"]
