"""engine.sglang_port=0: a free port of the host, in the plan; the config keeps its 0."""

import socket
from pathlib import Path

import pytest

from rollouts.machine.free_ports import PORTS_BEFORE, PORTS_FROM, free_ports
from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.local import LocalTransport
from tests.remote.test_plan import plan_for


def test_the_ports_are_in_the_plan() -> None:
    """Goal: each replica and its client get the ports that the host found, and the plan says which. Red with the 0
    handed on to the engine's command line."""
    plan = plan_for(
        facts={"free_port": 21_000},
        engine__sglang_port=0,
        engine__replicas=2,
        engine__gpu_ranks=[0, 1],
    )
    assert plan.problems == () and plan.launch is not None
    rl = plan.launch.stages[-1]
    assert [engine.argv[engine.argv.index("--port") + 1] for engine in rl.engines] == [
        "21000",
        "21001",
    ]
    assert "http://127.0.0.1:21001" in rl.trainer.argv
    assert "engine.sglang_port=0: ports 21000 to 21001, which the host found free" in plan.notes


def test_the_host_finds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: the ports are free, and not those of a live run whose engine is yet to start. Red with `taken` not looked
    at."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path))
    found = gather_facts(LocalTransport(), free_ports=3).free_port
    assert found is not None and PORTS_FROM <= found < PORTS_BEFORE
    for port in range(found, found + 3):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(("127.0.0.1", port))
    assert gather_facts(LocalTransport()).free_port is None
    assert free_ports(1, set(range(PORTS_FROM, PORTS_BEFORE))) is None
