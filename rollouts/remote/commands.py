"""The verbs of `deploy` that do something. deploy.py parses and prints; looks.py has the verbs that only look.

A verb returns an Answer, and raises DeployError for what it cannot do. `deploy` and `attach`, which follow a run, write
to a screen and return the exit code: an error while they print says how far the run has come.
"""

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rollouts.config import Config
from rollouts.remote import slurm_start
from rollouts.remote.errors import DeployError, HostGoneError, TransportError
from rollouts.remote.host.facts import HostFacts, gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.read_answer import read_answer
from rollouts.remote.host.transport import LOCAL_TARGET, Transport
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.machine_end import after_interruption, after_run, alarm, bills_on
from rollouts.remote.plan import (
    Plan,
    QueueWish,
    SlurmOptions,
    free_ports_wanted,
    make_plan,
    required_paths,
    required_ports,
)
from rollouts.remote.plan.group_plan import count_problems
from rollouts.remote.plan.host_part import own_config, part_of
from rollouts.remote.rented_host import lease_of
from rollouts.remote.reporting import leave_if_unread, reporting
from rollouts.remote.repository import Code, find_repository, read_code
from rollouts.remote.run import registry, resumable
from rollouts.remote.run.last_seen import last_seen
from rollouts.remote.run.mirror_note import write_note
from rollouts.remote.run.open_run import OpenRun, open_run
from rollouts.remote.run.other_hosts import (
    execute_on_all,
    pull_others,
    stop_on,
    stop_others,
    withdraw_stops,
)
from rollouts.remote.run.pull import final_pull
from rollouts.remote.run.run_names import known_run, name_problems
from rollouts.remote.run.wanted import EVERYTHING, ToBring
from rollouts.remote.texts import end_answer, forgotten_text, how_to_go_on, plan_text
from rollouts.remote.watch_run import lost_host, note_stop, watch_run
from rollouts.run_dir import FINAL_STATES, HostGroup
from rollouts.view.answer import Answer
from rollouts.view.escape import one_line
from rollouts.view.reporter import Reporter
from rollouts.view.screen import Screen

RUN_ID_CHARS_MAX = 80  # run_dir.valid_run_id


def start(
    config: Config,
    screen: Screen,
    *,
    remote: str | None,
    run_id: str,
    accept_new_host_key: bool,
    busy_ok: bool,
    plan_only: bool = False,
    detach: bool = False,
    wanted: ToBring = EVERYTHING,
    queue: QueueWish | SlurmOptions | None = None,
) -> int:
    """Plan, send, launch and watch a run of a config that is checked. Returns the job's exit code.

    `queue`: it waits for its turn on the host, or for Slurm's.
    """
    if config.provision is not None and remote is None:
        fix = "`deploy CONFIG` rents it; or set provision=None, or name a host"
        raise DeployError(
            "the config rents a machine, which is done by the command alone.", fix=fix
        )
    with as_deploy_errors() as progress:
        root = find_repository(Path.cwd())
        if told := alarm(run_id):
            screen.alarm(told)
        with (
            contextlib.closing(
                open_transport(remote, accept_new_host_key=accept_new_host_key)
            ) as transport,
            ThreadPoolExecutor(1) as meanwhile,
        ):
            reading = meanwhile.submit(read_code, root, config)
            facts = look_at_host(transport, [config], run_id=run_id)
            code, target = reading.result(), remote or LOCAL_TARGET
            planned = partial(plan_run, config, code, run_id=run_id, target=target, queue=queue)
            plan, *others = slurm_start.plans(
                partial(planned, busy_ok=busy_ok), config, facts, queue
            )
            plan = slurm_start.checked(plan, transport, facts)
            if plan_only:
                screen.show(Answer(plan.to_json(), plan_text(plan)))
            if plan.problems:
                raise DeployError.of(plan.problems)
            if plan_only:
                return 0
            for warning in plan.warnings:
                screen.warn(warning)
            entry = registry.register(
                plan, config, root, code.record(), now=time.time(), others=others
            )
            progress.run_id, progress.target, progress.reached = (
                entry.run_id,
                entry.target,
                "registered",
            )
            run = OpenRun(entry, facts, transport, None, "never launched", progress, wanted)
            return launch_and_watch(run, config, screen, detach=detach)


def new_run_id(config: Config, label: str = "") -> str:
    """Return <experiment>-<date>-<time>-<random>, and in a sweep what differs from its other runs."""
    name = (
        f"{config.output.experiment_name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    )
    return f"{name}-{label}"[:RUN_ID_CHARS_MAX].rstrip("-_") if label else name


def look_at_host(
    transport: Transport, configs: Sequence[Config], *, run_id: str | None
) -> HostFacts:
    """Ask the host all that plans of these configs need to know, at once.

    The way of files to a rented machine is not tried beforehand: where the code does not get there, the next is rented.
    """
    return gather_facts(
        transport,
        ports=sorted({port for config in configs for port in required_ports(config)}),
        paths=sorted({path for config in configs for path in required_paths(config)}),
        run_id=run_id,
        free_ports=max(map(free_ports_wanted, configs)),
        check_way=lease_of(transport.target) is None,
    )


def plan_run(
    config: Config,
    code: Code,
    facts: HostFacts,
    run_id: str,
    *,
    target: str,
    busy_ok: bool,
    queue: QueueWish | SlurmOptions | None = None,
    group: HostGroup | None = None,
) -> Plan:
    """Return the plan of a new run of `code`, with every reason against it.

    `group`: the hosts of a run on several, of which this is one.
    """
    wanted = required_ports(own_config(config, part_of(config, group)))
    plan = make_plan(
        config,
        dataclasses.replace(
            facts, ports_in_use=tuple(port for port in facts.ports_in_use if port in wanted)
        ),
        code,
        target=target,
        run_id=run_id,
        local_dir=str(mirror_dir(config, code.root, run_id)),
        secrets_set=[name for name in config.host.secrets if os.environ.get(name)],
        busy_ok=busy_ok,
        queue=queue,
        group=group,
    )
    hosts = 1 if group is None else len(group.hosts)
    by_slurm = isinstance(queue, SlurmOptions)  # then the number of hosts is told by its own words
    problems = (
        *(() if by_slurm else count_problems(config, hosts)),
        *plan.problems,
        *name_problems(run_id, plan.local_dir),
    )
    return dataclasses.replace(plan, problems=problems)


def launch_and_watch(run: OpenRun, config: Config, screen: Screen, *, detach: bool) -> int:
    """Take a registered run to its end, or to where the user detaches."""
    entry = run.entry
    with reporting(run, screen) as reporter:
        reporter.say("run", f"{entry.run_id} on {entry.target}")
        _launch(run, config, reporter)
        if not detach:
            return screen.show(_watch_to_end(run, reporter))
        reporter.close()
        write_note(entry, now=time.time(), followed_by=None)
        document = {
            "type": "result",
            "run_id": entry.run_id,
            "state": "launched",
            "exit_code": None,
        }
        return screen.show(Answer(document, how_to_go_on(entry)))


def _launch(run: OpenRun, config: Config, reporter: Reporter) -> None:
    """Send and start it. Raises DeployError, and keeps the reason for `deploy ls`.

    `run.progress` says whether it may have started.
    """
    entry, progress = run.entry, run.progress

    def say(phase: str, text: str) -> None:
        if phase == "launch":
            progress.reached = "launching"
        reporter.say(phase, text)

    try:
        execute_on_all(entry, config, run.transport, run.facts.path, say)
    except DeployError as error:
        if not isinstance(error, TransportError) and not error.started:
            progress.reached = "registered"  # the launcher answered that it started nothing
        if progress.reached == "registered":
            with contextlib.suppress(OSError):
                registry.note_reason(
                    entry, "\n".join(problem.text() for problem in error.problems)[:3000]
                )
        raise
    registry.mark_launched(entry)
    resumable.fill_rows(entry)
    progress.reached = "launched"


def attach(
    run_id: str,
    screen: Screen,
    *,
    remote: str | None,
    accept_new_host_key: bool,
    wanted: ToBring = EVERYTHING,
) -> int:
    """Resume from wherever the last deploy stopped (`deploy attach RUN`)."""
    with open_run(run_id, remote, accept_new_host_key=accept_new_host_key, wanted=wanted) as run:
        entry = run.entry
        if run.trace == "gone":
            raise run.missing()
        if run.trace in ("never launched", "being launched"):
            run.progress.reached = "nothing" if entry.adopted else "registered"
            config = registry.planned(entry)
            registry.fill_mirror(entry)
            if run.trace == "never launched":  # a stop that was asked for before counts no more
                withdraw_stops(entry, run.transport)
            return launch_and_watch(run, config, screen, detach=False)
        with reporting(run, screen) as reporter:
            return screen.show(_watch_to_end(run, reporter))


def _watch_to_end(run: OpenRun, reporter: Reporter) -> Answer:
    entry = run.entry
    write_note(entry, now=time.time(), followed_by=os.getpid())
    run.progress.reached = "launched"
    leave_if_unread(entry.run_id)
    try:
        result = watch_run(run, reporter)
    except HostGoneError as error:
        reporter.close()
        raise _interrupted(run, error) from None
    run.progress.reached = "ended"
    notes, pull_error = list(result.notes), None
    left: tuple[str, ...] = ()

    def say(phase: str, text: str) -> None:
        notes.append(text) if phase == "note" and text not in notes else reporter.say(phase, text)

    try:
        left = final_pull(run.connection, say)
        notes += pull_others(entry)
    except DeployError as error:
        # the job's end is told first, and the run's files are still on the host
        pull_error = error
        pull_error.started = True
    reporter.close()
    if (lost := lost_host(entry, result.state, pulled=pull_error is None and not left)) is not None:
        raise _interrupted(run, lost)
    complete = pull_error is None and not left and result.state in FINAL_STATES
    if told := after_run(entry.run_id, complete=complete):
        notes.append(told)
    with contextlib.suppress(OSError, DeployError):
        write_note(entry, now=time.time(), followed_by=None, complete=complete)
    return end_answer(entry, result, pull_error, notes)


def _interrupted(run: OpenRun, error: HostGoneError) -> HostGoneError:
    """End the machines of a run that lost one, and return the error with what became of them."""
    run.progress.reached = "interrupted"
    write_note(run.entry, now=time.time(), followed_by=None)
    error.standing = after_interruption(error)
    return error


def stop(run_id: str, *, remote: str | None, now: bool = False) -> Answer:
    """End a run's processes on its host (`deploy stop RUN`). The exit code is 0 however the run ended.

    Steps that are trained save a checkpoint first, unless `now`. A stop is final, also where the run's rented machine
    is taken away meanwhile: it is written down here before the host is asked.
    """
    if (told := note_stop(run_id, remote)) is not None:
        return told
    with open_run(run_id, remote) as run:
        entry = run.entry
        done = stop_on(entry, run.transport, run.python, now=now)
        if done.returncode != 0 and run.row is None:
            raise run.missing()
        if done.returncode != 0:
            raise DeployError(
                f"{entry.run_id} could not be stopped.", found=done.err[-2000:], started=True
            )
        fields = {"state": str, "exit_code": int | None}
        said = read_answer(entry.target, "the stop", done.out, fields, started=True)
        notes = tuple(f"warning: {note}" for note in stop_others(entry))
    said = {**{name: said[name] for name in fields}, "checkpoint": said.get("checkpoint")}
    if said["state"] == "not launched":
        text = f"{entry.run_id}: not launched, and not to be; `deploy attach {entry.run_id}` would"
    else:
        text = (
            f"{entry.run_id}: {said['state']}, exit code {said['exit_code']}\n"
            f"last checkpoint   {one_line(said['checkpoint'] or 'none')}\nresults   deploy pull {entry.run_id}"
        )
    remarks = (*notes, *bills_on(entry.run_id))
    return Answer({"run_id": entry.run_id, **said}, text, remarks=remarks)


def pull_run(
    run_id: str, screen: Screen, *, remote: str | None, wanted: ToBring = EVERYTHING
) -> Answer:
    """Bring all results that there are now, verified (`deploy pull RUN`)."""
    with open_run(run_id, remote, needs_files=True, wanted=wanted) as run:
        entry, notes = run.entry, []

        def say(phase: str, text: str) -> None:
            notes.append(text) if phase == "note" else screen.remark(f"{phase}: {text}")

        try:
            pulled = run.pull(say)
            notes += pull_others(entry)
        finally:
            for note in notes:
                screen.remark(f"note: {note}")
        state = pulled.state
        complete = state in FINAL_STATES and not pulled.left
        write_note(entry, now=time.time(), followed_by=None, complete=complete)
    checkpoints = sorted(
        str(path.parent) for path in entry.mirror.checkpoints.glob("*/step_*/manifest.json")
    )
    found = {
        "state": state,
        "local_dir": entry.local_dir,
        "checkpoints": checkpoints,
        "notes": notes,
    }
    found["left"] = list(pulled.left)
    return Answer(
        {"run_id": entry.run_id, **found},
        f"{entry.run_id} ({state}) is in {entry.local_dir}, with {len(checkpoints)} checkpoint"
        + ("" if len(checkpoints) == 1 else "s"),
        remarks=bills_on(entry.run_id) if state in FINAL_STATES else (),
    )


def forget(run_id: str) -> Answer:
    """Drop this machine's record of a run (`deploy forget RUN`). Its host and the results here stay as they are."""
    with as_deploy_errors():
        entry = known_run(run_id)
        seen = last_seen(entry)
        registry.forget(entry)
        document = {
            "run_id": entry.run_id,
            "local_dir": entry.local_dir,
            "run_path": entry.run_path,
        }
        return Answer(document, forgotten_text(entry, seen["state"]))


# --- what a deploy starts from --------------------------------------------------------------------------------------


def mirror_dir(config: Config, root: Path, run_id: str) -> Path:
    """Return <save_dir>/<experiment_name>/<run_id>; a relative save_dir starts at the repository's root."""
    save_dir = Path(config.output.save_dir).expanduser()
    return root / save_dir / config.output.experiment_name / run_id
