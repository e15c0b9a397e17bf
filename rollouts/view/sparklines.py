"""Curves of a live run, a line of a terminal each: bounded, and drawn with what the terminal can show. Pure."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollouts.view.json_numbers import is_number

DRAWN = ("loss", "reward_mean", "eval_exact_match", "kl_sampler")
POINTS_MAX = 256
WIDTH_MAX = 40
LEVELS = "▁▂▃▄▅▆▇█"
PLAIN_LEVELS = "_.-~=+*#"  # where a terminal has ASCII alone


@dataclass(frozen=True)
class Trace:
    """A number so far: each of its values, later every second one, every fourth and so on."""

    values: tuple[float, ...] = ()
    every: int = 1
    seen: int = 0
    last: float = 0.0
    low: float = math.inf  # of all that were seen
    high: float = -math.inf

    def after(self, value: float) -> "Trace":
        """Return the trace with one more value; it holds POINTS_MAX at most."""
        values, every = self.values, self.every
        if self.seen % every == 0:
            values = (*values, value)
            if len(values) > POINTS_MAX:
                values, every = values[::2], every * 2
        return Trace(
            values, every, self.seen + 1, value, min(self.low, value), max(self.high, value)
        )


def traced(traces: Mapping[str, Trace], row: Mapping[str, Any]) -> dict[str, Trace]:
    """Return the traces after one more row of metrics.jsonl."""
    new = {
        name: traces.get(name, Trace()).after(float(row[name]))
        for name in DRAWN
        if is_number(row.get(name))
    }
    return {**traces, **new}


def trace_lines(traces: Mapping[str, Trace], *, width: int, utf8: bool) -> list[str]:
    """Return a line a trace that has two values or more: its name, its curve, its last value and its scale."""
    lines = []
    for name in DRAWN:
        trace = traces.get(name)
        if trace is None or trace.seen < 2:
            continue
        words = f" {trace.last:.4g} ({trace.low:.3g} to {trace.high:.3g})"
        room = min(WIDTH_MAX, width - 19 - len(words))
        if room >= 4:
            lines.append(f"  {name:<16} {sparkline(trace.values, room, utf8=utf8)}{words}")
    return lines


def sparkline(values: Sequence[float], width: int, *, utf8: bool) -> str:
    """Return at most `width` characters, each the mean of its part of the values, from their least to their most."""
    cells = min(width, len(values))
    bounds = [round(at * len(values) / cells) for at in range(cells + 1)]
    means = [sum(value / (b - a) for value in values[a:b]) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    levels = LEVELS if utf8 else PLAIN_LEVELS
    top = len(levels) - 1
    half = high / 2 - low / 2  # halves: the difference of two finite numbers may not be one
    return "".join(
        levels[round(top * ((mean / 2 - low / 2) / half)) if half > 0 else 0] for mean in means
    )
