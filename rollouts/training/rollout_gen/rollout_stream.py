"""Batches of rollouts made ahead of training, by a bounded number of optimizer steps. asyncio and trio alike.

Groups wait in one queue, in prompt order, and every batch is the next `batch_size` of it that were kept. No group is
overtaken, so long answers are not starved. A group may start only if the step that will consume it is at most
`policy_lag_steps_max` optimizer steps ahead of the weights that the engines serve.

Without in-flight updates a weight update waits until all groups that may start under the old weights have finished. The
weights that sampled a group are then a function of the seeds alone, and so is the whole run.
"""

import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import anyio

from rollouts.training.inference.http import EngineError
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.rollout_gen.concurrency import representative
from rollouts.training.rollout_gen.group_queue import PendingGroup
from rollouts.training.seams import PromptSource, RolloutManager, RolloutSource
from rollouts.training.types import RewardFn, RLTrainingConfig, RolloutBatch

ABORT_TIMEOUT_S = 5.0


@runtime_checkable
class Resumable(Protocol):
    """What a saved run continues exactly."""

    def save_state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class InTurn:
    """Generation and training take turns: a batch is begun when it is asked for. Any rollout manager will do.

    `buffer` holds the prompts of a manager that does not save their position itself. `reward_fn` replaces the
    manager's own.
    """

    def __init__(
        self,
        manager: RolloutManager,
        buffer: PromptSource | None = None,
        reward_fn: RewardFn | None = None,
    ) -> None:
        self._manager, self._reward_fn = manager, reward_fn
        parts = {"buffer": buffer, "rollout_manager": manager}
        self._parts = {name: part for name, part in parts.items() if isinstance(part, Resumable)}

    async def next_batch(self) -> RolloutBatch:
        """Return the batch of the next step."""
        return await self._manager.generate_batch(reward_fn=self._reward_fn)

    @asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[None]:
        """Wrap an update of the engines' weights, to those after step `version`: nothing runs meanwhile."""
        yield

    def save_state(self) -> dict[str, Any]:
        """Return the state of the manager and of its prompts, as far as they have one."""
        return {name: part.save_state() for name, part in self._parts.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `save_state` returned. Raises ValueError for the state of another kind of run."""
        for name, part in self._parts.items():
            part.load_state(_part_of(state, name))


def _part_of(state: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in state:
        raise ValueError(
            f"the checkpoint has no state of a {name}: it was saved by a run that sampled otherwise (from an engine, "
            "or from saved rollouts), or by another loop. Resume as that run began."
        )
    found: dict[str, Any] = state[name]
    return found


class RolloutStream:
    """Batches that one task generates ahead, while another trains on them and calls this.

    Nothing is generated before the first `updating`, which says the version of the weights that training starts from.
    """

    def __init__(
        self, manager: AsyncRolloutManager, config: RLTrainingConfig, reward_fn: RewardFn | None
    ) -> None:
        self.queue = manager.queue
        self._manager, self._reward_fn, self._config = manager, reward_fn, config
        self._version: int | None = (
            None  # of the weights that the engines serve: steps they were trained for
        )
        self._taken = 0  # steps that have their batch
        self._is_new = True  # whether the version has changed since groups were last started
        self._failure: BaseException | None = None
        self._changed = anyio.Event()

    async def next_batch(self) -> RolloutBatch:
        """Return the batch of the next step, once its groups are there; raise what made generation fail.

        Its metadata also has "age_s_mean" and "age_s_max": seconds since its groups were started.
        """
        await self._until(lambda: self.queue.has_batch)
        batch, groups = self.queue.pop_batch()
        self._taken += 1
        batch.metadata |= _ages(groups)
        return batch

    @asynccontextmanager
    async def updating(self, version: int) -> AsyncIterator[None]:
        """Wrap an update of the engines' weights, to those after step `version`.

        Unless updates are in flight, it first waits for the groups that may start under the old weights to finish.
        """
        if not self._config.in_flight_updates:
            await self._until(lambda: not self.queue.running and not self._missing())
        yield
        if self._version is None:
            self._taken = version
        self._version, self._is_new = version, True
        self._notify()

    def save_state(self) -> dict[str, Any]:
        """Return the manager's state: groups that still run are started again by a resumed run."""
        return {"rollout_manager": self.queue.save_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `save_state` returned. Raises ValueError for the state of another kind of run."""
        self.queue.load_state(_part_of(state, "rollout_manager"))

    async def produce(self) -> None:
        """Start groups as they may start, until cancelled. `next_batch` raises the failure that ends it."""
        rounds = 0
        while self._version is None:
            await self._changed.wait()
        try:
            async with anyio.create_task_group() as tasks:
                for group in self.queue.start_unfinished():
                    tasks.start_soon(self._finish, group)
                while True:
                    rounds = 0 if self._is_new else rounds
                    missing = self._missing()
                    if missing and (self._is_new or not self.queue.running):
                        self.queue.check_rounds(rounds)
                        rounds += 1
                        for group in self.queue.start_round(missing):
                            tasks.start_soon(self._finish, group)
                    self._is_new = False
                    await self._changed.wait()
        except ExceptionGroup as group:
            self._failure = representative(group)
            self._notify()

    async def _finish(self, group: PendingGroup) -> None:
        await self._manager.finish(group, self._reward_fn)
        self._notify()

    def _missing(self) -> int:
        """Return how many groups may start now: those of the steps within reach that neither exist nor run."""
        if self._version is None:
            return 0
        reach = (
            min(self._config.num_steps, self._version + 1 + self._config.policy_lag_steps_max)
            - self._taken
        )
        return max(
            0, reach * self._manager.config.batch_size - self.queue.ready - self.queue.running
        )

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
async def open_rollouts(
    manager: RolloutManager | None,
    config: RLTrainingConfig,
    pool: EnginePool,
    *,
    buffer: PromptSource | None = None,
    reward_fn: RewardFn | None = None,
) -> AsyncIterator[RolloutSource | None]:
    """Yield the batches of `manager`, generated at most `policy_lag_steps_max` steps ahead of the weights.

    None without a manager: on other ranks than 0. `buffer` holds the prompts of a manager of the user's own;
    `reward_fn` replaces the manager's. However the context is left, nothing is generated afterwards, and the manager is
    where it was before the groups that had not finished. If an error or a cancellation leaves it, the requests that
    still run at the engines of `pool` are aborted. Raises ValueError for a lag that cannot work.
    """
    ahead = _ahead(manager, config)
    try:
        if manager is None:
            yield None
        elif ahead is not None:
            async with _producing(RolloutStream(ahead, config, reward_fn)) as stream:
                yield stream
        else:  # our own manager saves the position of its prompts itself
            yield InTurn(
                manager, None if isinstance(manager, AsyncRolloutManager) else buffer, reward_fn
            )
    except BaseException:
        await _abort_all(pool)
        raise


def _ahead(manager: RolloutManager | None, config: RLTrainingConfig) -> AsyncRolloutManager | None:
    """Return the manager that generates ahead; None where generation and training take turns."""
    lag = config.policy_lag_steps_max
    if manager is None or lag == 0:
        return None
    if not isinstance(manager, AsyncRolloutManager):
        kind = type(manager).__name__
        raise ValueError(
            f"policy_lag_steps_max={lag}: needs an AsyncRolloutManager to generate ahead with, got {kind}; 0 takes any"
        )
    if lag < config.sync_every:
        raise ValueError(
            f"policy_lag_steps_max={lag}: needs 0, or >= sync_every={config.sync_every}: the weights are as old as "
            "that in any case"
        )
    return manager


@asynccontextmanager
async def _producing(stream: RolloutStream) -> AsyncIterator[RolloutStream]:
    """Yield the stream with its producer at work; an error is raised as it is, not in a group."""
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
        stream.queue.forget_running()


async def _abort_all(pool: EnginePool) -> None:
    """End what runs at the engines: behind a router, say, they may not notice that the client is gone."""
    # the first error matters more
    with anyio.move_on_after(ABORT_TIMEOUT_S, shield=True), suppress(EngineError):
        await pool.abort()


def _ages(groups: Sequence[PendingGroup]) -> dict[str, float]:
    now = time.monotonic()
    ages = [now - group.started_at for group in groups]
    return {"age_s_mean": statistics.fmean(ages), "age_s_max": max(ages)}
