"""A run on several hosts: the first is the run to all verbs; here is what is done on the others besides.

All start or none: the code goes to every host first, then the others are launched, and the first last. Where one of
them refuses, those that were launched are stopped. A supervisor that is left alone ends by itself within two minutes.
"""

import contextlib
from collections.abc import Iterator, Sequence

from rollouts.config import Config
from rollouts.remote.errors import DeployError, UnreachableError
from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.read_answer import read_answer
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import Completed, Transport
from rollouts.remote.run import registry
from rollouts.remote.run.connection import RetryPolicy, RunConnection
from rollouts.remote.run.execute import execute, launch_there, send, withdraw_stop
from rollouts.remote.run.pull import pull
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import SILENT, GroupHost
from rollouts.view.escape import one_line
from rollouts.view.reporter import Say

STOP_MARGIN_S, REMOVE_TIMEOUT_S = 260.0, 3600.0  # of a stop, on_end may take 77 s, trackers 105
STOP_WAIT_S = 600.0  # worker.stop's, for the step under way and its checkpoint
LOOK_TIMEOUT_S = 10.0
# a host that is gone must not keep the results of the others waiting
ONE_TRY = RetryPolicy(total_s=10.0)


def execute_on_all(
    entry: RunEntry, config: Config, transport: Transport, path: str, say: Say
) -> None:
    """Bring the run to life on all of its hosts, or on none; `path` is the PATH it gets on the first.

    Raises DeployError. Done twice, the second time changes nothing.
    """
    if not _machines(entry):
        return execute(entry, config, transport, path, say)
    with contextlib.ExitStack() as stack:
        parts = [(entry.on(rank), _opened(entry, rank, stack)) for rank in _machines(entry)]
        paths = [gather_facts(their_transport).path for _, their_transport in parts]
        for part, their_transport in (*parts, (entry, transport)):
            send(part, their_transport, say)
        begun: list[tuple[RunEntry, Transport]] = []
        try:
            for (part, their_transport), their_path in zip(
                (*parts, (entry, transport)), (*paths, path), strict=True
            ):
                begun.append((part, their_transport))
                say("launch", f"on {part.target}")
                launch_there(part, config, their_transport, their_path, say)
        except DeployError:
            for part, their_transport in begun:
                with contextlib.suppress(DeployError):
                    stop_on(part, their_transport)
            raise


def targets_of(entry: RunEntry) -> list[str]:
    """Return the run's hosts, the first one first; of a job of Slurm's the login host."""
    targets = [entry.target, *(other["target"] for other in entry.others)]
    return list(dict.fromkeys(targets))


def withdraw_stops(entry: RunEntry, transport: Transport) -> None:
    """Let a stop that came before the launch count no more, on every host. Raises DeployError."""
    registry.withdraw_stop(entry)
    withdraw_stop(entry, transport)
    for rank in _machines(entry):
        with contextlib.ExitStack() as stack:
            withdraw_stop(entry.on(rank), _opened(entry, rank, stack))


def stop_on(
    entry: RunEntry, transport: Transport, python: str | None = None, *, now: bool = True
) -> Completed:
    """End the run's processes on one host; unless `now`, after a checkpoint. Raises TransportError."""
    options = ["--now"] if now else []
    argv, program = sent_program(
        python or entry.launch.base_python, "rollouts.worker.stop", entry.run_path, *options
    )
    grace_s = STOP_MARGIN_S if entry.stop_grace_s is None else entry.stop_grace_s
    return transport.run(argv, stdin=program, timeout_s=STOP_WAIT_S + 2 * grace_s + STOP_MARGIN_S)


def stop_others(entry: RunEntry) -> list[str]:
    """End the run on the hosts beside the first. Returns what failed, in words."""
    notes: list[str] = []
    for part, transport in _others(entry, _machines(entry), notes):
        try:
            done = stop_on(part, transport)
        except DeployError as error:
            notes.append(f"{part.target}: {error}")
            continue
        if done.returncode != 0 and "no run was launched there" not in done.err:
            notes.append(f"{part.target}: the run could not be stopped there: {done.err[-500:]}")
    return notes


def remove_others(entry: RunEntry) -> list[str]:
    """Remove the run's directories on the hosts beside the first. Returns what failed, in words."""
    notes: list[str] = []
    for part, transport in _others(entry, _machines(entry), notes):
        argv, program = sent_program(
            part.launch.base_python, "rollouts.worker.remove_run", "remove", part.run_path, "[]"
        )
        try:
            done = transport.run(argv, stdin=program, timeout_s=REMOVE_TIMEOUT_S)
            answer = read_answer(
                part.target,
                f"the removal of {part.run_path}",
                done.out,
                {"removed": bool, "reason": str},
            )
        except DeployError as error:
            notes.append(f"{part.target}: {part.run_path} was not removed: {error}")
            continue
        if answer["reason"]:
            notes.append(f"{part.target}: {answer['reason']}")
    return notes


def pull_others(entry: RunEntry) -> list[str]:
    """Bring what the hosts beside the first have of the run, their logs and events. Returns what failed, in words."""
    notes: list[str] = []
    for part, transport in _others(entry, _ranks(entry), notes):
        try:
            pull(RunConnection(part, part.launch.base_python, transport), policy=ONE_TRY)
        except DeployError as error:
            notes.append(f"{part.target}: what it has of the run was not pulled: {error}")
    return notes


def refuse_if_ended(entry: RunEntry) -> None:
    """Raise UnreachableError where another host ended because the first, which does not answer here, was silent there.

    It may have been cut off alone, and go on: then `deploy attach` finds it.
    """
    for part, transport in _others(entry, _machines(entry), []):
        try:
            done = transport.run(
                ["sh", "-c", 'tr -d "\\n" < "$1"', "sh", f"{part.run_path}/status.json"],
                timeout_s=LOOK_TIMEOUT_S,
            )
            said = read_answer(
                part.target, "its status", done.out, {"state": str, "message": str}, started=True
            )
        except DeployError:
            continue
        leader = entry.launch.group.leader if entry.launch.group is not None else None
        lost = leader is not None and f"{leader.name} ({leader.target}) {SILENT}" in said["message"]
        if said["state"] == "failed" and lost:
            error = UnreachableError(
                f"{entry.target} does not answer, and {entry.run_id} has ended on its other hosts.",
                found=f"{part.target}: {one_line(said['message'])}",
                fix=f"deploy resume {entry.run_id} --remote … on hosts that answer, from its last checkpoint here",
                started=True,
            )
            error.standing = f"if {entry.target} comes back: `deploy attach {entry.run_id}`"
            raise error


def names_of(entry: RunEntry) -> list[str]:
    """Return the names of the run's hosts, by their ranks; [] for a run on one."""
    return [host.name for host in _group_hosts(entry)]


def _group_hosts(entry: RunEntry) -> list[GroupHost]:
    group = entry.launch.group if entry.others else None
    return group.hosts if group is not None else []


def on_host(first: RunConnection, name: str, stack: contextlib.ExitStack) -> RunConnection:
    """Return the connection to the run's host of this name, or number. Raises DeployError for none."""
    entry = first.entry
    hosts = _group_hosts(entry)
    for rank, host in enumerate(hosts):
        if name in (host.name, host.target, str(rank)):
            return _connection(entry, rank, stack) if rank else first
    raise DeployError(
        f"{entry.run_id} has no host {name!r}.",
        found=f"hosts: {', '.join(host.name for host in hosts) or entry.target}",
    )


def _others(
    entry: RunEntry, ranks: Sequence[int], notes: list[str]
) -> Iterator[tuple[RunEntry, Transport]]:
    """Yield the run on each of these hosts, and the way there; those without one are noted."""
    for rank in ranks:
        with contextlib.ExitStack() as stack:
            try:
                transport = _opened(entry, rank, stack)
            except DeployError as error:
                notes.append(f"{entry.on(rank).target}: {error}")
                continue
            yield entry.on(rank), transport


def _connection(entry: RunEntry, rank: int, stack: contextlib.ExitStack) -> RunConnection:
    part = entry.on(rank)
    return RunConnection(part, part.launch.base_python, _opened(entry, rank, stack))


def _ranks(entry: RunEntry) -> range:
    return range(1, len(entry.others) + 1)


def _machines(entry: RunEntry) -> Sequence[int]:
    """Return the ranks of the hosts that are logged in to: none beside the first under Slurm, whose nodes share its
    directory."""
    return () if not entry.others or entry.launch.slurm is not None else _ranks(entry)


def _opened(entry: RunEntry, rank: int, stack: contextlib.ExitStack) -> Transport:
    return stack.enter_context(contextlib.closing(open_transport(entry.on(rank).target)))
