"""`GroupBatcher`: the groups that are asked for at the same moment go to a replica as one batch request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel

from rollouts.training.inference.http import Generation
from rollouts.training.inference.pool.engine_pool import EnginePool


class GenerationError(RuntimeError):
    """An engine gave something that must not be trained on: an aborted or incomplete group."""


@dataclass
class _Group:
    """One group's part of a batch request."""

    input_ids: Sequence[int]
    sampling_params: Mapping[str, Any]
    answered: anyio.Event
    generations: list[Generation] | None = (
        None  # None once answered: the request that carried it failed
    )


class GroupBatcher:
    """Sends groups to the replicas of a pool in turn. `together`: those of one moment in one request a replica.

    A round's groups start together and are awaited together. With a small model, a request each costs more than the
    sampling (32 groups of 8 x 8 tokens: 200 ms against 80 ms). The first group of a moment sends for all.
    """

    def __init__(self, pool: EnginePool, *, together: bool = True) -> None:
        self._pool = pool
        self._together = together
        self._turn = 0
        self._waiting: list[list[_Group]] = [[] for _ in range(len(pool))]  # by replica

    async def generate(
        self, input_ids: Sequence[int], sampling_params: Mapping[str, Any], *, n: int
    ) -> list[Generation]:
        """Return the group's generations. All groups have the same `n`.

        The group that sends raises what the pool raised, the others GenerationError.
        """
        place = self._turn % len(self._pool)
        self._turn += 1
        group = _Group(input_ids, sampling_params, anyio.Event())
        groups = self._waiting[place] if self._together else []
        groups.append(group)
        if len(groups) > 1:
            await group.answered.wait()
            if group.generations is None:
                raise GenerationError(f"{self._pool}: the request that carried this group failed")
            return group.generations
        try:
            await anyio.lowlevel.checkpoint()  # the others of this moment ask now
            self._close(place, groups)
            prompts, params = (
                [one.input_ids for one in groups],
                [one.sampling_params for one in groups],
            )
            answers = await self._pool.generate_batch(prompts, params, n=n, first=place)
            for one, generations in zip(groups, answers, strict=True):
                one.generations = generations
        finally:
            self._close(place, groups)  # if it was cancelled before it was sent
            for one in groups:
                one.answered.set()
        assert group.generations is not None
        return group.generations

    def _close(self, place: int, groups: list[_Group]) -> None:
        """Let the next group at `place` begin a new request."""
        if self._waiting[place] is groups:
            self._waiting[place] = []
