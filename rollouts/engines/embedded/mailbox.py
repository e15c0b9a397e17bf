"""Calls that other threads make, run on the model thread between two of its steps."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class CommandRefused(Exception):
    """A command that did not succeed, with the message for its caller."""


class Mailbox:
    """Holds calls until the model thread takes them. Any thread may use any method."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._stopped = False

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the model thread between two steps. After `stop` the future raises CommandRefused."""
        future: Future[T] = Future()
        with self._changed:
            if self._stopped:
                future.set_exception(CommandRefused("the engine is shutting down"))
                return future
            self._calls.append(partial(resolve, future, function))
            self._changed.notify()
        return future

    def next_call(self) -> Callable[[], None] | None:
        """Take the oldest call, or return None."""
        with self._changed:
            return self._calls.popleft() if self._calls else None

    def wait(self, has_work: Callable[[], bool]) -> bool:
        """Sleep until there is a call, or `has_work()`, or `stop`. Return False after `stop`."""
        with self._changed:
            while not (self._stopped or self._calls or has_work()):
                self._changed.wait()
            return not self._stopped

    def stop(self) -> None:
        """Refuse new calls, and let `wait` return False."""
        with self._changed:
            self._stopped = True
            self._changed.notify()


def resolve(future: "Future[T]", function: Callable[[], T]) -> None:
    """Set the future to what `function` returns or raises; the thread goes on either way."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:  # raised again where the future is awaited
        future.set_exception(error)
    else:
        future.set_result(result)
