"""Rows in the order of time, and the table of what evaluation gave before and after each stage."""

from collections.abc import Callable
from typing import Any

import pytest

from rollouts.view import display
from rollouts.view import fold as rows_view
from rollouts.view import row_order as rows_module
from rollouts.view.fold import evaluation_table
from rollouts.view.row_order import Row, in_order

STARTED: Row = ("events.jsonl", {"time": 1.0, "kind": "training_started", "stage": "rl"})
STEP_1: Row = ("metrics.jsonl", {"time": 2.0, "stage": "rl", "step": 1})
NOTE: Row = ("events.jsonl", {"time": 3.0, "kind": "note"})
STEP_2: Row = ("metrics.jsonl", {"time": 4.0, "stage": "rl", "step": 2})


def measured(stage: str, step: int, value: float = 0.5) -> dict[str, Any]:
    return {
        "metric": "exact_match",
        "split": "test",
        "task": "all",
        "stage": stage,
        "step": step,
        "value": value,
    }


@pytest.mark.parametrize(
    ("evaluation", "place"),
    [
        (measured("base", 0), 1),
        (measured("rl", 0), 1),
        (measured("rl", 1), 2),
        (measured("rl", 2), 4),
    ],
    ids=["base", "at step 0", "at step 1", "at the end"],
)
def test_rows_of_several_files_come_in_the_order_of_time(
    evaluation: dict[str, Any], place: int
) -> None:
    """Goal: events and metrics by time; an evaluation, which has none, after the step that it was made at. Red with the
    rows as they were read, file by file."""
    shown = in_order([STARTED, NOTE, STEP_1, STEP_2, ("eval.jsonl", evaluation)])
    timed = [STARTED, STEP_1, NOTE, STEP_2]
    assert shown == [*timed[:place], ("eval.jsonl", evaluation), *timed[place:]]


@pytest.mark.parametrize(
    ("evals", "header", "values"),
    [
        (
            [measured("rl", 0, 0.25), measured("rl", 10, 0.75)],
            ["", "before", "rl"],
            ["0.2500", "0.7500"],
        ),
        # stopped before the next evaluation
        ([measured("rl", 0, 0.25)], ["", "before"], ["0.2500"]),
        (
            [measured("base", 0, 0.0), measured("sft", 5, 0.5)],
            ["", "base", "sft"],
            ["0.0000", "0.5000"],
        ),
        (
            [measured("sft", 0, 0.1), measured("sft", 5, 0.5), measured("rl", 0, 0.6)],
            ["", "before", "sft"],
            ["0.1000", "0.6000"],
        ),
    ],
    ids=["rl alone", "rl stopped", "stopped in sft", "from a checkpoint"],
)
def test_the_table_keeps_what_was_before(
    evals: list[dict[str, Any]], header: list[str], values: list[str]
) -> None:
    """Goal: values of a stage's step 0 are of what came before it. Red with the last value of each stage alone."""
    table = evaluation_table(tuple(evals))
    assert table[0] == header and table[1][1:] == values


class Clock:
    """Time that a test moves, and the timers that wait in it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.waiting = 100.0, list[tuple[float, Callable[[], None]]]()
        clock = self

        class Timer:
            daemon = False

            def __init__(self, after_s: float, function: Callable[[], None]) -> None:
                self.item = (clock.now + after_s, function)

            def start(self) -> None:
                assert self.daemon, "a timer that waits must not keep the program from ending"
                clock.waiting.append(self.item)

        patch.setattr(rows_module.threading, "Timer", Timer)
        patch.setattr(rows_module.time, "monotonic", lambda: clock.now)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [item for item in self.waiting if item[0] <= self.now + 1e-9]
        self.waiting = [item for item in self.waiting if item not in due]
        for _, function in due:
            function()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_rows_are_shown_once_no_more_come(clock: Clock) -> None:
    """Goal: one look's rows, read file by file, come together and in order, once it is quiet. Red with the rows handed
    on as they are read, and with a timer that does not wait on while more come."""
    shown: list[Row] = []
    order = rows_module.RowOrder(lambda file, row: shown.append((file, row)))
    for row in (STARTED, NOTE):
        order.add(*row)
    clock.advance(0.08)
    for row in (STEP_1, STEP_2):
        order.add(*row)
    clock.advance(0.05)
    assert shown == []
    clock.advance(0.1)
    assert shown == [STARTED, STEP_1, NOTE, STEP_2] and clock.waiting == []
    order.add(*NOTE)
    order.flush()
    assert shown[-1] == NOTE
    clock.advance(1.0)
    assert len(shown) == 5


def test_a_host_that_always_has_more_is_shown_too(clock: Clock) -> None:
    """Goal: rows are held for two seconds at most. Red without that limit: nothing was shown."""
    shown: list[Row] = []
    order = rows_module.RowOrder(lambda file, row: shown.append((file, row)))
    for _ in range(50):
        order.add(*STEP_1)
        clock.advance(0.05)
    assert len(shown) >= 38


def test_what_fails_in_showing_is_raised_by_the_next_row(clock: Clock) -> None:
    """Goal: a closed pipe ends the main thread, not the timer's alone. Red with the error kept."""

    def show(file: str, row: dict[str, Any]) -> None:
        raise BrokenPipeError

    order = rows_module.RowOrder(show)
    order.add(*NOTE)
    clock.advance(0.2)
    with pytest.raises(BrokenPipeError):
        order.add(*NOTE)


def test_a_pipe_hears_how_long_nothing_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Goal: plain lines say once in a while that the run lives, what it does and since when. Red with the time left
    out, and with a line for each sign of life."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    reporter = display.PlainReporter()
    for _ in range(4):
        now[0] += display.QUIET_S / 2
        reporter.alive("installing torch (200 MB)")
    lines = capsys.readouterr().out.splitlines()
    seconds = (display.duration(display.QUIET_S), display.duration(2 * display.QUIET_S))
    assert lines == [
        f"alive: installing torch (200 MB) ({text} since deploy began to follow)"
        for text in seconds
    ]
    early = display.live_lines(
        rows_view.View(), "", width=80, utf8=True, doing_s=75.0, host_now=0.0
    )
    assert early == ["starting (1m15s)"]
