"""The ports that tests give to their servers."""

import itertools
import socket
import subprocess
import sys
from pathlib import Path

from tests import ports
from tests.docs_blocks import ROOT

CHOSEN_BY_LINUX = Path("/proc/sys/net/ipv4/ip_local_port_range")
NEXT = "from tests.ports import free_port; print(free_port())"


def test_nobody_else_is_given_a_tests_port() -> None:
    """Goal: not another test process, and not who asks the kernel for any port. Red with ports that the kernel chose,
    and with the block not claimed."""
    port = ports.free_port()
    command = [sys.executable, "-c", NEXT]
    other = int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert port // ports.BLOCK != other // ports.BLOCK
    assert max(port, other) < int(CHOSEN_BY_LINUX.read_text().split()[0])


def test_a_port_in_use_is_passed_over() -> None:
    """Goal: one that something has, or a replica beside it, is not given; all others are. Red without the look."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", first := ports.free_port()))
        round_of_all = [ports.free_port() for _ in range(ports.BLOCK // ports.IN_A_ROW)]
        assert first not in round_of_all and len({*round_of_all}) > 1
        apart = sorted({*round_of_all, first})
        assert all(b - a >= ports.IN_A_ROW for a, b in itertools.pairwise(apart))
