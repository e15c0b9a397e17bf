"""How busy a run's GPUs were, as a chart and in words; where it has none, its processes. Needs the `view` extra."""

from typing import Any

from rollouts.health.usage import gpu_loads
from rollouts.view.charts import (
    COLOURS,
    HEIGHT,
    POINTS_MAX,
    Spec,
    legend_of,
    scale_of,
    with_data,
)
from rollouts.view.estimates import thinned
from rollouts.view.run_data import Row, RunData

NAMES_MAX = len(COLOURS)


def usage_chart(run: RunData) -> Spec | None:
    """Return the use of each GPU over time, or of each process in CPU cores; None where no sample tells either."""
    import altair

    points, title = _gpu_points(run), "GPU in use"
    if not points:
        points, title = _cpu_points(run), "CPU cores in use"
    if not points:
        return None
    labels = list(dict.fromkeys(point["name"] for point in points))[:NAMES_MAX]
    points = [point for point in points if point["name"] in labels]
    chart = (
        altair.Chart(altair.NamedData("usage"))
        .mark_line(aria=False, strokeWidth=1.5)
        .encode(
            x=altair.X("at:T", title="time"),
            y=altair.Y("use:Q", title=title, axis=altair.Axis(format=".2~f")),
            color=altair.Color("name:N", scale=scale_of(labels), legend=legend_of(labels)),
            tooltip=[
                "name:N",
                altair.Tooltip("at:T", format="%H:%M:%S"),
                altair.Tooltip("use:Q", title=title, format=".2f"),
                altair.Tooltip("memory:Q", title="GiB", format=".4g"),
            ],
        )
        .properties(width="container", height=HEIGHT, description=f"{title} of {run.run_id}")
    )
    return with_data(chart, {"usage": points})


def has_usage(run: RunData) -> bool:
    """Return whether `usage_chart` has something to draw: the first sample of a process does not know its use."""
    rows = [row for _, row in _samples(run)]
    return any(entry.get("use") is not None for row in rows for entry in row["gpus"]) or any(
        entry.get("cpu") is not None for row in rows for entry in row["processes"]
    )


def usage_title(run: RunData) -> str:
    """Return the chart's title: with the share of the time in which each GPU was idle."""
    idle = ", ".join(
        f"{f'{host} ' if host else ''}GPU {load.gpu} ({', '.join(load.processes)}) idle {load.idle:.0%}"
        for host, rows in run.usage_by_host.items()
        for load in gpu_loads(rows)
    )
    return f"how busy the machine was{': ' if idle else ''}{idle}"


def _gpu_points(run: RunData) -> list[dict[str, Any]]:
    cards = {(host, entry["gpu"]) for host, row in _samples(run) for entry in row["gpus"]}
    return [
        {
            "at": row["time"] * 1000,
            "name": f"{host}GPU {entry['gpu']}: {', '.join(entry['processes'])}",
            "use": entry["use"],
            "memory": entry.get("memory_gib"),
        }
        for host, row in _samples(run, _most(len(cards)))
        for entry in row["gpus"]
        if entry.get("use") is not None
    ]


def _cpu_points(run: RunData) -> list[dict[str, Any]]:
    names = {(host, entry["name"]) for host, row in _samples(run) for entry in row["processes"]}
    return [
        {
            "at": row["time"] * 1000,
            "name": f"{host}{entry['name']}",
            "use": entry["cpu"],
            "memory": entry["memory_gib"],
        }
        for host, row in _samples(run, _most(len(names)))
        for entry in row["processes"]
        if entry.get("cpu") is not None
    ]


def _samples(run: RunData, most: int | None = None) -> list[tuple[str, Row]]:
    """Return the samples of every host, with what stands before its lines' names; of each host so many at `most`."""
    found = []
    for name, rows in run.usage_by_host.items():
        at = range(len(rows)) if most is None else thinned(len(rows), most)
        found += [(f"{name} " if name else "", rows[index]) for index in at]
    return found


def _most(lines: int) -> int:
    return max(20, POINTS_MAX // max(1, min(lines, NAMES_MAX)))
