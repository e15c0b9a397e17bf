"""Lock and limit what one event loop after another may use: `anyio.run` makes a new loop each time."""

from collections.abc import Callable

import anyio
import anyio.lowlevel


class LoopLock:
    """`async with lock.here():` holds within the running event loop; locks of loops that ended are dropped."""

    def __init__(self) -> None:
        self._lock: anyio.Lock | None = None
        self._loop: object = None

    def here(self) -> anyio.Lock:
        # an anyio.Lock belongs to the event loop it is used in
        loop = anyio.lowlevel.current_token()
        if self._lock is None or self._loop != loop:
            self._lock, self._loop = anyio.Lock(), loop
        return self._lock


class LoopLimiter:
    """`async with limiter.here():` admits at most `places()` at once within the running event loop; others wait."""

    def __init__(self, places: Callable[[], int]) -> None:
        self._places = places
        self._limiter: anyio.CapacityLimiter | None = None
        self._loop: object = None

    def here(self) -> anyio.CapacityLimiter:
        loop = anyio.lowlevel.current_token()
        if self._limiter is None or self._loop != loop:
            self._limiter, self._loop = anyio.CapacityLimiter(self._places()), loop
        return self._limiter
