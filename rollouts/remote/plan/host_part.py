"""One host's part of a job: does it train, does it serve, and where all engines listen. Pure."""

import dataclasses
from dataclasses import dataclass

from rollouts.config import Config, EngineConfig
from rollouts.engines.command_lines import HOST, engine_url
from rollouts.remote.host.facts import HostFacts
from rollouts.run_dir import HostGroup


@dataclass(frozen=True)
class HostPart:
    """What one host of a job does."""

    rank: int
    trains: bool
    serves: bool


@dataclass(frozen=True)
class EnginePlace:
    """One replica: its numbers, and where it listens."""

    number: int  # in the job: its window is engine-<number>
    replica: int  # on its host
    rank: int  # of its host
    host: str  # the address that it listens at
    engine: EngineConfig  # with the ports of its host

    @property
    def url(self) -> str:
        return engine_url(self.engine, self.replica, host=self.host)


def part_of(config: Config, group: HostGroup | None) -> HostPart:
    rank = 0 if group is None else group.rank
    trains, serves = rank < config.target.hosts, rank in config.engine_hosts
    return HostPart(rank=rank, trains=trains, serves=serves)


def own_config(config: Config, part: HostPart) -> Config:
    """Return the config as it counts against one host's cards, memory and ports: without what others do."""
    engine = config.engine if part.serves else None
    if engine is not None and part.rank != 0 and engine.router_port is not None:
        engine = dataclasses.replace(engine, router_port=None)  # the first host's alone
    ranks = config.target.gpu_ranks if part.trains else []
    # a share is the largest where the fewest hosts are left
    hosts = min([config.target.hosts, *config.fewer_hosts()])
    target = dataclasses.replace(config.target, gpu_ranks=ranks, hosts=hosts)
    if engine == config.engine and target == config.target:
        return config
    return dataclasses.replace(config, target=target, engine=engine)


def serves_far(config: Config) -> bool:
    """Return whether engines run on other hosts than the first: all then listen at their hosts' private addresses."""
    return any(rank != 0 for rank in config.engine_hosts)


def engine_places(config: Config, group: HostGroup | None) -> list[EnginePlace]:
    """Return where each replica of the job listens: on the first host alone on loopback."""
    engine = config.engine if config.engine_hosts else None
    if engine is None:
        return []
    places: list[EnginePlace] = []
    for rank in config.engine_hosts:
        host, own = HOST, engine
        if serves_far(config):
            assert group is not None, "a job on several hosts"
            host, port = group.hosts[rank].address, group.hosts[rank].engine_port
            # None: it found no free one, which is a problem of the plan
            own = dataclasses.replace(engine, sglang_port=port or 0)
        for replica in range(engine.replicas):
            places.append(EnginePlace(len(places), replica, rank, host, own))
    return places


def own_engine_ports(config: Config, facts: HostFacts) -> list[int]:
    """Return the ports of a host's engines: the config's, or free ones that the host found; [] where it found none."""
    engine = config.engine
    if engine is None:
        return []
    first = engine.sglang_port or facts.free_port
    return [] if first is None else list(range(first, first + engine.replicas))


def far_engine_ports(config: Config, rank: int, facts: HostFacts) -> list[int]:
    """Return the ports of engines on the host `rank` that the first host has to reach."""
    return own_engine_ports(config, facts) if rank and rank in config.engine_hosts else []
