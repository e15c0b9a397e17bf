"""Reward functions that hang, die or raise, for tests/training/test_scoring.py. Workers import them by their path."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio

from rollouts.training.types import Sample


def by_text(sample: Sample) -> Any:
    """Does what the response says. Prints, which must not disturb the worker's answers."""
    print("scoring", sample.response)
    word, _, rest = sample.response.partition(" ")
    if word == "hang":
        _note_children(rest)
        time.sleep(1e6)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "raise":
        raise KeyError(rest)
    if word == "exit":
        sys.exit(rest)
    if word == "text":
        return "much"
    if word == "none":
        return None
    time.sleep(float(rest or 0))
    return float(word)


def _note_children(path: str) -> None:
    """This process and a child of it write themselves into `path`."""
    if path:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
        Path(path).write_text(f"{os.getpid()} {child.pid}")


def process_id(sample: Sample) -> float:
    return float(os.getpid())


async def slow_async(sample: Sample) -> float:
    if sample.response == "hang":
        await anyio.sleep_forever()
    return 1.0


async def raises_async(sample: Sample) -> float:
    if sample.response.startswith("exit"):
        sys.exit(sample.response.removeprefix("exit "))
    raise KeyError(sample.response.removeprefix("raise "))


def handed_on(sample: Sample) -> Any:
    """A plain function that gives what another one, an async one, is to be awaited for."""
    return (raises_async if sample.response.startswith(("raise", "exit")) else slow_async)(sample)


class Constant:
    """An async reward with a parameter: an instance in a module is named as a function is."""

    def __init__(self, value: float) -> None:
        self.value = value

    async def __call__(self, sample: Sample) -> float:
        if sample.response == "hang":
            await anyio.sleep_forever()
        return self.value


half = Constant(0.5)


async def hangs(sample: Sample) -> float:
    await anyio.sleep_forever()
    raise AssertionError
