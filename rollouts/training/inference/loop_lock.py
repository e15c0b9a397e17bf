"""A lock for an object that one event loop after another may use: `anyio.run` makes a new loop each time."""

import anyio
import anyio.lowlevel


class LoopLock:
    """`async with lock.here():` — holds within the event loop that runs; one that is left has nothing to wait for."""

    def __init__(self) -> None:
        self._lock: anyio.Lock | None = None
        self._loop: object = None

    def here(self) -> anyio.Lock:
        loop = anyio.lowlevel.current_token()  # an anyio.Lock belongs to the event loop it is used in
        if self._lock is None or self._loop != loop:
            self._lock, self._loop = anyio.Lock(), loop
        return self._lock
