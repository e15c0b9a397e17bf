"""Calls that other threads make, run on the model thread between two of its steps."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
SHUTTING_DOWN = "the engine is shutting down"


class CommandRefused(Exception):
    """A command that did not succeed, with the message for its caller."""


class Mailbox:
    """Holds calls until the model thread takes them. Any thread may use any method."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._stopped = False

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the model thread between two steps.

        The future raises CommandRefused if the engine stops first: none waits for ever.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._stopped:
                future.set_exception(CommandRefused(SHUTTING_DOWN))
                return future
            self._calls.append((future, function))
            self._changed.notify()
        return future

    def has_call(self) -> bool:
        with self._changed:
            return bool(self._calls)

    def run_call(self) -> None:
        """Run the oldest call, if there is one. For the model thread."""
        with self._changed:
            if not self._calls:
                return
            future, function = self._calls.popleft()
        resolve(future, function)

    def wait(self, has_work: Callable[[], bool]) -> bool:
        """Sleep until there is a call, or `has_work()`, or `stop`. Return False after `stop`."""
        with self._changed:
            while not (self._stopped or self._calls or has_work()):
                self._changed.wait()
            return not self._stopped

    def stop(self) -> None:
        """Refuse new calls and those that wait, and let `wait` return False."""
        with self._changed:
            self._stopped = True
            waiting, self._calls = list(self._calls), deque()
            self._changed.notify()
        for future, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(CommandRefused(SHUTTING_DOWN))


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
