"""Stores that listen on one address alone."""

import os

from rollouts.training.stores import BoundStore
from rollouts.worker.processes import listeners


def test_a_store_that_is_made_again_at_its_port_is_bound_too() -> None:
    """Goal: the second store at a port, after the first has gone, listens on loopback alone. Red with each port bound
    once in a process: the second one was torch's own, on all addresses."""
    store = BoundStore("127.0.0.1", 0, 1, True)
    port = store.port
    del store
    again = BoundStore("127.0.0.1", port, 1, True)
    again.set("key", "value")
    assert again.get("key") == b"value"
    places = {found.address for found in listeners([os.getpid()]) if found.port == port}
    assert places == {"127.0.0.1"}
