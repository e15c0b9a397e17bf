"""The next steps' batches, prepared by one background thread while the current step trains."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from threading import Event
from typing import Generic, TypeVar

import anyio
import anyio.to_thread

from rollouts.training.backends.futures import ThreadFuture

T = TypeVar("T")


@asynccontextmanager
async def prefetch(
    prepare: Callable[[int], T], steps: Iterable[int], *, depth: int
) -> AsyncIterator["AsyncIterator[tuple[int, T]]"]:
    """`async with prefetch(...) as prepared: async for step, batch in prepared: ...`, in the order of `steps`.

    `prepare(step)` runs in a separate thread, one step after another, at most `depth` (>= 1) steps ahead of what
    was taken; it must be a function of `step` alone (no global RNG, no event loop). What it raises is raised where
    that step's batch is taken, after all those before it. Nothing counts as done until it is taken: a run that dies
    here resumes from its own count of steps. However the block is left, the thread has ended when it is.
    """
    assert depth >= 1, depth
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    closed = Event()
    try:
        yield _Prepared(lambda step: _unless(closed, prepare, step), steps, depth, executor)
    finally:
        closed.set()
        with anyio.CancelScope(shield=True):  # one `prepare` at most, which cannot be interrupted
            await anyio.to_thread.run_sync(executor.shutdown)


class _Prepared(Generic[T]):
    def __init__(
        self,
        prepare: Callable[[int], T],
        steps: Iterable[int],
        depth: int,
        executor: ThreadPoolExecutor,
    ):
        self._prepare, self._executor = prepare, executor
        self._left = iter(steps)
        self._pending: deque[tuple[int, ThreadFuture[T]]] = deque()
        for _ in range(depth):
            self._submit_next()

    def __aiter__(self) -> AsyncIterator[tuple[int, T]]:
        return self

    async def __anext__(self) -> tuple[int, T]:
        if not self._pending:
            raise StopAsyncIteration
        step, future = self._pending[0]
        prepared = await future.result()  # cancelled or failed: nothing was taken
        self._pending.popleft()
        self._submit_next()
        return step, prepared

    def _submit_next(self) -> None:
        for step in self._left:
            self._pending.append((step, ThreadFuture(self._executor.submit(self._prepare, step))))
            return


def _unless(closed: Event, prepare: Callable[[int], T], step: int) -> T:
    """Run `prepare`, unless the block is left: then the step ends at once. A cancel would not wake a waiting thread."""
    if closed.is_set():
        raise RuntimeError(f"step {step} was taken after the end of its prefetch block")
    return prepare(step)
