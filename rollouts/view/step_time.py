"""Where the time of a step goes, by its row of metrics.jsonl. Pure."""

from collections.abc import Mapping
from typing import Any

from rollouts.view.json_numbers import is_number

TIME_PARTS = ("generate_s", "train_s", "sync_s", "data_s")  # of step_s; what is left is "other"


def step_parts(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of a step's parts that its row has, and `other`: what they leave of step_s, a number."""
    parts = {name: float(row[name]) for name in TIME_PARTS if is_number(row.get(name))}
    return {**parts, "other": max(0.0, row["step_s"] - sum(parts.values()))}


def step_time_text(row: Mapping[str, Any]) -> str:
    """Return the shares of a step's time as a line: `step 2.1 s: generate 60 %, train 25 %`; "" where none is known."""
    if not is_number(row.get("step_s")) or row["step_s"] <= 0:
        return ""
    shares = {name.removesuffix("_s"): seconds / row["step_s"] for name, seconds in step_parts(row).items()}
    known = {name: share for name, share in shares.items() if share >= 0.005}
    if not known.keys() - {"other"}:
        return ""
    return f"step {row['step_s']:.3g} s: " + ", ".join(f"{name} {share:.0%}" for name, share in known.items())
