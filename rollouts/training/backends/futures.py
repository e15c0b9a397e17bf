"""One worker thread that applies work in the order it was submitted, and futures for what it gives."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import anyio.lowlevel
import anyio.to_thread
import torch

from rollouts.training.devices import set_current

T = TypeVar("T")


class BackendFailedError(RuntimeError):
    """Work refused because earlier work of this backend failed. The cause is the first failure."""


class ThreadFuture(Generic[T]):
    def __init__(self, future: "Future[T]") -> None:
        self._future = future

    async def result(self) -> T:
        """Wait for the work and return what it gave, or raise what it raised. Cancelling the wait leaves it running."""
        if self._future.done():
            await anyio.lowlevel.checkpoint()
        else:
            await anyio.to_thread.run_sync(wait, [self._future], abandon_on_cancel=True)
        return self._future.result()

    def wait(self) -> T:
        """Block the thread until `result()` is there, for code that is not async."""
        return self._future.result()

    def wait_done(self) -> None:
        """Blocks until the work has ended, however it did."""
        wait([self._future])

    def done(self) -> bool:
        return self._future.done()


class Worker:
    """Runs submitted functions one at a time. Once one has raised, all later ones raise BackendFailedError instead.

    `device` is current in its thread: FSDP makes its streams on the current one.
    """

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        self._name = name
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=name, initializer=set_current, initargs=(device,)
        )
        self._failure: tuple[str, BaseException] | None = None

    def submit(self, what: str, function: Callable[..., T], *arguments: Any) -> ThreadFuture[T]:
        return ThreadFuture(self._executor.submit(self._run, what, function, *arguments))

    def _run(self, what: str, function: Callable[..., T], *arguments: Any) -> T:
        if self._failure is not None:
            failed, error = self._failure
            raise BackendFailedError(
                f"{what} refused: {failed} of this {self._name} failed before ({type(error).__name__}: {error}), so "
                "its gradients are incomplete. Make a new backend and load the last checkpoint."
            ) from error
        try:
            return function(*arguments)
        except BaseException as error:  # nothing may run after any failure; it surfaces at result()
            self._failure = (what, error)
            raise
