"""Figures that the steps of gpu_first_hour_steps.py show: memory of the cards, losses beside each other, processes."""

import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def memory_peaks() -> Iterator[dict[str, int]]:
    """Return the most memory that each card had in use, in MiB, as nvidia-smi tells it once a second."""
    peaks: dict[str, int] = {}
    done = threading.Event()

    def look() -> None:
        command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        while not done.wait(1.0):
            said = subprocess.run(
                command, capture_output=True, text=True, timeout=30, check=False
            ).stdout
            for line in said.splitlines():
                index, _, used = line.partition(", ")
                if used.strip().isdigit():
                    peaks[index] = max(peaks.get(index, 0), int(used))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join(60)


def losses_apart(one: Sequence[float], two: Sequence[float]) -> float:
    if len(one) != len(two) or not one:
        return float("inf")
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def children_of(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]
