"""What a watcher sees of a run: a value folded from the rows of its files. Pure."""

from dataclasses import dataclass, field, replace
from typing import Any

ALL_TASKS = "all"  # the task of an eval.jsonl row that counts every held-out row
METRICS_SHOWN = (
    "loss",
    "reward_mean",
    "groups_kept",
    "groups_zero_std_frac",
    "tokens_per_s",
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
    first: tuple[int, float] | None = None  # step and time of the stage's first row: for the rate
    last_time: float | None = None
    phases: tuple[tuple[str, str], ...] = ()  # (name, how it went), in order
    checkpoints: tuple[str, ...] = ()  # that stand on the host; paths relative to the run directory
    evals: tuple[dict[str, Any], ...] = ()
    error: dict[str, Any] | None = None  # the last error event

    @property
    def steps_total(self) -> int | None:
        return self.totals.get(self.stage)

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end of the stage, at its rate so far."""
        if self.first is None or self.last_time is None or not self.steps_total or self.step <= self.first[0]:
            return None
        step_s = (self.last_time - self.first[1]) / (self.step - self.first[0])
        return max(0.0, step_s * (self.steps_total - self.step))


def fold(view: View, file: str, row: dict[str, Any]) -> View:
    """`view` after one more row of `file` (events.jsonl, metrics.jsonl or eval.jsonl)."""
    if file == "metrics.jsonl":
        return _fold_metrics(view, row)
    if file == "eval.jsonl":
        return replace(view, evals=(*view.evals, row))
    return _fold_event(view, row) if file == "events.jsonl" else view


def _fold_metrics(view: View, row: dict[str, Any]) -> View:
    if row.get("stage") != view.stage:
        return view  # of the stage before: the files are read side by side
    step, time = int(row["step"]), float(row["time"])
    return replace(
        view, step=step, metrics=row, last_time=time, first=(step, time) if view.first is None else view.first
    )


def _fold_event(view: View, row: dict[str, Any]) -> View:
    kind = row.get("kind")
    if kind == "run_started":
        view = replace(view, state="running")
    elif kind == "stage_started":
        view = replace(view, stage=row["stage"], step=0, metrics={}, first=None, last_time=None)
    elif kind == "training_started":
        totals = {**view.totals, row["stage"]: row["steps_total"]}
        view = replace(view, stage=row["stage"], step=row["step"], totals=totals)
    elif kind == "checkpoint":
        view = replace(view, checkpoints=(*view.checkpoints, row["path"]))
    elif kind == "checkpoint_removed":
        view = replace(view, checkpoints=tuple(path for path in view.checkpoints if path != row["path"]))
    elif kind == "error":
        view = replace(view, error=row)
    elif kind == "run_ended":
        view = replace(view, state=row["state"])
    return _phase(view, row, PHASES[str(kind)]) if kind in PHASES else view


# event kind -> name and progress of the phase that it shows, filled from its fields
PHASES: dict[str, tuple[str, str]] = {
    "environment": ("environment {name}", "{action} after {seconds:.1f} s"),
    "environment_progress": ("environment {name}", "{doing}, {packages} packages, {seconds:.0f} s"),
    "stage_started": ("{stage}", "starting"),
    "training_started": ("{stage}", "training"),
    "engine_ready": ("{window}", "ready after {seconds:.1f} s"),
    "engine_restarted": ("{window}", "started again: {reason}; {restarts_left} more left"),
    "stage_ended": ("{stage}", "done after {seconds:.0f} s"),
}


def _phase(view: View, row: dict[str, Any], texts: tuple[str, str]) -> View:
    name, detail = (text.format(**row) for text in texts)
    others = tuple(phase for phase in view.phases if phase[0] != name)
    return replace(view, phases=(*others, (name, detail)))


def metrics_line(view: View, row: dict[str, Any]) -> str:
    """A row of metrics.jsonl: `stage=rl step=12/50 loss=0.0312 reward_mean=0.41 eta=3m20s`."""
    total = f"/{view.totals[row['stage']]}" if row["stage"] in view.totals else ""
    shown = [f"{name}={number(row[name])}" for name in METRICS_SHOWN if name in row]
    eta = [f"eta={duration(view.eta_s)}"] if view.eta_s is not None and row["stage"] == view.stage else []
    return " ".join([f"stage={row['stage']}", f"step={row['step']}{total}", *shown, *eta])


def event_line(row: dict[str, Any]) -> str:
    """`environment name=trainer action=reused`: an event as one plain line."""
    hidden = ("time", "kind", "log_tail")
    fields = [f"{key}={number(value)}" for key, value in row.items() if key not in hidden and value is not None]
    return " ".join([str(row.get("kind")), *fields])


def eval_line(row: dict[str, Any]) -> str:
    task = "" if _eval_name(row)[2] == ALL_TASKS else f" task={row['task']}"
    where = f"stage={row['stage']} step={row['step']} split={row['split']}{task}"
    return f"eval {where} {row['metric']}={number(row['value'])}"


def _eval_name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["metric"], row["split"], row.get("task", ALL_TASKS)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def evaluation_table(evals: tuple[dict[str, Any], ...]) -> list[list[str]]:
    """Header, then a row per metric, split and task: its last value in each of the stages base, sft and rl."""
    stages = [stage for stage in ("base", "sft", "rl") if any(row["stage"] == stage for row in evals)]
    names = list(dict.fromkeys(_eval_name(row) for row in evals))
    last = {(*_eval_name(row), row["stage"]): row["value"] for row in evals}
    several = len({split for _, split, _ in names}) > 1
    table = [["", *stages]]
    for metric, split, task in names:
        values = [last.get((metric, split, task, stage)) for stage in stages]
        label = f"{metric} ({split})" if several else metric
        label += "" if task == ALL_TASKS else f" {task}"
        table.append([label, *("" if value is None else f"{value:.4f}" for value in values)])
    return table if names else []
