"""What a watcher sees of a run: a value folded from the rows of its files. Pure."""

from dataclasses import dataclass, field, replace
from typing import Any

METRICS_SHOWN = ("loss", "reward_mean", "groups_kept", "tokens_per_s", "lr", "grad_norm", "lag", "step_s")


@dataclass(frozen=True)
class View:
    """The run so far. Times are the host's, seconds since the epoch."""

    state: str = "starting"
    stage: str = ""
    step: int = 0
    steps_total: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)  # the stage's last row
    first: tuple[int, float] | None = None  # step and time of the stage's first row: for the rate
    last_time: float | None = None
    phases: tuple[tuple[str, str], ...] = ()  # (name, how it went), in order
    checkpoints: tuple[str, ...] = ()  # paths relative to the run directory
    evals: tuple[dict[str, Any], ...] = ()
    error: dict[str, Any] | None = None  # the last error event

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
    stage, step, time = str(row.get("stage", view.stage)), int(row.get("step", view.step)), row.get("time")
    fresh = stage != view.stage or view.first is None
    first = ((step, time) if time is not None else None) if fresh else view.first
    same = stage == view.stage
    return replace(
        view,
        stage=stage,
        step=step,
        first=first,
        last_time=time,
        metrics={**view.metrics, **row} if same else row,
        steps_total=view.steps_total if same else None,
    )


def _fold_event(view: View, row: dict[str, Any]) -> View:
    kind = row.get("kind")
    if kind == "run_started":
        return replace(view, state="running")
    if kind == "environment":
        detail = row["action"] + (f" in {row['seconds']:.1f} s" if row["action"] == "ready" else "")
        return _phase(view, f"environment {row['name']}", detail)
    if kind == "stage_started":
        view = replace(view, stage=row["stage"], step=0, steps_total=None, metrics={}, first=None, last_time=None)
        return _phase(view, row["stage"], "starting")
    if kind == "training_started":
        view = replace(view, stage=row["stage"], step=row["step"], steps_total=row["steps_total"])
        return _phase(view, row["stage"], "training")
    if kind == "engine_ready":
        return _phase(view, row["window"], f"ready in {row['seconds']:.1f} s")
    if kind == "checkpoint":
        return replace(view, checkpoints=(*view.checkpoints, row["path"]))
    if kind == "stage_ended":
        return _phase(view, row["stage"], f"done in {row['seconds']:.0f} s")
    if kind == "error":
        return replace(view, error=row)
    if kind == "run_ended":
        return replace(view, state=row["state"])
    return view


def _phase(view: View, name: str, detail: str) -> View:
    others = tuple(phase for phase in view.phases if phase[0] != name)
    return replace(view, phases=(*others, (name, detail)))


def metrics_line(view: View) -> str:
    """`stage=rl step=12/50 loss=0.0312 reward_mean=0.41`."""
    total = f"/{view.steps_total}" if view.steps_total else ""
    shown = [f"{name}={number(view.metrics[name])}" for name in METRICS_SHOWN if name in view.metrics]
    eta = [f"eta={duration(view.eta_s)}"] if view.eta_s is not None else []
    return " ".join([f"stage={view.stage}", f"step={view.step}{total}", *shown, *eta])


def event_line(row: dict[str, Any]) -> str:
    """`environment name=trainer action=reused`: an event as one plain line."""
    hidden = ("time", "kind", "log_tail")
    fields = [f"{key}={number(value)}" for key, value in row.items() if key not in hidden and value is not None]
    return " ".join([str(row.get("kind")), *fields])


def eval_line(row: dict[str, Any]) -> str:
    return f"eval stage={row['stage']} step={row['step']} split={row['split']} {row['metric']}={number(row['value'])}"


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def evaluation_table(evals: tuple[dict[str, Any], ...]) -> list[list[str]]:
    """Header, then a row per metric and split: its last value in each of the stages base, sft and rl."""
    stages = [stage for stage in ("base", "sft", "rl") if any(row["stage"] == stage for row in evals)]
    names = list(dict.fromkeys((row["metric"], row["split"]) for row in evals))
    last = {(row["metric"], row["split"], row["stage"]): row["value"] for row in evals}
    several = len({split for _, split in names}) > 1
    table = [["", *stages]]
    for metric, split in names:
        values = [last.get((metric, split, stage)) for stage in stages]
        label = f"{metric} ({split})" if several else metric
        table.append([label, *("" if value is None else f"{value:.4f}" for value in values)])
    return table if names else []
