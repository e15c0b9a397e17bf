"""Which ports of this machine are free. Standard library only."""

import random
import socket
from collections.abc import Collection

# below those that Linux gives to outgoing connections
PORTS_FROM, PORTS_BEFORE, PORT_TRIES = 20_000, 32_000, 200


def port_is_free(port: int) -> bool:
    """Return whether a server could listen on loopback at this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_ports(count: int, taken: Collection[int]) -> int | None:
    """Return the first of `count` ports in a row that are free now and not among `taken`; None if none were found.

    Drawn at random, so that two who look at once rarely choose the same; the launch refuses the second of them.
    """
    for _ in range(PORT_TRIES):
        first = random.randint(PORTS_FROM, PORTS_BEFORE - count)
        if all(port not in taken and port_is_free(port) for port in range(first, first + count)):
            return first
    return None
