"""The allocator's setting, measured by the kernel's own count of page faults."""

import subprocess
import sys

import pytest

from rollouts.training.host_memory import keep_freed_memory

# In a process of its own: the threads and the heap of a test run's would be counted too.
FAULTS = """
import resource, sys
import torch
from rollouts.training.host_memory import keep_freed_memory

def rounds(count):
    for _ in range(count):
        held = [torch.empty(2**26, dtype=torch.uint8).fill_(1) for _ in range(3)]
        del held

if sys.argv[1] == "set":
    assert keep_freed_memory()
rounds(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(setting: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, setting], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    """Goal: blocks of 64 MiB, three at a time, taken and freed after others like them, cost next to no page faults;
    without the setting each costs its own. Red with the mmap threshold left out.
    """
    if not keep_freed_memory():
        pytest.skip("not glibc")
    assert _faults("set") < 1000 < _faults("not set")
