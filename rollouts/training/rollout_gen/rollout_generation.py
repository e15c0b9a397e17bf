"""generate_rollout_batches: batches without async, for scripts and notebooks."""

from collections.abc import Iterator

import anyio

from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.types import RewardFn, RolloutBatch, RolloutConfig


def generate_rollout_batches(
    buffer: DataBuffer, config: RolloutConfig, *, reward_fn: RewardFn | None = None
) -> Iterator[RolloutBatch]:
    """Yield batches without end, as `AsyncRolloutManager.generate_batch` makes them; the caller stops.

    Each batch runs its own event loop, so async functions given here must not keep connections between calls. Inside
    a running event loop use AsyncRolloutManager.
    """
    manager = AsyncRolloutManager(buffer, config)
    while True:
        yield anyio.run(manager.generate_batch, reward_fn)
