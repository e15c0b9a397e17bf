"""Ports for the servers of tests: each test process hands out its own ones, and the kernel gives none of them away.

A port that the kernel chose (a bind to 0) is free again until the server binds it, which may take a minute: any other
process's connection or server can be given it meanwhile. These lie below all that Linux chooses from, and a block of
them is claimed for as long as the test process lives.
"""

import contextlib
import itertools
import socket
from functools import cache

BLOCK = 500
BLOCKS = range(10_000, 20_000, BLOCK)  # and below those that `deploy` chooses from
IN_A_ROW = 5  # two calls never give ports nearer than that: replicas of an engine listen beside one another


def free_port() -> int:
    """Return a port of this test process that nothing has now; the same again only after all its others."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    assert count <= IN_A_ROW
    _, numbers = _own_block()
    for _ in range(BLOCK // IN_A_ROW):
        first = next(numbers)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("", port))
            return first
    raise AssertionError("every port of this test process is in use: which servers never end?")


@cache
def _own_block() -> "tuple[socket.socket, itertools.cycle[int]]":
    """Claim a block, by a socket's name that goes with this process, and return its ports, over and over."""
    for first in BLOCKS:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0rollouts-tests-ports-{first}")
        except OSError:
            claim.close()
            continue
        return claim, itertools.cycle(range(first, first + BLOCK, IN_A_ROW))
    raise AssertionError(f"{len(BLOCKS)} test processes have their ports already")
