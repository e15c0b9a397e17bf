"""`deploy CONFIG --set field=v1,v2`: the runs of a sweep, planned together, run in turn, and a table at the end.

Each run is like one that was deployed alone: its own config, record, mirror and exit code. A run that fails does not
end the sweep. Ctrl-C detaches from the run under way and starts no further one.
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.config.overrides import combinations
from rollouts.remote.commands import look_at_host, new_run_id, plan_run, start
from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.named_hosts import NamedHost
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan import Plan, QueueWish
from rollouts.remote.read_config import read_variants
from rollouts.remote.reporting import DETACHED
from rollouts.remote.repository import find_repository, read_code, refuse_stray_config
from rollouts.remote.run.wanted import EVERYTHING, ToBring
from rollouts.remote.several_hosts import StartOptions, plan_all, refuse_queue, start_on
from rollouts.remote.sweep_again import end_of_sweep, follow_sweep
from rollouts.remote.sweep_runs import (
    NOT_STARTED,
    Outcome,
    SweepMember,
    SweepRecord,
    as_json_value,
    outcome_table,
    remember,
)
from rollouts.view.answer import Answer
from rollouts.view.screen import Screen
from rollouts.view.tables import columns

RUNS_MAX = 20  # of a sweep, without --yes


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of `deploy CONFIG` that a sweep takes."""

    hosts: Sequence[NamedHost]  # several: each run is one job on all of them
    hosts_words: Sequence[str]  # of the command line, which name them
    skip: int  # so many runs from the first one on are left out: they ran before
    yes: bool  # more than RUNS_MAX runs are meant
    accept_new_host_key: bool
    busy_ok: bool
    queue: QueueWish | None  # each run waits for its turn on the host
    all_at_once: bool  # all of them are sent to the host's queue (--queue)
    detach: bool  # ... and not followed
    wanted: ToBring = EVERYTHING

    @property
    def remote(self) -> str | None:
        """Return the host that a run has, or that leads."""
        return self.hosts[0].target if self.hosts else None

    def of_run(self, run_id: str | None) -> StartOptions:
        """Return how one run starts on several hosts."""
        key, wanted = self.accept_new_host_key, self.wanted
        return StartOptions(run_id, False, False, key, self.busy_ok, wanted, self.queue)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, before it starts."""

    member: SweepMember
    config: Config


def asks_for_several(settings: Sequence[str]) -> bool:
    return combinations(settings) > 1


def check_alone(*, skip: int, yes: bool) -> None:
    """Raise DeployError for options of a sweep where `--set` asks for one run."""
    given = f"--skip {skip}" if skip else "--yes" if yes else ""
    if given:
        raise DeployError(
            f"{given} without a sweep: there is one run.",
            needed="--set with several values of a field, such as --set rl.matrix_lr=1e-6,3e-6",
            fix=f"leave out {given}",
        )


def check_options(options: SweepOptions, run_id: str | None) -> None:
    """Raise DeployError for options that have no meaning for several runs."""
    several = len(options.hosts) > 1
    if several:
        refuse_queue(options.queue)
    if options.detach and not options.all_at_once:
        queue = "" if several else "add --queue: then the host starts them; or "
        raise DeployError(
            "--detach with a sweep: its runs start one after another, from this machine.",
            fix=f"{queue}leave out --detach, and let the command run (in tmux, say)",
        )
    if run_id is not None:
        raise DeployError(
            f"--run-id {run_id} with a sweep: it names one run.",
            fix="leave it out: the names of a sweep's runs say what differs",
        )


def sweep(
    config_path: str,
    screen: Screen,
    settings: Sequence[str],
    options: SweepOptions,
    *,
    plan_only: bool,
) -> int:
    """Plan all runs and start none if one of them cannot run; then run one after another, or send all to the queue.

    Returns 0 if all of them ended with 0, else the first other exit code.
    """
    with as_deploy_errors():
        count = combinations(settings)
        if count > RUNS_MAX and not options.yes:
            raise DeployError(
                f"--set asks for {count} runs, more than {RUNS_MAX}.",
                needed="--yes for a sweep of that size",
                fix="add --yes, or name fewer values",
            )
        runs = _runs(config_path, settings, options.skip)
        refuse_stray_config(find_repository(Path.cwd()), Path(config_path))
        plans = _plans(runs, options)
        if plan_only:
            screen.show(_plan_answer(runs, plans, options))
        if problems := _problems(runs, plans):
            raise DeployError.of(problems)
    if plan_only:
        return 0
    again = _command(config_path, settings, options)
    target = options.remote or LOCAL_TARGET
    name = new_run_id(runs[0].config)
    with as_deploy_errors():
        record = remember(name, target, [run.member for run in runs])
    return (
        _queue_all(runs, record, screen, options, again)
        if options.all_at_once
        else _run_all(runs, record, screen, options, again)
    )


def _runs(config_path: str, settings: Sequence[str], skip: int) -> list[SweepRun]:
    variants = read_variants(config_path, settings)
    if not 0 <= skip < len(variants):
        raise DeployError(
            f"--skip {skip}: the sweep has {len(variants)} runs.",
            needed=f"0 to {len(variants) - 1}",
        )
    first = variants[0].values
    differing = [
        path for path in first if any(variant.values[path] != first[path] for variant in variants)
    ]
    return [
        SweepRun(
            SweepMember(
                new_run_id(variant.config, variant.label),
                {path: as_json_value(variant.values[path]) for path in differing},
            ),
            variant.config,
        )
        for variant in variants[skip:]
    ]


def _plans(runs: Sequence[SweepRun], options: SweepOptions) -> list[list[Plan]]:
    """Plan every run by one look at the host, or at each of several: a plan a host."""
    if len(options.hosts) > 1:
        jobs = [(run.config, run.member.run_id) for run in runs]
        return plan_all(jobs, options.hosts, options.of_run(None))
    root, target = find_repository(Path.cwd()), options.remote or LOCAL_TARGET
    key = options.accept_new_host_key
    with contextlib.closing(open_transport(options.remote, accept_new_host_key=key)) as transport:
        facts = look_at_host(transport, [run.config for run in runs], run_id=None)
    how: dict[str, Any] = {"target": target, "busy_ok": options.busy_ok, "queue": options.queue}
    return [
        [plan_run(run.config, read_code(root, run.config), facts, run.member.run_id, **how)]
        for run in runs
    ]


def _problems(runs: Sequence[SweepRun], plans: Sequence[Sequence[Plan]]) -> list[Problem]:
    """Return every problem once, with the runs that have it where these are not all."""
    whose: dict[Problem, list[str]] = {}
    for run, parts in zip(runs, plans, strict=True):
        for problem in _of_all(parts):
            whose.setdefault(problem, []).append(run.member.differs)
    found = []
    for problem, names in whose.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        prefix = "" if len(names) == len(runs) else f"{', '.join(names[:3])}{more}: "
        found.append(Problem(prefix + problem.message, problem.found, problem.needed, problem.fix))
    return found


def _of_all(parts: Sequence[Plan]) -> list[Problem]:
    """Return the problems of one run, on all of its hosts."""
    return list(dict.fromkeys(problem for part in parts for problem in part.problems))


def _plan_answer(
    runs: Sequence[SweepRun], plans: Sequence[Sequence[Plan]], options: SweepOptions
) -> Answer:
    rows, documents = [], []
    targets = [host.target for host in options.hosts] or [LOCAL_TARGET]
    for at, (run, parts) in enumerate(zip(runs, plans, strict=True), 1):
        problems = _of_all(parts)
        count = len(problems)
        fine = "ready" if count == 0 else f"{count} problem{'s' if count > 1 else ''}"
        rows.append([f"{at}.", run.member.run_id, run.member.differs, fine])
        rows += [["", f"  problem: {problem.message}", "", ""] for problem in problems]
        shown = [part.to_json() for part in parts]
        documents.append(
            {"run_id": run.member.run_id, "values": run.member.values, "plan": shown[0]}
            | ({"plans": shown} if len(shown) > 1 else {})
        )
    warnings = [text for parts in plans for part in parts for text in part.warnings]
    notes = dict.fromkeys(f"warning: {text}" for text in warnings)
    how = "in the host's queue" if options.all_at_once else "one after another"
    where = ", ".join(targets)
    heading = f"sweep of {len(runs)} runs on {where}, {how} (nothing is touched)"
    text = "\n".join([heading, _table(rows), *notes])
    return Answer({"type": "sweep_plan", "target": where, "runs": documents}, text)


def _table(rows: list[list[str]]) -> str:
    """Return plan lines, with problems under the line of their run."""
    listed = iter(columns([row for row in rows if row[0]]).splitlines())
    return "\n".join(next(listed) if row[0] else f"    {row[1]}" for row in rows)


def _run_all(
    runs: Sequence[SweepRun],
    record: SweepRecord,
    screen: Screen,
    options: SweepOptions,
    again: Sequence[str],
) -> int:
    outcomes = [Outcome(run.member) for run in runs]
    for at, (run, outcome) in enumerate(zip(runs, outcomes, strict=True), 1):
        if not screen.as_json:
            screen.show(Answer(None, f"\nrun {at} of {len(runs)}: {outcome.run.differs}"))
        goes_on = _run_one(run, outcome, screen, options)
        outcome.look_back()
        if not goes_on:
            return _stopped(outcomes, screen, options, again)
    return screen.show(end_of_sweep(record, outcomes))


def _run_one(run: SweepRun, outcome: Outcome, screen: Screen, options: SweepOptions) -> bool:
    """Run it to its end, or send it to the queue. Returns whether the sweep goes on.

    It does not after Ctrl-C, nor beside a run that may be live and was not meant to be.
    """
    try:
        if len(options.hosts) > 1:
            of_run = options.of_run(run.member.run_id)
            outcome.exit_code = start_on(run.config, screen, options.hosts, of_run)
            return True
        outcome.exit_code = start(
            run.config,
            screen,
            remote=options.remote,
            run_id=run.member.run_id,
            accept_new_host_key=options.accept_new_host_key,
            busy_ok=options.busy_ok,
            wanted=options.wanted,
            detach=options.all_at_once,
            queue=options.queue,
        )
    except SystemExit as detached:
        outcome.exit_code = DETACHED if detached.code == DETACHED else 1
        return False
    except DeployError as error:
        screen.error(error.to_json(), error.text())
        outcome.exit_code = error.exit_code
        return not error.started and error.exit_code != DETACHED
    return True


def _queue_all(
    runs: Sequence[SweepRun],
    record: SweepRecord,
    screen: Screen,
    options: SweepOptions,
    again: Sequence[str],
) -> int:
    """Send all runs to the host's queue; then follow them, unless they are not to be followed."""
    outcomes = [Outcome(run.member) for run in runs]
    for run, outcome in zip(runs, outcomes, strict=True):
        goes_on = _run_one(run, outcome, _Brief(as_json=screen.as_json), options)
        if not goes_on:
            outcome.look_back()
            return _stopped(outcomes, screen, options, again)
        outcome.exit_code = outcome.exit_code or None  # 0: it was sent
    sent = [outcome.run.run_id for outcome in outcomes if outcome.exit_code is None]
    text = f"\n{len(sent)} of {len(runs)} runs are in the queue of {record.target}, also when this machine is off.\n"
    text += f"  follow  deploy sweep {record.name} -f\n  look    deploy sweep {record.name}"
    screen.show(
        Answer(
            {"type": "queued", "sweep": record.name, "target": record.target, "runs": sent}, text
        )
    )
    if options.detach:
        return next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0)
    return follow_sweep(record, outcomes, screen, options.wanted)


class _Brief(Screen):
    """A screen that leaves out how to go on with each of many runs."""

    def show(self, answer: Answer) -> int:
        return super().show(answer if self.as_json else dataclasses.replace(answer, text=None))


def _stopped(
    outcomes: Sequence[Outcome], screen: Screen, options: SweepOptions, again: Sequence[str]
) -> int:
    """Say which runs were not started, and the command that goes on with them."""
    begun = [outcome for outcome in outcomes if outcome.state != NOT_STARTED]
    left = [
        outcome
        for outcome in outcomes
        if outcome not in begun and outcome.exit_code in (None, DETACHED)
    ]
    done = options.skip + len(outcomes) - len(left)
    command = shlex.join([*again, "--skip", str(done)])
    code = next((outcome.exit_code for outcome in outcomes if outcome.exit_code), DETACHED)
    code = DETACHED if any(outcome.exit_code == DETACHED for outcome in outcomes) else code
    lines = [outcome_table(begun)] if begun else []
    if left:
        lines += [f"not started: {len(left)} of {len(outcomes)} runs"]
        lines += [f"  {outcome.run.differs}" for outcome in left]
        lines += [f"go on with them: {command}"]
    document = {
        "type": "sweep",
        "runs": [outcome.to_json() for outcome in outcomes],
        "go_on": command if left else None,
        "exit_code": code,
    }
    return screen.show(Answer(document, "\n" + "\n".join(lines), exit_code=code))


def _command(config_path: str, settings: Sequence[str], options: SweepOptions) -> list[str]:
    """Return the command line of this sweep, without --skip."""
    line = ["deploy", config_path, *(word for setting in settings for word in ("--set", setting))]
    line += options.hosts_words
    line += options.wanted.words
    if options.queue is not None:
        line += ["--queue" if options.queue.any_gpus else "--wait"]
        line += ["--at-once", str(options.queue.at_once)] if options.queue.at_once != 1 else []
    line += ["--detach"] if options.detach else []
    return [*line, *(["--busy-ok"] if options.busy_ok else []), *(["--yes"] if options.yes else [])]
