"""The public place of the backend's protocols; they are in `seams`, beside the others."""

from rollouts.training.seams import MinimalBackend, TrainFuture, TrainingBackend

__all__ = ["MinimalBackend", "TrainFuture", "TrainingBackend"]
