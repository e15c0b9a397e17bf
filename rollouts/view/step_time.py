"""Where the time of a step goes, by its row of metrics.jsonl. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rollouts.view.json_numbers import is_number

TIME_PARTS = ("generate_s", "train_s", "sync_s", "data_s")  # of step_s; what is left is "other"
SLOW = 1.5  # times the median
SLOW_SHOWN = 6


def step_parts(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of a step's parts that its row has, and `other`: what they leave of step_s, a number."""
    parts = {name: float(row[name]) for name in TIME_PARTS if is_number(row.get(name))}
    return {**parts, "other": max(0.0, row["step_s"] - sum(parts.values()))}


def step_time_text(row: Mapping[str, Any]) -> str:
    """Return the shares of a step's time as a line: `step 2.1 s: generate 60 %, train 25 %`; "" where none is known."""
    if not is_number(row.get("step_s")) or row["step_s"] <= 0:
        return ""
    shares = {
        name.removesuffix("_s"): seconds / row["step_s"]
        for name, seconds in step_parts(row).items()
    }
    known = {name: share for name, share in shares.items() if share >= 0.005}
    if not known.keys() - {"other"}:
        return ""
    return f"step {row['step_s']:.3g} s: " + ", ".join(
        f"{name} {share:.0%}" for name, share in known.items()
    )


def slow_steps(
    rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Return the slowest steps as rows of a table: step, seconds, times the median, what grew most, what happened.

    A step counts that took SLOW times the median of the stage. `events`: those that may explain one.
    """
    timed = [row for row in rows if is_number(row.get("step_s")) and row["step_s"] > 0]
    if not timed:
        return []
    usual = statistics.median(row["step_s"] for row in timed)
    slow = [row for row in timed if row["step_s"] > SLOW * usual]
    parts = [step_parts(row) for row in timed] if slow else []
    names = {name for found in parts for name in found}
    usual_parts = {
        name: statistics.median(found.get(name, 0.0) for found in parts) for name in names
    }
    table = []
    for row in sorted(slow, key=lambda row: -row["step_s"])[:SLOW_SHOWN]:
        grown = {name: value - usual_parts[name] for name, value in step_parts(row).items()}
        part = max(grown, key=lambda name: grown[name])
        begin, end = row["time"] - row["step_s"], row["time"]
        meanwhile = [event["kind"] for event in events if begin <= event["time"] <= end]
        table.append(
            [
                str(row["step"]),
                f"{row['step_s']:.3g}",
                f"{row['step_s'] / usual:.1f}",
                f"{part.removesuffix('_s')} +{grown[part]:.3g} s",
                ", ".join(dict.fromkeys(kind.replace("_", " ") for kind in meanwhile)) or "-",
            ]
        )
    return table
