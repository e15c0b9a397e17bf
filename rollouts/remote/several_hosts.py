"""`deploy CONFIG` with more than one host: planned together, started together, followed as one run on the first.

The path is the one of a single host. Before the plan each host is asked what it has, and how it reaches the others.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.remote.commands import launch_and_watch, look_at_host, new_run_id, plan_run
from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.named_hosts import NamedHost
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.reach import AskedHost, Place, Reach, find_reach
from rollouts.remote.host.transport import Transport
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan import Plan, QueueWish, SlurmOptions, required_paths
from rollouts.remote.plan.group_plan import count_problems, fit_problems
from rollouts.remote.plan.host_part import far_engine_ports, own_engine_ports, serves_far
from rollouts.remote.read_config import read_variants
from rollouts.remote.repository import Code, find_repository, read_code, refuse_stray_config
from rollouts.remote.run import registry
from rollouts.remote.run.open_run import OpenRun
from rollouts.remote.run.wanted import ToBring
from rollouts.remote.texts import plan_text
from rollouts.run_dir import GroupHost, HostGroup
from rollouts.view.answer import Answer
from rollouts.view.screen import Screen


@dataclass(frozen=True)
class StartOptions:
    """What the command line says of a start, beside config and hosts."""

    run_id: str | None
    plan_only: bool
    detach: bool
    accept_new_host_key: bool
    busy_ok: bool
    wanted: ToBring  # of the results
    queue: QueueWish | SlurmOptions | None


@dataclass(frozen=True)
class Beginning:
    """What a run that goes on from a checkpoint starts with, once the first host is known."""

    config: Config
    record: dict[str, str]  # beside that of the code
    resumed_from: dict[str, Any]
    comes: tuple[str, ...]  # paths that will be there
    warn: Callable[[Code], list[str]]  # of the code that it would run


Begin = Callable[[str], Beginning]  # of the run's directory on the first host


def deploy_on_several(
    config_path: str,
    screen: Screen,
    hosts: Sequence[NamedHost],
    settings: Sequence[str],
    options: StartOptions,
) -> int:
    """Plan, send, launch and watch a run on several hosts. Returns the job's exit code."""
    with as_deploy_errors():
        config = read_variants(config_path, settings)[0].config
        refuse_stray_config(find_repository(Path.cwd()), Path(config_path))
    return start_on(config, screen, hosts, options)


def start_on(
    config: Config,
    screen: Screen,
    hosts: Sequence[NamedHost],
    options: StartOptions,
    begin: Begin | None = None,
) -> int:
    """Plan, send, launch and watch a run of a config that is checked. Returns the job's exit code.

    `begin`: it goes on from a checkpoint.
    """
    with as_deploy_errors() as progress, contextlib.ExitStack() as stack:
        refuse_queue(options.queue)
        root = find_repository(Path.cwd())
        if problems := tuple(count_problems(config, len(hosts))):
            raise DeployError.of(problems)
        transports = [_open(host, options, stack) for host in hosts]
        run_id = options.run_id or new_run_id(config)
        facts = [look_at_host(transport, [config], run_id=run_id) for transport in transports]
        more: dict[str, Any] = {}
        record: dict[str, str] = {}
        beginning: Beginning | None = None
        if begin is not None:
            beginning = begin(f"{facts[0].home}/runs/{run_id}")
            config, record = beginning.config, beginning.record
            more = {"resumed_from": beginning.resumed_from}
            come = dict.fromkeys(beginning.comes, True)
            facts = [dataclasses.replace(one, paths={**one.paths, **come}) for one in facts]
        code = read_code(root, config)
        all_hosts = _Hosts(hosts, transports, facts)
        reach = _reach(config, all_hosts)
        plans = _plan(config, code, run_id, all_hosts, reach, busy_ok=options.busy_ok)
        if options.plan_only:
            screen.show(
                Answer([plan.to_json() for plan in plans], "\n\n".join(map(plan_text, plans)))
            )
        if problems := tuple(dict.fromkeys(problem for plan in plans for problem in plan.problems)):
            raise DeployError.of(problems)
        if options.plan_only:
            return 0
        warnings = [warning for plan in plans for warning in plan.warnings]
        warnings += beginning.warn(code) if beginning is not None else []
        for warning in dict.fromkeys(warnings):
            screen.warn(warning)
        first, *others = plans
        entry = registry.register(
            first, config, root, code.record() | record, now=time.time(), others=others, **more
        )
        progress.run_id, progress.target, progress.reached = (
            entry.run_id,
            entry.target,
            "registered",
        )
        run = OpenRun(
            entry, facts[0], transports[0], None, "never launched", progress, options.wanted
        )
        return launch_and_watch(run, config, screen, detach=options.detach)


def plan_all(
    jobs: Sequence[tuple[Config, str]], hosts: Sequence[NamedHost], options: StartOptions
) -> list[list[Plan]]:
    """Plan several jobs, each a config and a run's name, by one look at the hosts. Returns each host's part of each."""
    root, configs = find_repository(Path.cwd()), [config for config, _ in jobs]
    if problems := tuple(dict.fromkeys(p for c in configs for p in count_problems(c, len(hosts)))):
        raise DeployError.of(problems)
    with contextlib.ExitStack() as stack:
        transports = [_open(host, options, stack) for host in hosts]
        facts = [look_at_host(transport, configs, run_id=None) for transport in transports]
        named = _Hosts(hosts, transports, facts)
        plans, reaches = [], dict[str, Reach]()
        for config, run_id in jobs:
            # what is tried between hosts differs by the engines' ports alone
            ports = str([far_engine_ports(config, rank, one) for rank, one in enumerate(facts)])
            if ports not in reaches:
                reaches[ports] = _reach(config, named)
            code = read_code(root, config)
            plans.append(
                _plan(config, code, run_id, named, reaches[ports], busy_ok=options.busy_ok)
            )
        return plans


def refuse_queue(queue: QueueWish | SlurmOptions | None) -> None:
    """Raise for a job of several hosts that is to wait in a queue."""
    if queue is not None:
        raise DeployError(
            "--wait and --queue are for runs on one host.",
            found="several hosts, each with a queue of its own: two jobs, each with its turn on one of them, would"
            " wait for each other for ever",
            fix="leave them out (a sweep's runs start one after another even so), or name one host",
        )


@dataclass(frozen=True)
class _Hosts:
    """The hosts of the job, the ways to them, and what they are."""

    named: Sequence[NamedHost]
    transports: Sequence[Transport]
    facts: Sequence[HostFacts]

    @property
    def targets(self) -> list[str]:
        return [host.target for host in self.named]


def _open(host: NamedHost, options: StartOptions, stack: contextlib.ExitStack) -> Transport:
    transport = open_transport(host.target, accept_new_host_key=options.accept_new_host_key)
    return stack.enter_context(contextlib.closing(transport))


def _plan(
    config: Config, code: Code, run_id: str, hosts: _Hosts, reach: Reach, *, busy_ok: bool
) -> list[Plan]:
    """Return the plan of each host, the first with what is wrong between them."""
    group = _group(config, hosts, reach.places)
    plans = [
        plan_run(
            config,
            code,
            _as_host(config, one, rank),
            run_id,
            target=hosts.targets[rank],
            busy_ok=busy_ok,
            group=dataclasses.replace(group, rank=rank),
        )
        for rank, one in enumerate(hosts.facts)
    ]
    differing = tuple(fit_problems(hosts.targets, hosts.facts, plans))
    notes = tuple(
        f"the hosts meet at {host.address} ({host.interface}) of {host.target}"
        for host in group.hosts
    )
    if group.fewer:
        counts = " or ".join(map(str, reversed(group.fewer)))
        notes += (f"where hosts die, the run goes on with {counts} of them: target.hosts_min",)
    plans[0] = dataclasses.replace(
        plans[0],
        problems=(*plans[0].problems, *differing),
        notes=(*plans[0].notes, *notes),
        warnings=(*plans[0].warnings, *reach.warnings),
    )
    return plans


def _reach(config: Config, hosts: _Hosts) -> Reach:
    """Return where the hosts meet. Raises DeployError where some do not reach each other."""
    # its plan says so: there is none to be tried with
    if any(one.python is None for one in hosts.facts):
        return Reach((Place("", "", (0, 0)),) * len(hosts.named), (), ())
    sides = [
        AskedHost(
            transport,
            one.python or "",
            host.address,
            tuple(
                port for port in far_engine_ports(config, rank, one) if port not in one.ports_in_use
            ),
        )
        for rank, (host, transport, one) in enumerate(
            zip(hosts.named, hosts.transports, hosts.facts, strict=True)
        )
    ]
    reach = find_reach(sides)
    if reach.problems:
        raise DeployError.of(reach.problems)
    return reach


def _group(config: Config, hosts: _Hosts, places: Sequence[Place]) -> HostGroup:
    supervisors, trainers = places[0].ports[:2]
    named = []
    for rank, (target, one, place) in enumerate(
        zip(hosts.targets, hosts.facts, places, strict=True)
    ):
        serves = serves_far(config) and rank in config.engine_hosts
        ports = far_engine_ports(config, rank, one) if rank else own_engine_ports(config, one)
        host = GroupHost(
            target=target,
            name=one.host,
            address=place.address,
            interface=place.interface,
            trains=rank < config.target.hosts,
            engine_port=ports[0] if serves and ports else None,
            receiver_port=place.ports[0] if serves and rank else None,
        )
        named.append(host)
    return HostGroup(
        rank=0,
        hosts=named,
        supervisor_port=supervisors,
        trainer_port=trainers,
        fewer=config.fewer_hosts(),
    )


def _as_host(config: Config, facts: HostFacts, rank: int) -> HostFacts:
    """Return the facts as they count for the host `rank`: checkpoints are the first one's alone; data is read where
    ranks run."""
    if rank == 0:
        return facts
    comes = {config.output.source_checkpoint}
    if rank >= config.target.hosts:
        comes |= {*required_paths(config)} - {config.model.name}
    come = {path: True for path in comes if path is not None}
    return dataclasses.replace(facts, paths={**facts.paths, **come})
