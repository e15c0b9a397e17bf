"""`Pipeline`: fill one buffer while the engines load others."""

from collections.abc import Awaitable, Callable, Sequence

import anyio
from torch import Tensor

from rollouts.training.inference.http import EngineError
from rollouts.training.weights.wire import Buffer

Filling = Callable[[], Awaitable[None]]  # waits until the buffer is filled; raises what failed
Fill = Callable[[int, Tensor], Filling]  # begins to fill a buffer with the bucket of this index
Put = Callable[[int, Buffer], Awaitable[None]]  # has the engines load the bucket of this index


class Pipeline:
    """Sends `count` buckets over a ring of buffers, at most `in_flight` at once; the last one when all others are in.

    The first bucket is filled at once, while the engines prepare.
    """

    def __init__(
        self, buffers: Sequence[Buffer], count: int, *, in_flight: int, fill: Fill
    ) -> None:
        self._buffers, self._count, self._in_flight, self._fill = buffers, count, in_flight, fill
        self._filling = self._begin(0)

    async def run(self, put: Put) -> None:
        """Return when all are loaded. Raises what the first bucket that failed did."""
        failures: dict[int, Exception] = {}
        loaded = [anyio.Event() for _ in range(self._count)]
        last = self._count - 1

        async def put_one(index: int) -> None:
            try:
                await put(index, self._buffers[index % len(self._buffers)])
            except EngineError as error:
                failures[index] = error
            loaded[index].set()

        async with anyio.create_task_group() as group:
            for index in range(self._count):
                try:
                    await self._filling()
                except Exception as error:  # raised below: leaving the group with it would wrap it
                    failures[index] = error
                # a version means all of it
                before = index if index == last else max(0, index + 1 - self._in_flight)
                for done in loaded[:before]:
                    await done.wait()
                if failures:
                    break
                group.start_soon(put_one, index)
                if index < last:  # the next buffer is free: its last bucket has been waited for
                    self._filling = self._begin(index + 1)
        if failures:
            raise failures[min(failures)]

    def _begin(self, index: int) -> Filling:
        return self._fill(index, self._buffers[index % len(self._buffers)].flat)
