"""`deploy CONFIG` with more than one host: planned together, started together, followed as one run on the first.

The path is the one of a single host. Before the plan each host is asked what it has, and how it reaches the others.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollouts.config import Config
from rollouts.config.overrides import combinations
from rollouts.remote.commands import launch_and_watch, look_at_host, new_run_id, plan_run
from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.named_hosts import NamedHost
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.reach import AskedHost, Place, Reach, find_reach
from rollouts.remote.host.transport import Transport
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan import Plan, QueueWish
from rollouts.remote.plan.group_plan import count_problems, fit_problems
from rollouts.remote.read_config import read_variants
from rollouts.remote.repository import Code, find_repository, refuse_stray_config
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
    queue: QueueWish | None


def deploy_on_several(
    config_path: str, screen: Screen, hosts: Sequence[NamedHost], settings: Sequence[str], options: StartOptions
) -> int:
    """Plan, send, launch and watch a run on several hosts. Returns the job's exit code."""
    with as_deploy_errors() as progress, contextlib.ExitStack() as stack:
        if options.queue is not None:
            raise DeployError("--wait and --queue are for runs on one host.", fix="leave them out, or name one host")
        if combinations(settings) > 1:
            fix = "name one value a field, and start the runs one after another"
            raise DeployError("a sweep runs on one host, and the command names several.", fix=fix)
        config = read_variants(config_path, settings)[0].config
        root = find_repository(Path.cwd())
        refuse_stray_config(root, Path(config_path))
        if problems := tuple(count_problems(config, len(hosts))):
            raise DeployError.of(problems)
        transports = [_open(host, options, stack) for host in hosts]
        run_id = options.run_id or new_run_id(config)
        facts = [look_at_host(transport, [config], run_id=run_id) for transport in transports]
        plans, code = _plan(config, root, run_id, _Hosts(hosts, transports, facts), busy_ok=options.busy_ok)
        if options.plan_only:
            screen.show(Answer([plan.to_json() for plan in plans], "\n\n".join(map(plan_text, plans))))
        if problems := tuple(dict.fromkeys(problem for plan in plans for problem in plan.problems)):
            raise DeployError.of(problems)
        if options.plan_only:
            return 0
        for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
            screen.warn(warning)
        first, *others = plans
        entry = registry.register(first, config, root, code.record(), now=time.time(), others=others)
        progress.run_id, progress.target, progress.reached = entry.run_id, entry.target, "registered"
        run = OpenRun(entry, facts[0], transports[0], None, "never launched", progress, options.wanted)
        return launch_and_watch(run, config, screen, detach=options.detach)


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


def _plan(config: Config, root: Path, run_id: str, hosts: _Hosts, *, busy_ok: bool) -> tuple[list[Plan], Code]:
    """Return the plan of each host, the first with what is wrong between them; and the code that all run."""
    reach = _reach(hosts)
    if reach.problems:
        raise DeployError.of(reach.problems)
    group = _group(hosts, reach.places)
    made = [
        plan_run(
            config,
            root,
            _as_host(config, one, rank),
            run_id,
            target=hosts.targets[rank],
            busy_ok=busy_ok,
            group=dataclasses.replace(group, rank=rank),
        )
        for rank, one in enumerate(hosts.facts)
    ]
    plans, code = [plan for plan, _ in made], made[0][1]
    differing = tuple(fit_problems(hosts.targets, hosts.facts, plans))
    notes = tuple(f"the hosts meet at {host.address} ({host.interface}) of {host.target}" for host in group.hosts)
    plans[0] = dataclasses.replace(
        plans[0],
        problems=(*plans[0].problems, *differing),
        notes=(*plans[0].notes, *notes),
        warnings=(*plans[0].warnings, *reach.warnings),
    )
    return plans, code


def _reach(hosts: _Hosts) -> Reach:
    if any(one.python is None for one in hosts.facts):  # its plan says so: there is none to be tried with
        return Reach((Place("", "", (0, 0)),) * len(hosts.named), (), ())
    sides = [
        AskedHost(transport, one.python or "", host.address)
        for host, transport, one in zip(hosts.named, hosts.transports, hosts.facts, strict=True)
    ]
    return find_reach(sides)


def _group(hosts: _Hosts, places: Sequence[Place]) -> HostGroup:
    supervisors, trainers = places[0].ports
    named = [
        GroupHost(target=target, name=one.host, address=place.address, interface=place.interface)
        for target, one, place in zip(hosts.targets, hosts.facts, places, strict=True)
    ]
    return HostGroup(rank=0, hosts=named, supervisor_port=supervisors, trainer_port=trainers)


def _as_host(config: Config, facts: HostFacts, rank: int) -> HostFacts:
    """Return the facts as they count for the host `rank`: engines and checkpoints are the first one's alone."""
    if rank == 0:
        return facts
    source = config.output.source_checkpoint
    comes = {source: True} if source is not None else {}
    return dataclasses.replace(facts, ports_in_use=(), paths={**facts.paths, **comes})
