"""`deploy CONFIG --set field=v1,v2`: the runs of a sweep, planned together, run in turn, and a table at the end.

Each run is like one that was deployed alone: its own config, record, mirror and exit code. A run that fails does not
end the sweep. Ctrl-C detaches from the run under way and starts no further one.
"""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config import Config
from rollouts.config.overrides import combinations
from rollouts.remote.commands import DETACHED, look_at_host, new_run_id, plan_run, start
from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan import Plan
from rollouts.remote.read_config import read_variants
from rollouts.remote.repository import find_repository, refuse_stray_config
from rollouts.remote.run import registry
from rollouts.remote.run.last_seen import last_seen
from rollouts.remote.run.wanted import EVERYTHING, ToBring
from rollouts.run_dir import RunDir, iter_jsonl
from rollouts.view.answer import Answer
from rollouts.view.fold import ALL_TASKS, number
from rollouts.view.screen import Screen
from rollouts.view.tables import columns

RUNS_MAX = 20  # of a sweep, without --yes
NOT_STARTED = "not started"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of `deploy CONFIG` that a sweep takes."""

    remote: str | None
    skip: int  # so many runs from the first one on are left out: they ran before
    yes: bool  # more than RUNS_MAX runs are meant
    accept_new_host_key: bool
    busy_ok: bool
    wanted: ToBring = EVERYTHING


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, before it starts."""

    run_id: str
    config: Config
    values: dict[str, Any]  # of the fields that differ between the runs, by their paths

    @property
    def differs(self) -> str:
        return " ".join(f"{path.rpartition('.')[2]}={number(value)}" for path, value in self.values.items())


@dataclass
class Outcome:
    """How a run of a sweep ended, for the table."""

    run: SweepRun
    state: str = NOT_STARTED
    exit_code: int | None = None
    steps: str = "-"
    last: str = "-"  # reward, or loss
    exact_match: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run.run_id,
            "values": {path: repr_json(value) for path, value in self.run.values.items()},
            "state": self.state,
            "exit_code": self.exit_code,
            "steps": self.steps,
            "last": self.last,
            "exact_match": self.exact_match,
        }


def repr_json(value: Any) -> Any:
    """Return a field's value as JSON has it; a group of the schema as its call."""
    return value if value is None or isinstance(value, bool | int | float | str | list) else repr(value)


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


def check_options(*, detach: bool, run_id: str | None) -> None:
    """Raise DeployError for options that have no meaning for several runs."""
    if detach:
        raise DeployError(
            "--detach with a sweep: its runs start one after another, from this machine.",
            fix="leave out --detach, and let the command run (in tmux, say); or deploy the runs one by one",
        )
    if run_id is not None:
        raise DeployError(
            f"--run-id {run_id} with a sweep: it names one run.",
            fix="leave it out: the names of a sweep's runs say what differs",
        )


def sweep(config_path: str, screen: Screen, settings: Sequence[str], options: SweepOptions, *, plan_only: bool) -> int:
    """Plan all runs and start none if one of them cannot run; then run one after another.

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
            screen.show(_plan_answer(runs, plans, options.remote or LOCAL_TARGET))
        if problems := _problems(runs, plans):
            raise DeployError.of(problems)
    if plan_only:
        return 0
    again = _command(config_path, settings, options)
    return _run_all(runs, screen, options, again)


def _runs(config_path: str, settings: Sequence[str], skip: int) -> list[SweepRun]:
    variants = read_variants(config_path, settings)
    if not 0 <= skip < len(variants):
        raise DeployError(f"--skip {skip}: the sweep has {len(variants)} runs.", needed=f"0 to {len(variants) - 1}")
    first = variants[0].values
    differing = [path for path in first if any(variant.values[path] != first[path] for variant in variants)]
    return [
        SweepRun(
            new_run_id(variant.config, variant.label),
            variant.config,
            {path: variant.values[path] for path in differing},
        )
        for variant in variants[skip:]
    ]


def _plans(runs: Sequence[SweepRun], options: SweepOptions) -> list[Plan]:
    """Plan every run by one look at the host."""
    root, target = find_repository(Path.cwd()), options.remote or LOCAL_TARGET
    key = options.accept_new_host_key
    with contextlib.closing(open_transport(options.remote, accept_new_host_key=key)) as transport:
        facts = look_at_host(transport, [run.config for run in runs], run_id=None)
    return [plan_run(run.config, root, facts, run.run_id, target=target, busy_ok=options.busy_ok)[0] for run in runs]


def _problems(runs: Sequence[SweepRun], plans: Sequence[Plan]) -> list[Problem]:
    """Return every problem once, with the runs that have it where these are not all."""
    whose: dict[Problem, list[str]] = {}
    for run, plan in zip(runs, plans, strict=True):
        for problem in plan.problems:
            whose.setdefault(problem, []).append(run.differs)
    found = []
    for problem, names in whose.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        prefix = "" if len(names) == len(runs) else f"{', '.join(names[:3])}{more}: "
        found.append(Problem(prefix + problem.message, problem.found, problem.needed, problem.fix))
    return found


def _plan_answer(runs: Sequence[SweepRun], plans: Sequence[Plan], target: str) -> Answer:
    rows, documents = [], []
    for at, (run, plan) in enumerate(zip(runs, plans, strict=True), 1):
        count = len(plan.problems)
        fine = "ready" if count == 0 else f"{count} problem{'s' if count > 1 else ''}"
        rows.append([f"{at}.", run.run_id, run.differs, fine])
        rows += [["", f"  problem: {problem.message}", "", ""] for problem in plan.problems]
        values = {path: repr_json(value) for path, value in run.values.items()}
        documents.append({"run_id": run.run_id, "values": values, "plan": plan.to_json()})
    notes = dict.fromkeys(f"warning: {text}" for plan in plans for text in plan.warnings)
    heading = f"sweep of {len(runs)} runs on {target}, one after another (nothing is touched)"
    text = "\n".join([heading, _table(rows), *notes])
    return Answer({"type": "sweep_plan", "target": target, "runs": documents}, text)


def _table(rows: list[list[str]]) -> str:
    """Return plan lines, with problems under the line of their run."""
    listed = iter(columns([row for row in rows if row[0]]).splitlines())
    return "\n".join(next(listed) if row[0] else f"    {row[1]}" for row in rows)


def _run_all(runs: Sequence[SweepRun], screen: Screen, options: SweepOptions, again: Sequence[str]) -> int:
    outcomes = [Outcome(run) for run in runs]
    for at, outcome in enumerate(outcomes):
        if not screen.as_json:
            screen.show(Answer(None, f"\nrun {at + 1} of {len(runs)}: {outcome.run.differs}"))
        goes_on = _run_one(outcome, screen, options)
        _look_back(outcome)
        if not goes_on:
            return _stopped(outcomes, screen, options, again)
    code = next((outcome.exit_code or 0 for outcome in outcomes if outcome.exit_code), 0)
    document = {"type": "sweep", "runs": [outcome.to_json() for outcome in outcomes], "exit_code": code}
    return screen.show(Answer(document, f"\n{_outcome_table(outcomes)}", exit_code=code))


def _run_one(outcome: Outcome, screen: Screen, options: SweepOptions) -> bool:
    """Run it to its end. Returns whether the sweep goes on: not after Ctrl-C, nor beside a run that may be live."""
    run = outcome.run
    try:
        outcome.exit_code = start(
            run.config,
            screen,
            remote=options.remote,
            run_id=run.run_id,
            accept_new_host_key=options.accept_new_host_key,
            busy_ok=options.busy_ok,
            wanted=options.wanted,
        )
    except SystemExit as detached:
        outcome.exit_code = DETACHED if detached.code == DETACHED else 1
        return False
    except DeployError as error:
        screen.error(error.to_json(), error.text())
        outcome.exit_code = error.exit_code
        return not error.started and error.exit_code != DETACHED
    return True


def _look_back(outcome: Outcome) -> None:
    """Fill in what the run's record and mirror say; a run without them was not started."""
    entry = registry.find(outcome.run.run_id)
    if entry is None:
        return
    state = str(last_seen(entry)["state"])
    outcome.state = NOT_STARTED if state == "not launched" else state
    row = next(iter(_backwards(entry.mirror, "metrics.jsonl")), {})
    outcome.steps = f"{row.get('stage')} {number(row.get('step'))}" if row else "-"
    name = "reward_mean" if "reward_mean" in row else "loss"
    outcome.last = f"{name}={number(row[name])}" if name in row else "-"
    for row in _backwards(entry.mirror, "eval.jsonl"):
        if row.get("metric") == "exact_match" and row.get("task", ALL_TASKS) == ALL_TASKS:
            value = row.get("value")
            outcome.exact_match = float(value) if isinstance(value, int | float) else None
            return


def _backwards(mirror: RunDir, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from reversed(list(iter_jsonl(mirror.path / name)))
    except (OSError, ValueError, AttributeError, RecursionError):
        return


def _stopped(outcomes: Sequence[Outcome], screen: Screen, options: SweepOptions, again: Sequence[str]) -> int:
    """Say which runs were not started, and the command that goes on with them."""
    begun = [outcome for outcome in outcomes if outcome.state != NOT_STARTED]
    left = [outcome for outcome in outcomes if outcome not in begun and outcome.exit_code in (None, DETACHED)]
    done = options.skip + len(outcomes) - len(left)
    command = shlex.join([*again, "--skip", str(done)])
    code = next((outcome.exit_code for outcome in outcomes if outcome.exit_code), DETACHED)
    code = DETACHED if any(outcome.exit_code == DETACHED for outcome in outcomes) else code
    lines = [_outcome_table(begun)] if begun else []
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


def _outcome_table(outcomes: Sequence[Outcome]) -> str:
    header = ["run", "differs", "state", "steps", "last", "exact_match"]
    rows = []
    for outcome in outcomes:
        match = "-" if outcome.exact_match is None else f"{outcome.exact_match:.4f}"
        rows.append([outcome.run.run_id, outcome.run.differs, outcome.state, outcome.steps, outcome.last, match])
    return columns([header, *rows])


def _command(config_path: str, settings: Sequence[str], options: SweepOptions) -> list[str]:
    """Return the command line of this sweep, without --skip."""
    line = ["deploy", config_path, *(word for setting in settings for word in ("--set", setting))]
    line += ["--remote", options.remote] if options.remote else []
    line += options.wanted.words
    return [*line, *(["--busy-ok"] if options.busy_ok else []), *(["--yes"] if options.yes else [])]
