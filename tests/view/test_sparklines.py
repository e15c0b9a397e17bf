"""Curves and shares of time in the live view: bounded, drawn on any terminal, out of the rows as they come."""

import re

import pytest

from rollouts.view.display import live_lines
from rollouts.view.fold import View, fold
from rollouts.view.sparklines import POINTS_MAX, Trace, sparkline, trace_lines
from rollouts.view.step_time import slow_steps

STARTED = {"time": 1.0, "kind": "training_started", "stage": "rl", "step": 0, "steps_total": 50}
TIMES = {"step_s": 2.0, "generate_s": 1.2, "train_s": 0.5, "sync_s": 0.0}


def rl_view(steps: int) -> View:
    view = fold(View(), "events.jsonl", STARTED)
    for step in range(1, steps + 1):
        row = {
            "stage": "rl",
            "step": step,
            "time": float(step),
            "reward_mean": step / steps,
            "loss": None,
            **TIMES,
        }
        view = fold(view, "metrics.jsonl", row)
    return view


def shown(view: View, *, width: int = 80, utf8: bool = True) -> list[str]:
    return live_lines(view, "", width=width, utf8=utf8, doing_s=0.0, host_now=0.0)


def test_the_live_view_has_curves_and_times() -> None:
    """Goal: a curve with its last value and scale, and where a step's time goes; a number that is null has none, and a
    new stage begins anew. Red with the traces of the stage before kept."""
    view = rl_view(40)
    lines = shown(view)
    (curve,) = (line for line in lines if "▁" in line)
    assert re.match(r"  reward_mean {6}▁[▁-█]*█ 1 \(0\.025 to 1\)$", curve), curve
    assert "  step 2 s: generate 60%, train 25%, other 15%" in lines
    assert not any(line.startswith("  loss") and "to" in line for line in lines)
    view = fold(view, "events.jsonl", {"time": 99.0, "kind": "stage_started", "stage": "sft"})
    assert view.traces == {}


@pytest.mark.parametrize("width", [30, 60, 80, 200])
@pytest.mark.parametrize("utf8", [True, False])
def test_no_line_is_wider_than_the_terminal(width: int, utf8: bool) -> None:
    """Goal: 60 columns hold the curves, fewer leave them out, and a terminal of ASCII gets ASCII. Red with a curve of
    40 characters on every terminal."""
    lines = shown(rl_view(40), width=width, utf8=utf8)
    assert all(len(line) < width for line in lines)
    assert any("(0.025 to 1)" in line for line in lines) == (width >= 60)
    assert all(line.isascii() or utf8 for line in lines)


def test_a_long_run_stays_small() -> None:
    """Goal: 10,000 steps keep at most POINTS_MAX values, evenly taken, with the true scale. Red with every value."""
    trace = Trace()
    for step in range(10_000):
        trace = trace.after(float(step))
    assert len(trace.values) <= POINTS_MAX and (trace.last, trace.low, trace.high) == (
        9999.0,
        0.0,
        9999.0,
    )
    apart = {after - before for before, after in zip(trace.values, trace.values[1:], strict=False)}
    assert apart == {float(trace.every)}


def test_levels() -> None:
    """Goal: the least value has the lowest level, the most the highest, and a flat curve the lowest. Red with levels
    from 0."""
    assert sparkline([5.0, 6.0, 7.0], 10, utf8=True) == "▁▅█"
    assert sparkline([3.0] * 4, 4, utf8=False) == "____"
    assert sparkline([1.0, 1.0, 9.0, 9.0], 2, utf8=False) == "_#"
    assert trace_lines({"loss": Trace().after(1.0)}, width=80, utf8=True) == []


def test_slow_steps_say_what_grew() -> None:
    """Goal: a step of more than one and a half medians, what of it grew most, and what happened meanwhile; none for a
    stage whose steps are alike. Red with the largest part named: that is generating in every step."""
    rows = [
        {"step": step, "time": 10.0 * step, "step_s": 2.0, "generate_s": 1.5, "sync_s": 0.1}
        for step in range(1, 20)
    ]
    assert slow_steps(rows, []) == [] == slow_steps([], [])
    rows[9] |= {"step_s": 3.4, "sync_s": 1.5}
    events = [{"kind": "engine_restarted", "time": 98.0}, {"kind": "warning", "time": 95.0}]
    assert slow_steps(rows, events) == [["10", "3.4", "1.7", "sync +1.4 s", "engine restarted"]]
