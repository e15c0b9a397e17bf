"""Backends hold the model and the optimizer. They know no rewards and no prompts."""

from rollouts.training.backends.fsdp import FSDPConfig, FSDPTrainingBackend
from rollouts.training.backends.protocol import MinimalBackend, TrainFuture, TrainingBackend
from rollouts.training.backends.pytorch import BackendFailedError, PyTorchTrainingBackend
from rollouts.training.backends.pytorch_factory import create_pytorch_backend

__all__ = [
    "BackendFailedError",
    "FSDPConfig",
    "FSDPTrainingBackend",
    "MinimalBackend",
    "PyTorchTrainingBackend",
    "TrainFuture",
    "TrainingBackend",
    "create_pytorch_backend",
]
