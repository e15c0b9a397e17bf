"""Charts as Vega-Lite specs, made with altair: the same ones for the report, the page and pictures. Pure.

Needs the `view` extra. A spec carries its own data, thinned to what a screen can show; estimates are of all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.view.escape import one_line
from rollouts.view.estimates import Band, band, smoothed, thinned
from rollouts.view.fold import time_of
from rollouts.view.json_numbers import is_number
from rollouts.view.run_data import RunData
from rollouts.view.step_time import TIME_PARTS, step_parts
from rollouts.view.tokens_axis import tokens_by_step

Spec = dict[str, Any]
POINTS_MAX = 500  # of all curves in a chart together
SPANS = 20  # a curve is smoothed over a 20th of its points
HEIGHT = 220
HIDDEN_EVENTS = (
    "checkpoint",
    "checkpoint_removed",
    "environment_progress",
    "note",
    "model",
    "stage_started",
    "stage_ended",
    "training_started",
)
# colours that people with any colour vision tell apart (Okabe and Ito), on white and on black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")


@dataclass(frozen=True)
class RunGroup:
    """Runs whose code is the same and whose configs differ in seeds alone, under one name."""

    label: str
    runs: tuple[RunData, ...]

    def bands(self, stage: str, name: str) -> list[Band]:
        """Return mean, least and most of a metric at each step that a run logged."""
        found = (run.series(stage, name) for run in self.runs)
        return band([(series.steps, series.values) for series in found])


def curve_chart(
    groups: Sequence[RunGroup],
    stage: str,
    name: str,
    *,
    by: str = "step",
    width: int | str = "container",
) -> Spec:
    """Return a chart of one metric over steps: a smoothed line a group, the raw lines, a band where runs differ.

    `by` "tokens": over the tokens that were trained on up to a step.
    """
    import altair

    title = f"{stage} step" if by == "step" else f"trained tokens of {stage}"
    x = altair.X("step:Q", title=title, scale=altair.Scale(nice=False))
    y = altair.Y("raw:Q", title=name, scale=altair.Scale(zero=False))
    labels = [group.label for group in groups]
    colour = altair.Color("group:N", scale=scale_of(labels), legend=legend_of(labels))
    hover = altair.selection_point(
        nearest=True,
        on="pointerover",
        fields=["step", "group"],
        empty=False,
        name=f"hover_{stage}_{_plain(name)}",
    )
    thin = altair.Chart(altair.NamedData("raw")).mark_line(aria=False, opacity=0.35, strokeWidth=1)
    spread = altair.Chart(altair.NamedData("main")).mark_area(aria=False, opacity=0.2)
    line = altair.Chart(altair.NamedData("main")).mark_line(aria=False, strokeWidth=2)
    dots = altair.Chart(altair.NamedData("main")).mark_point(aria=False, filled=True, size=50)
    tooltip = [
        altair.Tooltip("group:N", title="run"),
        altair.Tooltip("step:Q", title=by, format=",d"),
        altair.Tooltip("mean:Q", title=name, format=".5g"),
        altair.Tooltip("smooth:Q", title="smoothed", format=".5g"),
        altair.Tooltip("low:Q", title="least", format=".5g"),
        altair.Tooltip("high:Q", title="most", format=".5g"),
        altair.Tooltip("runs:Q"),
    ]
    chart = altair.layer(
        spread.encode(x=x, y=altair.Y("low:Q", title=name), y2="high:Q", color=colour),
        thin.encode(x=x, y=y, color=colour, detail="run:N"),
        line.encode(x=x, y=altair.Y("smooth:Q", title=name), color=colour),
        dots.encode(
            x=x,
            y=altair.Y("smooth:Q", title=name),
            color=colour,
            opacity=altair.condition(hover, altair.value(1), altair.value(0)),
            tooltip=tooltip,
        ).add_params(hover),
    ).properties(
        width=width,
        height=HEIGHT,
        description=f"{name} over the {by.removesuffix('s')}s of {stage}, for {', '.join(labels)}",
    )
    return with_data(chart, curve_points(groups, stage, name, by=by))


def curve_points(
    groups: Sequence[RunGroup], stage: str, name: str, *, by: str = "step"
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows that `curve_chart` draws, by the name of their data set: `raw` and `main`."""
    raw, main = _raw_points(groups, stage, name), _main_points(groups, stage, name)
    return {"raw": raw, "main": main} if by == "step" else _over_tokens(groups, stage, raw, main)


def _over_tokens(
    groups: Sequence[RunGroup], stage: str, raw: list[dict[str, Any]], main: list[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Return the same points over tokens: of a group of several runs over their mean."""
    of_run = [tokens_by_step(run, stage) for group in groups for run in group.runs]
    of_group = {group.label: [tokens_by_step(run, stage) for run in group.runs] for group in groups}

    def mean(label: str, step: int) -> float | None:
        found = [tokens[step] for tokens in of_group[label] if step in tokens]
        return sum(found) / len(found) if found else None

    moved_raw = [{**point, "step": of_run[point["run"]].get(point["step"])} for point in raw]
    moved = [{**point, "step": mean(point["group"], point["step"])} for point in main]
    return {
        "raw": [point for point in moved_raw if point["step"] is not None],
        "main": [point for point in moved if point["step"] is not None],
    }


def _raw_points(groups: Sequence[RunGroup], stage: str, name: str) -> list[dict[str, Any]]:
    runs = [(group.label, run.series(stage, name)) for group in groups for run in group.runs]
    most = max(20, POINTS_MAX // max(1, len(runs)))
    return [
        {"group": label, "run": place, "step": series.steps[at], "raw": _short(series.values[at])}
        for place, (label, series) in enumerate(runs)
        for at in thinned(len(series.values), most)
    ]


def _main_points(groups: Sequence[RunGroup], stage: str, name: str) -> list[dict[str, Any]]:
    points, most = [], max(20, POINTS_MAX // max(1, len(groups)))
    for group in groups:
        found = group.bands(stage, name)
        smooth = smoothed([item.mean for item in found], max(1, len(found) / SPANS))
        for at in thinned(len(found), most):
            item = found[at]
            numbers = {"smooth": smooth[at], "mean": item.mean, "low": item.low, "high": item.high}
            shown = {key: _short(value) for key, value in numbers.items()}
            points.append({"group": group.label, "step": item.step, **shown, "runs": item.runs})
    return points


def _short(value: float) -> float:
    """Return a number as a chart shows it: six digits, which is less to send."""
    return float(f"{value:.6g}")


def time_chart(run: RunData, stage: str) -> Spec | None:
    """Return where the time of a stage's steps went, as stacked areas; None where none was logged."""
    import altair

    rows = [row for row in run.metrics.get(stage, ()) if is_number(row.get("step_s"))]
    points = [
        {"step": rows[at]["step"], "part": part.removesuffix("_s"), "seconds": seconds}
        for at in thinned(len(rows), POINTS_MAX // (len(TIME_PARTS) + 1))
        for part, seconds in step_parts(rows[at]).items()
    ]
    if not points:
        return None
    labels = [part.removesuffix("_s") for part in (*TIME_PARTS, "other")]
    chart = (
        altair.Chart(altair.NamedData("parts"))
        .mark_area(aria=False)
        .encode(
            x=altair.X("step:Q", title=f"{stage} step", scale=altair.Scale(nice=False)),
            y=altair.Y("seconds:Q", title="seconds of a step", stack=True),
            color=altair.Color("part:N", scale=scale_of(labels), legend=legend_of(labels)),
            tooltip=["step:Q", "part:N", altair.Tooltip("seconds:Q", format=".3g")],
        )
        .properties(
            width="container", height=HEIGHT, description=f"parts of a step of {stage}, in seconds"
        )
    )
    return with_data(chart, {"parts": points})


def length_chart(points: Sequence[tuple[int, int, float]]) -> Spec:
    """Return rewards against lengths of responses, coloured by step."""
    import altair

    rows = [{"step": step, "length": length, "reward": reward} for step, length, reward in points]
    chart = (
        altair.Chart(altair.NamedData("samples"))
        .mark_circle(aria=False, size=24, opacity=0.5)
        .encode(
            x=altair.X("length:Q", title="tokens of the response"),
            y=altair.Y("reward:Q", scale=altair.Scale(zero=False)),
            color=altair.Color("step:Q", scale=altair.Scale(scheme="viridis")),
            tooltip=["step:Q", "length:Q", altair.Tooltip("reward:Q", format=".4g")],
        )
        .properties(
            width="container", height=HEIGHT, description="reward against the length of responses"
        )
    )
    return with_data(chart, {"samples": rows})


def timeline_chart(run: RunData) -> Spec | None:
    """Return a run's stages as bars and its faults, restarts and other events as points; None without events."""
    import altair

    bars, points = (
        _stage_bars(run),
        [_event_point(row) for row in run.events if row["kind"] not in HIDDEN_EVENTS],
    )
    if not points:
        return None
    x = altair.X("at:T", title="time")
    kinds = ["stage", "other", "restart", "fault"]
    colours = altair.Scale(domain=kinds, range=[COLOURS[5], COLOURS[6], COLOURS[4], COLOURS[1]])
    colour = altair.Color("class:N", scale=colours, legend=legend_of(kinds))
    stages = altair.Chart(altair.NamedData("stages")).mark_bar(aria=False, height=12)
    events = altair.Chart(altair.NamedData("events")).mark_point(aria=False, filled=True, size=60)
    tooltip = ["kind:N", altair.Tooltip("at:T", format="%H:%M:%S"), altair.Tooltip("what:N")]
    chart = altair.layer(
        stages.encode(
            x=x, x2="until:T", y=altair.Y("kind:N", title=None), color=colour, tooltip=["kind:N"]
        ),
        events.encode(x=x, y=altair.Y("kind:N", title=None), color=colour, tooltip=tooltip),
    ).properties(
        width="container",
        height=HEIGHT,
        description=f"stages, faults and restarts of {run.run_id} over time",
    )
    return with_data(chart, {"stages": bars, "events": points})


def event_class(row: Mapping[str, Any]) -> str:
    """Return "fault", "restart" or "other" for an event."""
    failed = row["kind"] == "process_ended" and (row.get("exit_code") != 0 or row.get("signal"))
    if failed or row["kind"] in ("error", "warning"):
        return "fault"
    if row["kind"] == "run_ended" and row.get("exit_code") not in (0, None):
        return "fault"
    return "restart" if row["kind"] in ("engine_restarted", "engine_recovered") else "other"


def event_text(row: Mapping[str, Any]) -> str:
    """Return what an event says beside its kind and time."""
    if isinstance(row.get("message"), str):
        return str(row["message"])
    hidden = ("time", "kind", "log_tail", "parts")
    return ", ".join(
        f"{name} {value}" for name, value in row.items() if name not in hidden and value is not None
    )


def _event_point(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "at": row["time"] * 1000,
        "kind": row["kind"],
        "class": event_class(row),
        "what": one_line(event_text(row), limit=300),
    }


def _stage_bars(run: RunData) -> list[dict[str, Any]]:
    begun: dict[str, float] = {}
    bars, last = [], max((row["time"] for row in run.events), default=0.0)
    for row in run.events:
        stage, at = row.get("stage"), time_of(row)
        if not isinstance(stage, str) or at is None:
            continue
        if row["kind"] == "stage_started":
            begun[stage] = at
        elif row["kind"] == "stage_ended" and stage in begun:
            bars.append(_bar(stage, begun.pop(stage), at))
    # those that did not end
    return [*bars, *(_bar(stage, at, last) for stage, at in begun.items())]


def _bar(stage: str, begin: float, end: float) -> dict[str, Any]:
    return {"kind": f"stage {stage}", "at": begin * 1000, "until": end * 1000, "class": "stage"}


def picture(spec: Spec, kind: str) -> bytes:
    """Return a chart as a picture: `kind` is "png" or "svg"."""
    import vl_convert

    if kind == "png":
        return bytes(vl_convert.vegalite_to_png(spec, ppi=200))
    return str(vl_convert.vegalite_to_svg(spec)).encode()


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def scale_of(labels: Sequence[str]) -> Any:
    """Return the colours of some labels."""
    import altair

    return altair.Scale(
        domain=list(labels), range=[COLOURS[at % len(COLOURS)] for at in range(len(labels))]
    )


def legend_of(labels: Sequence[str]) -> Any:
    """Return a legend over the chart, or none for one label."""
    import altair

    return (
        altair.Legend(title=None, orient="top", columns=2, labelLimit=240, symbolOpacity=1)
        if len(labels) > 1
        else None
    )


def with_data(chart: Any, data: Mapping[str, list[dict[str, Any]]]) -> Spec:
    """Return the chart's spec with its rows: what altair checks, tests check."""
    return {**chart.to_dict(validate=False), "datasets": dict(data)}
