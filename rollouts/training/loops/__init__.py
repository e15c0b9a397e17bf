"""The training loops, short enough to read as the algorithm."""

from rollouts.training.loops.rl_loop import compute_advantages, prepare_grpo_batch, run_rl_training
from rollouts.training.loops.rollout_loop import collect_rollouts
from rollouts.training.loops.sft_loop import run_sft_training
from rollouts.training.loops.validation import validation_loss, validation_losses

__all__ = [
    "collect_rollouts",
    "compute_advantages",
    "prepare_grpo_batch",
    "run_rl_training",
    "run_sft_training",
    "validation_loss",
    "validation_losses",
]
