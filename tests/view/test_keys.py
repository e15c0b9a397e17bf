"""The live display's keys and panes in a real terminal (tmux), and plain lines where there is none."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rollouts.view import display
from rollouts.view.display import PlainReporter, live_lines, make_reporter
from rollouts.view.fold import View, fold
from rollouts.view.panes import PANES, PaneState
from tests.remote.hosts import kill_tmux
from tests.remote.test_display import EVENTS, METRICS, ROOT, Terminal
from tests.view.runs import START

HOSTILE = "\x1b[2J\x1b]0;owned\x07 4"
SAMPLE = {
    "step": 7,
    "reward": 0.75,
    "prompt": {"question": "What is 2 + 2?"},
    "response": HOSTILE,
}
GPUS = [
    {"gpu": 0, "processes": ["trainer-0"], "use": 0.93, "memory_gib": 61.2, "memory_total_gib": 80},
    {"gpu": 1, "processes": ["engine-0"], "use": None, "memory_gib": None},
]
USAGE = {"time": START, "stage": "sft", "gpus": GPUS, "processes": []}
WARNING = {"time": 6.0, "kind": "warning", "stage": "sft", "cause": "x", "message": "odd" * 40}
ROWS: list[tuple[str, dict[str, Any]]] = [
    *(("events.jsonl", event) for event in EVENTS),
    ("metrics.jsonl", {**METRICS, "mfu": 0.41}),
    ("gpu.jsonl", USAGE),
    ("rollouts.jsonl", SAMPLE),
    ("events.jsonl", WARNING),
]
PROGRAM = """
import threading
from rollouts.view.display import LiveReporter
from rollouts.view.fold import View, fold
from tests.view.test_keys import ROWS
shown, view = LiveReporter(lambda: "cost $1.25 so far, $2.50 an hour"), View()
for file, row in ROWS:
    view = fold(view, file, row)
    shown.row(file, row, view)
while True:
    try:
        threading.Event().wait(600)
    except KeyboardInterrupt:
        if not shown.take_stop():
            break
        shown.say("note", "the run is asked to stop")
shown.close()
print("detached", flush=True)
"""


def all_rows() -> View:
    view = View()
    for file, row in ROWS:
        view = fold(view, file, row)
    return view


@pytest.fixture(params=["80x24", "60x20"])
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    directory = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    made = Terminal(directory)
    width, height = request.param.split("x")
    size = ["-x", width, "-y", height]
    where = ["-d", "-s", "t", *size, "-c", str(ROOT), "bash", "--norc"]
    made.tmux("-f", "/dev/null", "new-session", *where)
    file = directory / "program.py"
    file.write_text(PROGRAM)
    made.press(f"clear; PYTHONPATH=. NO_COLOR=1 {sys.executable} {file}; stty -a", "Enter")
    yield made
    kill_tmux(directory)


def test_keys(terminal: Terminal) -> None:
    """Goal: Tab shows the last rollout (its escapes spelled out) and the warnings, p holds the display still, s asks
    and does nothing on n, stops on y, d detaches, and the terminal echoes again. Red without the question, without
    `escaped`, and with the terminal's settings left."""
    terminal.screen_with("mfu 0.41", "93%", "61.2 of 80.0 GiB", "cost $1.25 so far")
    terminal.press("Tab")
    shown = terminal.screen_with("What is 2 + 2?", "reward 0.75")
    assert any(r"answer \x1b[2J\x1b]0;owned\x07 4" in line for line in shown), shown
    terminal.press("Tab")
    terminal.screen_with("oddoddodd")
    terminal.press("Tab", "p")
    terminal.screen_with("paused", "mfu 0.41")
    terminal.press("p", "s")
    terminal.screen_with("stop the run after a checkpoint?")
    terminal.press("n", "s")
    lines = terminal.screen_with("stop the run after a checkpoint?")
    assert not any("asked to stop" in line for line in lines), lines
    terminal.press("y")
    terminal.screen_with("the run is asked to stop")
    terminal.press("d")
    lines = terminal.screen_with("detached", "icanon")
    assert " echo " in f" {' '.join(' '.join(lines).split())} ", lines


def test_no_line_is_wider_than_the_terminal() -> None:
    """Goal: 60 columns hold each pane. Red with warnings that are not cut."""
    for pane in PANES:
        lines = live_lines(
            all_rows(), "", width=60, utf8=True, doing_s=0.0, host_now=9.0, pane=pane
        )
        assert lines and max(map(len, lines)) < 60, lines


def test_a_pause_holds_what_was_shown() -> None:
    """Goal: lines that come in a pause are not shown before its end. Red with the newest lines."""
    state = PaneState()
    assert state.shown(["a"]) == ["a"]
    state.press("p", may_stop=True)
    assert state.shown(["b"]) == ["a"]
    state.press("p", may_stop=True)
    assert state.shown(["b"]) == ["b"]


def test_a_run_that_ended_cannot_be_stopped() -> None:
    """Goal: s asks nothing where there is nothing to stop. Red with the question always asked."""
    state = PaneState()
    assert state.press("s", may_stop=False) == "" and not state.asks
    assert state.press("y", may_stop=False) == "" and not state.take_stop()


def test_plain_lines_are_thinned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goal: of steps that follow each other fast one a second is printed, and the last before the stage's end; events
    all are. Red with every step printed, and with the last one lost."""
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    shown, view = PlainReporter(), View()
    ended = {"time": 9.0, "kind": "stage_ended", "stage": "sft", "seconds": 5.0}
    rows = [("metrics.jsonl", {**METRICS, "step": step}) for step in range(1, 50)]
    for file, row in [*(("events.jsonl", event) for event in EVENTS), *rows]:
        view = fold(view, file, row)
        shown.row(file, row, view)
        now += 0.1
    view = fold(view, "events.jsonl", ended)
    shown.row("events.jsonl", ended, view)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("stage=sft")]
    assert 5 <= len(steps) <= 7 and "step=49/50" in steps[-1]
    assert lines[-1].startswith("stage_ended") and len(lines) == len(steps) + len(EVENTS) + 1


def test_plain_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a dumb terminal and ROLLOUTS_PLAIN, for screen readers, get plain lines. Red with a live display there."""
    monkeypatch.setattr(display.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_reporter(as_json=False), PlainReporter)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("ROLLOUTS_PLAIN", "1")
    assert isinstance(make_reporter(as_json=False), PlainReporter)
    assert os.environ["TERM"] == "xterm"
