"""Rollouts: batches of sampled groups. Names are loaded on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
    from rollouts.training.rollout_gen.rollout_generation import generate_rollout_batches

_MODULE_OF = {
    "AsyncRolloutManager": "async_rollout_manager",
    "generate_rollout_batches": "rollout_generation",
}

__all__ = ["AsyncRolloutManager", "generate_rollout_batches"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
