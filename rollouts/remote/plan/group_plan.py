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
    wanted = config.job_hosts
    if hosts != wanted:
        found, serve = f"target.hosts={config.target.hosts}", ""
        if config.engine is not None and config.engine_hosts != [0]:
            found += f", engine.hosts={config.engine.hosts}"
            serve = ", of which the last ones only serve" if wanted > config.target.hosts else ""
        yield Problem(
            f"the config asks for {_hosts(wanted)}{serve}, and the command names {hosts}.",
            found=found,
            fix=f"name as many with --remote, one each, or in a --hosts FILE; or set target.hosts={hosts}",
        )


def fit_problems(
    names: Sequence[str], facts: Sequence[HostFacts], plans: Sequence[Plan]
) -> Iterator[Problem]:
    """Say what differs between hosts and must be the same, on those that train."""
    training = [index for index, plan in enumerate(plans) if _trains(plan)]
    trainers = [names[index] for index in training]
    yield from _differing(
        trainers,
        [facts[index].driver or "none" for index in training],
        "NVIDIA drivers",
        "one driver on all hosts: NCCL is tried with one",
        "install the same one",
    )
    launches = [plans[index].launch for index in training]
    keys = [_described(launch.environments[0]) if launch else "" for launch in launches]
    needed = "one environment key: the same Python, platform and build of torch"
    fix = "give the hosts the same Python, or name another host"
    yield from _differing(trainers, keys, "environments for the trainer", needed, fix)
    homes: dict[tuple[str, str], str] = {}
    for name, one in zip(names, facts, strict=True):
        same = homes.setdefault((one.host, one.home), name)
        if same != name:
            yield Problem(
                f"{same} and {name} are one machine: {one.host}, with the home {one.home}.",
                needed="another machine for each part of the job",
                fix="name each host once, and put more of its devices into target.gpu_ranks",
            )


def _trains(plan: Plan) -> bool:
    """Return whether ranks of the trainer would run on the host."""
    group = plan.launch.group if plan.launch is not None else None
    return group is None or group.hosts[group.rank].trains


def _described(spec: EnvironmentSpec) -> str:
    return (
        f"{posixpath.basename(spec.path)}, Python {spec.python_version}, torch {spec.torch_build}"
    )


def _differing(
    names: Sequence[str], values: Sequence[str], what: str, needed: str, fix: str
) -> Iterator[Problem]:
    if len(set(values)) > 1 and all(values):
        found = "\n".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        yield Problem(
            f"the hosts of the job have different {what}.", found=found, needed=needed, fix=fix
        )


def _hosts(count: int) -> str:
    return "one host" if count == 1 else f"{count} hosts"
