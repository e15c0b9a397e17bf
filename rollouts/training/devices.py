"""The device of a thread. CUDA's current device belongs to a thread, and a new one begins with device 0."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import anyio
import torch

from rollouts.training.nvidia_driver import driver_version

T = TypeVar("T")
_POLL_S = 0.0005  # between looks at whether a thread is done; a broadcast of some hundred KB takes that long
_POLL_MAX_S = 0.01


class DeviceError(ValueError):
    """The device that the job wants cannot be used. The message names driver and build."""


def set_current(device: torch.device | None) -> None:
    """Make `device` the calling thread's current one. None and the CPU change nothing."""
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def give_cache_back(device: torch.device) -> None:
    """Return what the allocator keeps but does not use, so that another process of the card can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe_build() -> str:
    """Name this process's torch, the CUDA it was built for, and the host's driver, for messages."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA (a build for CPUs)"
    return f"torch {torch.__version__} built for {cuda}, {driver_version()}"


class DeviceThread(Generic[T]):
    """A function in a thread of its own, in which `device` is current; for calls that may block for ever.

    The thread is a daemon: one that stays blocked holds up neither the event loop nor the end of the process.
    """

    def __init__(self, device: torch.device | None, function: Callable[[], T]) -> None:
        self._future: Future[T] = Future()

        def work() -> None:
            try:
                set_current(device)
                self._future.set_result(function())
            except BaseException as error:  # it surfaces at result()
                self._future.set_exception(error)

        threading.Thread(target=work, name="device-call", daemon=True).start()

    async def result(self) -> T:
        """Return what the function gave, or raise what it raised. A cancelled wait leaves it running."""
        await poll(self._future.done)
        return self._future.result()


async def run_on(device: torch.device | None, function: Callable[[], T]) -> T:
    """Run `function` in a thread in which `device` is current. When cancelled, the thread is left behind."""
    return await DeviceThread(device, function).result()


async def poll(is_done: Callable[[], bool]) -> None:
    """Return once `is_done`, looking often at first. Works on any event loop, and can be cancelled."""
    pause_s = _POLL_S
    while not is_done():
        await anyio.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_MAX_S)
