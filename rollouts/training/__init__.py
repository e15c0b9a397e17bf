"""The training library. Names are loaded on first use, so that importing a record does not import torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollouts.training.backends.pytorch import PyTorchTrainingBackend
    from rollouts.training.datasets.data_buffer import DataBuffer
    from rollouts.training.datasets.dataset_loaders import load_sft_dataset
    from rollouts.training.loops.rl_loop import run_rl_training
    from rollouts.training.loops.sft_loop import run_sft_training
    from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
    from rollouts.training.rollout_gen.rollout_generation import generate_rollout_batches
    from rollouts.training.types import (
        RLTrainingConfig,
        RolloutBatch,
        RolloutConfig,
        Sample,
        SFTTrainingConfig,
    )

_MODULE_OF = {
    "AsyncRolloutManager": "rollout_gen.async_rollout_manager",
    "DataBuffer": "datasets.data_buffer",
    "PyTorchTrainingBackend": "backends.pytorch",
    "RLTrainingConfig": "types",
    "RolloutBatch": "types",
    "RolloutConfig": "types",
    "SFTTrainingConfig": "types",
    "Sample": "types",
    "generate_rollout_batches": "rollout_gen.rollout_generation",
    "load_sft_dataset": "datasets.dataset_loaders",
    "run_rl_training": "loops.rl_loop",
    "run_sft_training": "loops.sft_loop",
}

__all__ = [
    "AsyncRolloutManager",
    "DataBuffer",
    "PyTorchTrainingBackend",
    "RLTrainingConfig",
    "RolloutBatch",
    "RolloutConfig",
    "SFTTrainingConfig",
    "Sample",
    "generate_rollout_batches",
    "load_sft_dataset",
    "run_rl_training",
    "run_sft_training",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
