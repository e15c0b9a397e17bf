"""What the pages say of runs, as JSON values: the list, one run, its charts, several compared."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rollouts.health.rules import symptoms
from rollouts.run_dir import RunDir
from rollouts.view import charts, report_tables
from rollouts.view.answer_changes import answer_points
from rollouts.view.fold import View, duration, evaluation_table, fold
from rollouts.view.run_data import RunData
from rollouts.view.step_time import slow_steps
from rollouts.view.tokens_axis import equal_tokens
from rollouts.view.ui import live
from rollouts.view.ui.desk import Desk
from rollouts.view.ui.run_source import PageError
from rollouts.view.usage_chart import has_usage, usage_chart

EVENTS_MAX = 300  # the last ones
COMPARED_MAX = 12
AXES = ("step", "tokens")
CURVES_MAX = 60  # that one answer holds


def run_list(desk: Desk) -> dict[str, Any]:
    """Return all runs, newest first, and what could not be read."""
    found = desk.source.runs()
    return {
        "title": desk.source.title,
        "runs": [*found.rows],
        "remarks": [*found.remarks],
        "now": time.time(),
    }


def state_of(desk: Desk, run_id: str) -> str:
    """Return what is known of a run's state at this moment; "" for a run that is not listed."""
    row = desk.source.row(run_id)
    return row["state"] if row else ""


def run_summary(desk: Desk, run_id: str) -> dict[str, Any]:
    """Return what a run's page says of it beside its curves. Raises PageError."""
    row = desk.source.row(run_id)
    state = row["state"] if row else ""
    version = live.version(desk.source.directory(run_id), state)
    run = desk.run(run_id)
    view = _view(run)
    state = state or (run.status.state if run.status else view.state)
    damage = [
        f"{count} line(s) of {name} are damaged, and left out" for name, count in run.damage.items()
    ]
    return {
        "run_id": run_id,
        "version": version,
        "experiment": (row or {}).get("experiment_name")
        or (run.status.experiment_name if run.status else ""),
        "target": (row or {}).get("target", ""),
        "tags": (row or {}).get("tags", []),
        "state": state,
        "message": (row or {}).get("message") or (run.status.message if run.status else ""),
        "stage": view.stage,
        "step": view.step,
        "steps_total": view.steps_total,
        "eta": duration(view.eta_s) if view.eta_s is not None and state == "running" else None,
        "begun_at": run.events[0]["time"] if run.events else None,
        "last_at": max((rows[-1]["time"] for rows in run.metrics.values() if rows), default=None),
        "remarks": [*filter(None, [desk.source.remark(run_id)]), *damage, *run.remarks],
        "symptoms": [
            {name: getattr(found, name) for name in ("cause", "stage", "detail", "means", "fix")}
            for found in symptoms(run)
        ],
        "stages": [_stage(run, stage) for stage in run.stages],
        "headline": _headline(run),
        "evaluations": evaluation_table(run.evaluations),
        "events": [_event(row) for row in run.events[-EVENTS_MAX:]][::-1],
        "events_left_out": max(0, len(run.events) - EVENTS_MAX),
        "checkpoints": [_checkpoint(run, path) for path in view.checkpoints],
        "logs": live.log_names(run.path),
        "has_samples": RunDir(run.path).rollouts.exists(),
        "environment": [
            [str(part) for part in pair] for pair in report_tables.environment_rows(run)
        ],
        "packages": list(run.packages),
        "config": flat_config(run.config or {}),
    }


def _view(run: RunData) -> View:
    """Return how far a run is. Only the last row of each stage is folded: curves come from elsewhere."""
    view = View()
    for row in run.events:
        view = fold(view, "events.jsonl", row)
    for stage in run.stages:
        rows = run.metrics[stage]
        for row in (rows[0], rows[-1]):
            view = fold(view, "metrics.jsonl", row)
    return view


def _stage(run: RunData, stage: str) -> dict[str, Any]:
    first, rest = report_tables.chart_names([run], stage)
    there = {
        "time": bool(run.series(stage, "step_s").values),
        "timeline": any(row["kind"] not in charts.HIDDEN_EVENTS for row in run.events),
        "usage": has_usage(run),
    }
    others = [name for name, is_there in there.items() if is_there]
    telling = [row for row in run.events if charts.event_class(row) != "other"]
    slow = slow_steps(run.metrics[stage], telling)
    return {"name": stage, "first": first, "rest": rest, "others": others, "slow": slow}


def _headline(run: RunData) -> list[dict[str, Any]]:
    """Return the few numbers that stand at the top: the last of each, and what they were at the start."""
    found = []
    for name in (
        "reward_mean",
        "loss",
        "entropy",
        "response_length_mean",
        "tokens_per_s",
        "step_s",
    ):
        stage = next(
            (stage for stage in reversed(run.stages) if run.series(stage, name).values), None
        )
        if stage is not None:
            values = run.series(stage, name).values
            found.append({"name": name, "stage": stage, "last": values[-1], "first": values[0]})
    return found


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "time": row["time"],
        "kind": row["kind"],
        "class": charts.event_class(row),
        "text": charts.event_text(row)[:2000],
        "log_tail": str(row.get("log_tail") or "")[-4000:],
    }


def _checkpoint(run: RunData, path: str) -> dict[str, Any]:
    stage, _, step = path.removeprefix("checkpoints/").partition("/step_")
    is_here = ".." not in path and (run.path / path / "manifest.json").is_file()
    return {
        "path": path,
        "stage": stage,
        "step": int(step) if step.isdecimal() else step,
        "here": is_here,
    }


def flat_config(value: Any, path: str = "") -> list[list[str]]:
    """Return a config as [path, value] pairs, in its order."""
    if isinstance(value, Mapping) and value:
        parts = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
        return [pair for key, item in parts for pair in flat_config(item, key)]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [pair for at, item in enumerate(value) for pair in flat_config(item, f"{path}.{at}")]
    return [[path, "None" if value is None else str(value)]]


# --- charts -----------------------------------------------------------------------------------------------------------


def _groups(desk: Desk, run_ids: Sequence[str]) -> list[charts.RunGroup]:
    """Return runs, those that differ in seeds alone together. Raises PageError."""
    wanted = list(dict.fromkeys(run_ids))
    if not 0 < len(wanted) <= COMPARED_MAX:
        raise PageError(
            f"{len(wanted)} runs are asked for; 1 to {COMPARED_MAX} can be drawn together",
            status=400,
        )
    runs = [desk.run(run_id) for run_id in wanted]
    if len(runs) == 1:
        return [charts.RunGroup(runs[0].run_id, (runs[0],))]
    return desk.source.grouped(runs)


def chart(
    desk: Desk, run_ids: Sequence[str], stage: str, name: str, *, by: str = "step"
) -> charts.Spec:
    """Return a metric's chart, or of one run `chart:time`, `chart:timeline` or `chart:usage`. Raises PageError."""
    groups = _groups(desk, run_ids)
    if name.startswith("chart:"):
        found = _other_chart(groups[0].runs[0], stage, name.removeprefix("chart:"))
        if found is None:
            raise PageError("nothing of it was logged yet")
        return found
    if not any(run.series(stage, name).values for group in groups for run in group.runs):
        raise PageError(f"no step of stage {stage!r} logged {name!r}")
    if by not in AXES:
        raise PageError(f"by={by[:50]!r}: needs one of {', '.join(AXES)}", status=400)
    return charts.curve_chart(groups, stage, name, by=by)


def _other_chart(run: RunData, stage: str, name: str) -> charts.Spec | None:
    if name == "time":
        return charts.time_chart(run, stage)
    return charts.timeline_chart(run) if name == "timeline" else usage_chart(run)


def curves(desk: Desk, run_ids: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """Return the points of charts that are drawn already, by `stage/metric`. Raises PageError."""
    groups = _groups(desk, run_ids)
    found = {}
    for key in wanted[:CURVES_MAX]:
        stage, _, name = key.partition("/")
        found[key] = charts.curve_points(groups, stage, name)
    return found


# --- several runs -----------------------------------------------------------------------------------------------------


def comparison(desk: Desk, run_ids: Sequence[str]) -> dict[str, Any]:
    """Return what several runs have in common and what differs: charts by name, configs, last evaluations."""
    groups = _groups(desk, run_ids)
    runs = [run for group in groups for run in group.runs]
    names = [(run.run_id, run) for run in runs]
    stages = dict.fromkeys(stage for run in runs for stage in run.stages)
    first = runs[0]
    differences = [desk.source.difference(first, run) for run in runs[1:]]
    return {
        "runs": [run.run_id for run in runs],
        "labels": [group.label for group in groups],
        "stages": [_stage_of_all(runs, stage) for stage in stages],
        "differences": [
            {
                "first": found.first,
                "second": found.second,
                "rows": [list(row) for row in found.rows],
            }
            for found in differences
        ],
        "last": _last_numbers(runs),
        "equal_tokens": list(
            filter(
                None, (equal_tokens(runs, stage, report_tables.FIRST_METRICS) for stage in stages)
            )
        ),
        "comparisons": [
            {
                "run": found.run,
                "other": found.other,
                "difference": report_tables.change_words(found.difference),
                "paired": found.paired,
            }
            for found in report_tables.comparisons(names)
        ],
        "changes": _worse(runs),
    }


def _stage_of_all(runs: Sequence[RunData], stage: str) -> dict[str, Any]:
    first, rest = report_tables.chart_names(list(runs), stage)
    return {"name": stage, "first": first, "rest": rest}


def _last_numbers(runs: Sequence[RunData]) -> list[list[str]]:
    """Return a table of the last value of what is drawn first: a header, then a row a metric."""
    table = [["metric", *(run.run_id for run in runs)]]
    for name in report_tables.FIRST_METRICS:
        cells = []
        for run in runs:
            stage = next(
                (stage for stage in reversed(run.stages) if run.series(stage, name).values), None
            )
            cells.append(f"{run.series(stage, name).values[-1]:.5g}" if stage else "-")
        if any(cell != "-" for cell in cells):
            table.append([name, *cells])
    return table


def _worse(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    return [
        {"run": run.run_id, "rows": answer_rows(run)} for run in runs if len(answer_points(run)) > 1
    ]


def answer_rows(run: RunData) -> list[dict[str, Any]]:
    """Return which held-out rows got better and worse from each evaluation to the next."""
    return [
        {
            "before": found.before,
            "after": found.after,
            "better_count": found.better_count,
            "worse_count": found.worse_count,
            **{
                kind: [
                    {
                        name: getattr(pair, name)
                        for name in ("row", "prompt", "expected", "before", "after")
                    }
                    for pair in getattr(found, kind)
                ]
                for kind in ("better", "worse")
            },
        }
        for found in report_tables.changes(answer_points(run))
    ]
