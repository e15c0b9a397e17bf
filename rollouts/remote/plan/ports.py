"""engine.sglang_port=0: ports that the host found free, put into the launch plan. Pure.

The config of the run keeps its 0, so that deploying it again takes free ports again; plan.json has the numbers.
"""

from collections.abc import Iterator

from rollouts.config import Config
from rollouts.config.changed import changed
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts


def free_ports_wanted(config: Config) -> int:
    """Return how many free ports the host is to find, in a row."""
    engine = config.engine
    return (
        engine.replicas
        if engine is not None and config.uses_engine and engine.sglang_port == 0
        else 0
    )


def with_free_ports(config: Config, facts: HostFacts) -> Config:
    """Return the config with the ports that the host found in place of a 0."""
    if not free_ports_wanted(config) or facts.free_port is None:
        return config
    return changed(config, {"engine.sglang_port": facts.free_port})


def free_port_problems(config: Config, facts: HostFacts, target: str) -> Iterator[Problem]:
    """Say that the host found no free ports."""
    if (count := free_ports_wanted(config)) and facts.python and facts.free_port is None:
        yield Problem(
            f"{target}: no {count} free ports in a row were found.",
            needed="engine.sglang_port=0: a free port for each replica",
            fix="set engine.sglang_port to a port that is free there",
        )


def free_port_notes(config: Config, facts: HostFacts) -> Iterator[str]:
    """Say which ports were chosen."""
    if (count := free_ports_wanted(config)) and facts.free_port is not None:
        last = facts.free_port + count - 1
        ports = f"port {facts.free_port}" if count == 1 else f"ports {facts.free_port} to {last}"
        yield f"engine.sglang_port=0: {ports}, which the host found free"
