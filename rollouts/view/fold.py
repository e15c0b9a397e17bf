"""What a watcher sees of a run: a value folded from the rows of its files. Pure.

The rows come from a host: one that lacks a field, or has another type in it, is counted and changes nothing else.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from rollouts.health.usage import is_usage_row
from rollouts.view.escape import one_line
from rollouts.view.sparklines import Trace, traced

ALL_TASKS = "all"  # the task of an eval.jsonl row that counts every held-out row
SAMPLES_KEPT = 8
SAYING = ("note", "warning", "error")  # events that are a message, and little else
METRICS_SHOWN = (
    "loss",
    "reward_mean",
    "groups_kept",
    "groups_zero_std_frac",
    "tokens_per_s",
    "mfu",
    "lr",
    "grad_norm",
    "lag_max",
    "step_s",
)


@dataclass(frozen=True)
class View:
    """The run so far. Times are the host's, seconds since the epoch."""

    state: str = "starting"
    stage: str = ""
    step: int = 0
    totals: dict[str, int] = field(default_factory=dict)  # steps, by stage
    metrics: dict[str, Any] = field(default_factory=dict)  # the stage's last row
    traces: dict[str, Trace] = field(default_factory=dict)  # the stage's curves so far, by metric
    first: tuple[int, float] | None = None  # step and time of the stage's first row: for the rate
    last_time: float | None = None
    phases: tuple[tuple[str, str], ...] = ()  # (name, how it went), in order
    begun: dict[str, float] = field(default_factory=dict)  # when each phase began, by its name
    checkpoints: tuple[str, ...] = ()  # that exist on the host; paths relative to the run directory
    evals: tuple[dict[str, Any], ...] = ()
    samples: tuple[dict[str, Any], ...] = ()  # of rollouts.jsonl: the last that were looked at
    # the stage's last row of gpu.jsonl, by the name of its host; "": of a run on one
    usage: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: dict[str, Any] | None = None  # the last error event
    warnings: tuple[str, ...] = ()  # messages of warning events, each once
    malformed: int = 0  # rows that could not be used

    @property
    def steps_total(self) -> int | None:
        return self.totals.get(self.stage)

    @property
    def eta_s(self) -> float | None:
        """Return seconds to the end of the stage, at its rate so far."""
        if (
            self.first is None
            or self.last_time is None
            or not self.steps_total
            or self.step <= self.first[0]
        ):
            return None
        step_s = (self.last_time - self.first[1]) / (self.step - self.first[0])
        left_s = max(0.0, step_s * (self.steps_total - self.step))
        return left_s if math.isfinite(left_s) else None  # of times that no clock tells


class MalformedRowError(ValueError):
    """A row lacks a field, or has something else in it than the format says."""


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise MalformedRowError(name)
    return value


def _number(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise MalformedRowError(name)
    return value


def time_of(row: dict[str, Any]) -> float | None:
    """Return when the host wrote a row; None if the row does not say."""
    try:
        return float(_number(row, "time"))
    except (MalformedRowError, OverflowError):
        return None


def fold(view: View, file: str, row: dict[str, Any]) -> View:
    """Return `view` after one more row of `file`, one of those that `watch` follows."""
    try:
        if file == "metrics.jsonl":
            return _fold_metrics(view, row)
        if file == "eval.jsonl":
            return _fold_eval(view, row)
        if file == "gpu.jsonl":
            return _fold_usage(view, row)
        if file == "rollouts.jsonl":
            return replace(view, samples=(*view.samples, row)[-SAMPLES_KEPT:])
        return _fold_event(view, row) if file == "events.jsonl" else view
    except (MalformedRowError, OverflowError):
        return replace(view, malformed=view.malformed + 1)


def _fold_metrics(view: View, row: dict[str, Any]) -> View:
    stage, step, time = _text(row, "stage"), int(_number(row, "step")), float(_number(row, "time"))
    if stage != view.stage:
        return view  # of the stage before: the files are read side by side
    first = (step, time) if view.first is None else view.first
    return replace(
        view, step=step, metrics=row, traces=traced(view.traces, row), last_time=time, first=first
    )


def _fold_eval(view: View, row: dict[str, Any]) -> View:
    for name in ("stage", "split", "metric"):
        _text(row, name)
    _number(row, "step")
    # null: no finite number, as of a loss
    if "value" not in row or not isinstance(row["value"], int | float | None):
        raise MalformedRowError("value")
    float(row["value"] or 0)  # raises OverflowError
    if not isinstance(row.get("task", ALL_TASKS), str):
        raise MalformedRowError("task")
    return replace(view, evals=(*view.evals, row))


def _fold_usage(view: View, row: dict[str, Any]) -> View:
    if not is_usage_row(row):
        raise MalformedRowError("gpus")
    if row["stage"] != view.stage:
        return view
    return replace(view, usage={**view.usage, str(row.get("host", "")): row})


def _fold_event(view: View, row: dict[str, Any]) -> View:
    kind = row.get("kind")
    if kind == "run_started":
        view = replace(view, state="running")
    elif kind == "stage_started":
        view = replace(
            view,
            stage=_text(row, "stage"),
            step=0,
            metrics={},
            traces={},
            usage={},
            first=None,
            last_time=None,
        )
    elif kind == "training_started":
        stage, step = _text(row, "stage"), int(_number(row, "step"))
        view = replace(
            view,
            stage=stage,
            step=step,
            totals={**view.totals, stage: int(_number(row, "steps_total"))},
        )
    elif kind == "checkpoint":
        path = _text(row, "path")  # a stage that restarted may write one again
        others = tuple(known for known in view.checkpoints if known != path)
        view = replace(view, checkpoints=(*others, path))
    elif kind == "checkpoint_removed":
        gone = _text(row, "path")
        view = replace(view, checkpoints=tuple(path for path in view.checkpoints if path != gone))
    elif kind == "error":
        _text(row, "message")
        view = replace(view, error=row)
    elif kind == "warning":
        message = _text(row, "message")
        view = replace(view, warnings=tuple(dict.fromkeys((*view.warnings, message))))
    elif kind == "run_ended":
        view = replace(view, state=_text(row, "state"))
    return _phase(view, row, PHASES[kind]) if isinstance(kind, str) and kind in PHASES else view


# event kind -> name and progress of the phase that it shows, filled from its fields
PHASES: dict[str, tuple[str, str]] = {
    "queued": ("queue", "place {place}, waits for {waits_for}"),
    "turn": ("queue", "done after {seconds:.0f} s"),
    "environment": ("environment {name}", "{action} after {seconds:.1f} s"),
    "environment_progress": ("environment {name}", "{doing}, {installed_mb:.0f} MB on disk"),
    "smoke_test_started": ("smoke test", "running"),
    "smoke_test_ended": ("smoke test", "{action} after {seconds:.1f} s"),
    "stage_started": ("{stage}", "starting"),
    "training_started": ("{stage}", "training"),
    "engine_ready": ("{window}", "ready after {seconds:.1f} s"),
    "engine_restarted": ("{window}", "started again: {reason}; {restarts_left} more left"),
    "stage_restarted": ("{stage}", "again from step {step}: {reason}; {restarts_left} more left"),
    "stage_ended": ("{stage}", "done after {seconds:.0f} s"),
}


def _phase(view: View, row: dict[str, Any], texts: tuple[str, str]) -> View:
    try:
        name, detail = (one_line(text.format(**row)) for text in texts)
        # its time is shown beside it
        detail = "building" if row.get("action") == "building" else detail
    except (KeyError, ValueError, TypeError) as error:
        raise MalformedRowError(str(error)) from None
    others = tuple(phase for phase in view.phases if phase[0] != name)
    going_on = name in view.begun and any(
        phase[0] == name and not finished(phase[1]) for phase in view.phases
    )
    if not going_on and (at := time_of(row)) is not None:
        view = replace(view, begun={**view.begun, name: at})
    return replace(view, phases=(*others, (name, detail)))


def finished(detail: str) -> bool:
    """Return whether a phase is over, by its text."""
    return detail.startswith(("done", "ready", "reused"))


def metrics_line(view: View, row: dict[str, Any]) -> str:
    """Return a row of metrics.jsonl: `stage=rl step=12/50 loss=0.0312 reward_mean=0.41 eta=3m20s`."""
    stage = row.get("stage")
    total = f"/{view.totals[stage]}" if isinstance(stage, str) and stage in view.totals else ""
    eta = [f"eta={duration(view.eta_s)}"] if view.eta_s is not None and stage == view.stage else []
    shown = [f"{name}={text}" for name, text in metric_pairs(row)]
    return " ".join(
        [f"stage={number(stage)}", f"step={number(row.get('step'))}{total}", *shown, *eta]
    )


def metric_pairs(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of a row that people are shown."""
    return [(name, number(row[name])) for name in METRICS_SHOWN if name in row]


def event_line(row: dict[str, Any]) -> str:
    """Return an event as one plain line: `environment name=trainer action=reused`, `note: a message`."""
    kind, message = row.get("kind"), row.get("message")
    if kind in SAYING and isinstance(message, str):
        return f"{kind}: {one_line(message)}"
    hidden = ("time", "kind", "log_tail")
    fields = [
        f"{one_line(key)}={number(value)}"
        for key, value in row.items()
        if key not in hidden and value is not None
    ]
    return " ".join([one_line(row.get("kind")), *fields])


def is_repeated(view: View, row: dict[str, Any]) -> bool:
    """Return whether it is the last error once more: the supervisor repeats the trainer's, with the end of its log."""
    message = row.get("message")
    return (
        row.get("kind") == "error"
        and view.error is not None
        and view.error.get("message") == message
    )


def eval_line(row: dict[str, Any]) -> str:
    stage, step, split, metric, value = (
        number(row.get(n)) for n in ("stage", "step", "split", "metric", "value")
    )
    task = "" if row.get("task", ALL_TASKS) == ALL_TASKS else f" task={number(row['task'])}"
    return f"eval stage={stage} step={step} split={split}{task} {metric}={value}"


def _eval_name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["metric"], row["split"], row.get("task", ALL_TASKS)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else one_line(value)


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


BEFORE = "before"


def evaluation_table(evals: tuple[dict[str, Any], ...]) -> list[list[str]]:
    """Return a header, then a row per metric, split and task: its last value in each of the stages base, sft and rl.

    A run whose first values are of a stage itself (it went on from a checkpoint) has them in a column `before`.
    """
    evals = _with_before(evals)
    stages = [
        stage
        for stage in ("base", BEFORE, "sft", "rl")
        if any(row["stage"] == stage for row in evals)
    ]
    names = list(dict.fromkeys(_eval_name(row) for row in evals))
    last = {(*_eval_name(row), row["stage"]): row["value"] for row in evals}
    several = len({split for _, split, _ in names}) > 1
    table = [["", *stages]]
    for metric, split, task in names:
        values = [last.get((metric, split, task, stage), "") for stage in stages]
        label = f"{metric} ({split})" if several else metric
        label += "" if task == ALL_TASKS else f" {task}"
        table.append(
            [one_line(label), *(value if value == "" else _shown(value) for value in values)]
        )
    return table if names else []


def _shown(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"


def _with_before(evals: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Return `evals` with those of a stage's step 0 moved to what came before it: the stage did not make them.

    That is the stage before, else the column `before`.
    """
    measured = {row["stage"] for row in evals}
    first = next(iter(measured & {"base"}), None) or next((row["stage"] for row in evals), None)

    def place(row: dict[str, Any]) -> str:
        if row["step"] != 0 or row["stage"] == "base":
            return str(row["stage"])
        return BEFORE if row["stage"] == first else "sft"

    return tuple({**row, "stage": place(row)} for row in evals)
