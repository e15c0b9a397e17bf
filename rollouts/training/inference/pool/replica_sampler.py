"""Keep to one replica of a pool: for conversations, whose beginning is in its prefix cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.training.inference.http import Generation
from rollouts.training.inference.pool.engine_pool import EnginePool


@dataclass(frozen=True)
class ReplicaSampler:
    """Asks the replica at `place` first, and others while it is down."""

    pool: EnginePool
    place: int

    async def generate_batch(self, *request: Any, **options: Any) -> list[list[Generation]]:
        """Return what the pool does."""
        return await self.pool.generate_batch(*request, **options, first=self.place)


def samplers(pool: EnginePool) -> Sequence[ReplicaSampler]:
    """Return one for each replica."""
    return [ReplicaSampler(pool, place) for place in range(len(pool))]
