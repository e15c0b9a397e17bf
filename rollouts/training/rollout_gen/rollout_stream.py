"""Batches of rollouts made ahead of training, by a bounded number of optimizer steps. asyncio and trio alike.

Groups stand in one line, in prompt order, and every batch is the next `batch_size` of it that were kept: nobody is
overtaken, so long answers are not starved. A group may start only if the step that will consume it is at most
`lag_steps_max` optimizer steps ahead of the weights that the engines serve.

Without in-flight updates a weight update waits until all that may start under the old weights has finished. Who was
sampled with which weights is then a function of the seeds alone, and so is the whole run.
"""

import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio

from rollouts.training.inference.http import EngineError
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager, PendingGroup
from rollouts.training.rollout_gen.concurrency import representative
from rollouts.training.types import RewardFn, RLTrainingConfig, RolloutBatch

ABORT_TIMEOUT_S = 5.0


class InTurn:
    """Generation and training take turns: a batch is begun when it is asked for. Any rollout manager will do."""

    def __init__(self, manager: Any, reward_fn: RewardFn | None) -> None:
        self._manager, self._reward_fn = manager, reward_fn

    async def next_batch(self) -> RolloutBatch:
        """The batch of the next step."""
        return await self._manager.generate_batch(reward_fn=self._reward_fn)

    @asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[None]:
        """Stand around an update of the engines' weights, to those after step `version`."""
        yield


class RolloutStream:
    """What `open_stream` gives where generation runs ahead. One task trains, and calls it."""

    def __init__(
        self,
        manager: AsyncRolloutManager,
        reward_fn: RewardFn | None,
        first: int,
        config: RLTrainingConfig,
    ) -> None:
        self.manager, self._reward_fn, self._config = manager, reward_fn, config
        self._taken = first  # steps that have their batch
        self._version = first  # of the weights that the engines serve: steps they were trained for
        self._is_new = True  # whether the version has changed since groups were last started
        self._failure: BaseException | None = None
        self._changed = anyio.Event()

    async def next_batch(self) -> RolloutBatch:
        """The batch of the next step, once its groups are there; what made generation fail is raised here.

        Its metadata also has "age_s_mean" and "age_s_max": seconds since its groups were started.
        """
        await self._until(lambda: self.manager.head_is_ready)
        batch, groups = self.manager.take()
        self._taken += 1
        batch.metadata |= _ages(groups)
        return batch

    @asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[None]:
        """Stand around an update of the engines' weights, to those after step `version`.

        Waits for what may start under the old weights to finish, unless updates are in flight.
        """
        if not self._config.in_flight_updates:
            await self._until(lambda: not self.manager.running and not self._missing())
        yield
        self._version, self._is_new = version, True
        self._notify()

    async def produce(self) -> None:
        """Start groups as they may start, until cancelled. A failure ends it and waits in `next_batch`."""
        rounds = 0
        try:
            async with anyio.create_task_group() as tasks:
                for group in self.manager.begin_again():
                    tasks.start_soon(self._finish, group)
                while True:
                    rounds = 0 if self._is_new else rounds
                    missing = self._missing()
                    if missing and (self._is_new or not self.manager.running):
                        self.manager.check_rounds(rounds)
                        rounds += 1
                        for group in self.manager.begin(missing):
                            tasks.start_soon(self._finish, group)
                    self._is_new = False
                    await self._changed.wait()
        except ExceptionGroup as group:
            self._failure = representative(group)
            self._notify()

    async def _finish(self, group: PendingGroup) -> None:
        await self.manager.finish(group, self._reward_fn)
        self._notify()

    def _missing(self) -> int:
        """Groups that may start now: of the steps within reach of the weights, what is neither there nor running."""
        reach = min(self._config.num_steps, self._version + 1 + self._config.policy_lag_steps_max) - self._taken
        return max(0, reach * self.manager.config.batch_size - self.manager.ready - self.manager.running)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds. Raises what made generation fail."""
        while not condition():
            if self._failure is not None:
                raise self._failure
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


@asynccontextmanager
async def open_stream(
    manager: Any, reward_fn: RewardFn | None, pool: EnginePool, first: int, config: RLTrainingConfig
) -> AsyncIterator[InTurn | RolloutStream]:
    """The batches of the steps after `first`, generated at most `policy_lag_steps_max` steps ahead of the weights.

    `manager` None: of another rank than 0, which asks for none. `reward_fn` stands in for the manager's. However the
    context is left, nothing is generated any more afterwards, and
    the manager stands before the groups that had not finished; left by an error, or cancelled, the requests that still
    run at the engines of `pool` are aborted. Raises ValueError for a lag that cannot be.
    """
    lag = config.policy_lag_steps_max if manager is not None else 0
    if lag > 0 and not isinstance(manager, AsyncRolloutManager):
        kind = type(manager).__name__
        raise ValueError(
            f"policy_lag_steps_max={lag}: needs an AsyncRolloutManager to generate ahead with, got {kind}; 0 takes any"
        )
    if 0 < lag < config.sync_every:
        raise ValueError(
            f"policy_lag_steps_max={lag}: needs 0, or >= sync_every={config.sync_every}: the weights are as old as "
            "that in any case"
        )
    try:
        if lag == 0:
            yield InTurn(manager, reward_fn)
        else:
            async with _running(RolloutStream(manager, reward_fn, first, config)) as stream:
                yield stream
    except BaseException:
        await _abort_all(pool)
        raise


@asynccontextmanager
async def _running(stream: RolloutStream) -> AsyncIterator[RolloutStream]:
    """The stream with its producer at work; an error comes out as it is, not in a group."""
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.produce)
            try:
                yield stream
            finally:
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error = representative(group)
        raise error from error.__cause__
    finally:
        stream.manager.roll_back()


async def _abort_all(pool: EnginePool) -> None:
    """End what runs at the engines: behind a router, say, they may not notice that the client is gone."""
    with anyio.move_on_after(ABORT_TIMEOUT_S, shield=True), suppress(EngineError):  # the first error matters more
        await pool.abort()


def _ages(groups: Sequence[PendingGroup]) -> dict[str, float]:
    now = time.monotonic()
    ages = [now - group.started_at for group in groups]
    return {"age_s_mean": statistics.fmean(ages), "age_s_max": max(ages)}
