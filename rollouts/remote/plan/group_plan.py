"""Do hosts fit each other for one job? Pure."""

import posixpath
from collections.abc import Iterator, Sequence

from rollouts.config import Config
from rollouts.remote.errors import Problem
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.plan import Plan
from rollouts.run_dir import EnvironmentSpec


def count_problems(config: Config, hosts: int) -> Iterator[Problem]:
    """Say that there are more or fewer hosts than the config asks for."""
    if hosts != config.target.hosts:
        yield Problem(
            f"the config asks for {_hosts(config.target.hosts)}, and the command names {hosts}.",
            found=f"target.hosts={config.target.hosts}",
            fix=f"name as many with --remote, one each, or in a --hosts FILE; or set target.hosts={hosts}",
        )


def fit_problems(names: Sequence[str], facts: Sequence[HostFacts], plans: Sequence[Plan]) -> Iterator[Problem]:
    """Say what differs between hosts and must be the same."""
    drivers = [one.driver or "none" for one in facts]
    yield from _differing(
        names, drivers, "NVIDIA drivers", "one driver on all hosts: NCCL is tried with one", "install the same one"
    )
    keys = [_described(plan.launch.environments[0]) if plan.launch else "" for plan in plans]  # the trainer's
    needed = "one environment key: the same Python, platform and build of torch"
    fix = "give the hosts the same Python, or name another host"
    yield from _differing(names, keys, "environments for the trainer", needed, fix)
    homes: dict[tuple[str, str], str] = {}
    for name, one in zip(names, facts, strict=True):
        same = homes.setdefault((one.host, one.home), name)
        if same != name:
            yield Problem(
                f"{same} and {name} are one machine: {one.host}, with the home {one.home}.",
                needed="another machine for each part of the job",
                fix="name each host once, and put more of its devices into target.gpu_ranks",
            )


def _described(spec: EnvironmentSpec) -> str:
    return f"{posixpath.basename(spec.path)}, Python {spec.python_version}, torch {spec.torch_build}"


def _differing(names: Sequence[str], values: Sequence[str], what: str, needed: str, fix: str) -> Iterator[Problem]:
    if len(set(values)) > 1 and all(values):
        found = "\n".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        yield Problem(f"the hosts of the job have different {what}.", found=found, needed=needed, fix=fix)


def _hosts(count: int) -> str:
    return "one host" if count == 1 else f"{count} hosts"
