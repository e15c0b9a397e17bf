"""The live display in a real terminal (tmux), 80x24 and resized; the pure parts of it beside."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollouts.view.display import PlainReporter, live_lines
from rollouts.view.fold import View, fold
from rollouts.view.usage_lines import pair_lines
from tests.remote.hosts import WAIT_S, kill_tmux, wait_for

ROOT = Path(__file__).resolve().parents[2]
SHOWN_MAX_S = 60.0  # from the drawing to the screen of the terminal
EVENTS = [
    {"time": 1.0, "kind": "environment", "name": "trainer", "action": "ready", "seconds": 2.0},
    {"time": 2.0, "kind": "stage_started", "stage": "sft"},
    {"time": 3.0, "kind": "training_started", "stage": "sft", "step": 0, "steps_total": 50},
]
METRICS = {
    **{
        "time": 4.0,
        "stage": "sft",
        "step": 7,
        "loss": 0.125,
        "reward_mean": 0.5,
        "groups_kept": 14,
    },
    **{
        "groups_zero_std_frac": 0.125,
        "tokens_per_s": 36000.0,
        "lr": 0.001,
        "grad_norm": 1.5,
        "lag_max": 0,
        "step_s": 6.8,
    },
}
CHECKPOINT = {
    "time": 5.0,
    "kind": "checkpoint",
    "stage": "sft",
    "step": 7,
    "path": "checkpoints/sft/step_000007",
}
PROGRAM = """
import os, sys
from rollouts.view.display import LiveReporter
from rollouts.view.fold import View, fold
from rollouts.view.usage_lines import pair_lines
from tests.remote.test_display import CHECKPOINT, EVENTS, METRICS
shown, view = LiveReporter(), View()
draw = shown._draw
def told():
    draw()
    with open(f"{os.environ['TMUX_TMPDIR']}/drawn", "a") as drawn:
        print(shown._size.width, file=drawn)
shown._draw = told
for file, row in [*(("events.jsonl", e) for e in EVENTS), ("metrics.jsonl", METRICS), ("events.jsonl", CHECKPOINT)]:
    view = fold(view, file, row)
    shown.row(file, row, view)
sys.stdin.readline()
shown.close()
print("the last word", flush=True)
sys.stdin.readline()  # the window stays until it was looked at
"""


class Terminal:
    """A window of a tmux server of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tmux(self, *words: str) -> str:
        # as some shells do: they are not the window's size
        exported = {"COLUMNS": "80", "LINES": "24"}
        environment = {
            **os.environ,
            **exported,
            "TMUX_TMPDIR": str(self._directory),
            "LC_ALL": "C.UTF-8",
        }
        environment.pop("TMUX", None)
        return subprocess.run(
            ["tmux", *words], env=environment, capture_output=True, text=True, check=True
        ).stdout

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", "-t", "t", *keys)

    def screen(self) -> list[str]:
        return self.tmux("capture-pane", "-p", "-t", "t").splitlines()

    def screen_with(self, *texts: str) -> list[str]:
        """The screen, once all of these are on it."""
        deadline = time.monotonic() + WAIT_S
        while True:
            lines = self.screen()
            if all(text in "\n".join(lines) for text in texts):
                return lines
            assert time.monotonic() < deadline, lines
            time.sleep(0.1)

    def resize(self, width: str) -> None:
        """Return after two ticks of the display: what was there before the resize counts for nothing."""
        drawn = self._directory / "drawn"  # the width of each drawing
        before = len(drawn.read_text().split())
        self.tmux("resize-window", "-t", "t", "-x", width, "-y", "24")
        wait_for(lambda: drawn.read_text().split()[before:][-2:] == [width] * 2, "two ticks")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    directory = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    made = Terminal(directory)
    command = [sys.executable, "-c", PROGRAM]
    size = ["-x", "80", "-y", "24"]
    made.tmux("-f", "/dev/null", "new-session", "-d", "-s", "t", *size, "-c", str(ROOT), *command)
    yield made
    kill_tmux(directory)


def test_a_resized_terminal_shows_each_line_once(terminal: Terminal) -> None:
    """Goal: narrower and wider again, the screen holds each phase, the bar and the kept lines once, and no pair of name
    and value is broken. Red with rich's Live left alone on a resize: wrapped lines of the old width stayed. Red with
    COLUMNS and LINES of the shell in the place of the window's size."""
    for width in ("80", "44", "100"):
        terminal.screen_with("step_000007")  # all of it was shown
        terminal.resize(width)
        deadline = time.monotonic() + SHOWN_MAX_S
        while not as_it_should_be(lines := terminal.screen()):
            assert time.monotonic() < deadline, (width, lines)
            time.sleep(0.1)


def as_it_should_be(lines: list[str]) -> bool:
    text = "\n".join(lines)
    once = "environment trainer", "7/50", "loss", "grad_norm", "step_000007"
    return (
        all(text.count(words) == 1 for words in once)
        and "step_s" in text
        and any("groups_zero_std_frac 0.125" in line for line in lines)
    )


def test_what_is_said_after_the_end_is_last(terminal: Terminal) -> None:
    """Goal: the last words are below the display at 80x24. Red with a display that is never closed."""
    terminal.screen_with("7/50")
    terminal.tmux("send-keys", "-t", "t", "", "Enter")
    lines = [line for line in terminal.screen_with("the last word") if line.strip()]
    ours = [line for line in lines if not line.startswith("Pane is dead")]
    assert ours[-1] == "the last word" and "7/50" in "\n".join(ours), lines


@pytest.mark.parametrize("width", [30, 44, 80, 120])
def test_pairs_are_never_broken(width: int) -> None:
    """Goal: a line ends between two pairs. Red with text that the terminal wraps."""
    pairs = [f"name_{index} {index * 1.5}" for index in range(9)]
    lines = pair_lines(pairs, width)
    assert [pair for line in lines for pair in line.strip().split("   ")] == pairs
    assert all(len(line) <= width for line in lines)


def test_60_columns_hold_names_and_usage() -> None:
    """Goal: a phase's long name and its state are two words, and no process's memory is cut off. Red with names padded
    to 22 ("tracker-tensorboardready"), and with all processes in one line."""
    view = View()
    for event in (*EVENTS, {**EVENTS[0], "name": "tracker-tensorboard"}):
        view = fold(view, "events.jsonl", event)
    names = ("engine-0", "trainer-0", "trainer-1")
    processes = [{"name": name, "cpu": 0.5, "memory_gib": 1.25} for name in names]
    usage = {"time": 6.0, "stage": "sft", "gpus": [], "processes": processes}
    view = fold(fold(view, "metrics.jsonl", METRICS), "gpu.jsonl", usage)
    lines = _shown(view, host_now=7.0, width=60)
    assert "✓ environment tracker-tensorboard ready after 2.0 s" in lines
    assert "\n".join(lines).count("1.25 GiB") == 3 and all(len(line) < 60 for line in lines)


def test_the_first_minutes_show_elapsed_time() -> None:
    """Goal: until the first metrics a phase under way says how long it has taken. Red without it: nothing moved."""
    view = View()
    for event in EVENTS:
        view = fold(view, "events.jsonl", event)
    early = _shown(view, host_now=77.0)
    assert any("training, 1m15s" in line for line in early), early
    later = _shown(fold(view, "metrics.jsonl", METRICS), host_now=77.0)
    assert not any("1m15s" in line for line in later), later


def _shown(view: View, *, host_now: float, doing: str = "", width: int = 80) -> list[str]:
    return live_lines(view, doing, width=width, utf8=True, doing_s=0.0, host_now=host_now)


@pytest.mark.parametrize(
    "doing", ["installing 51 packages", "downloading typing_extensions-4.16.0 (0.0 MB) " + "x" * 60]
)
def test_a_phase_has_one_clock_that_only_grows(doing: str) -> None:
    """Goal: while an environment is built its line says the time since it began, whole, at 80 columns too. Red with the
    time since the last event (it went back to 0 every ten seconds), and with the line cut at its end (no time)."""
    begun = {
        "time": 100.0,
        "kind": "environment",
        "name": "trainer",
        "action": "building",
        "seconds": 0.0,
    }
    view = fold(View(), "events.jsonl", begun)
    shown = [_shown(view, host_now=108.0)]
    sizes = {"packages": 51, "downloaded_mb": 126.4, "installed_mb": 1155.8}
    progress = {
        "kind": "environment_progress",
        "name": "trainer",
        "seconds": 40.0,
        "doing": doing,
        **sizes,
    }
    view = fold(view, "events.jsonl", {"time": 140.0, **progress})
    shown += [_shown(view, host_now=140.0), _shown(view, host_now=149.0)]
    assert [lines[0].rpartition(", ")[2] for lines in shown] == ["8s", "40s", "49s"], shown
    assert shown[0] == ["• environment trainer   building, 8s"]
    assert all(len(line) < 80 for lines in shown for line in lines)
    assert (" 1156 MB on disk" in shown[1][0]) == (len(doing) < 40), shown[1]


def test_every_phase_under_way_has_its_clock() -> None:
    """Goal: a stage that waits for its engine shows its own time. Red with a clock on the last phase alone."""
    view = fold(View(), "events.jsonl", {"time": 10.0, "kind": "stage_started", "stage": "rl"})
    ready = {"kind": "engine_ready", "window": "engine-0", "seconds": 4.0}
    view = fold(view, "events.jsonl", {"time": 14.0, **ready})
    lines = _shown(view, host_now=45.0, doing="rl: the trainer starts")
    assert lines == [
        "• rl                    starting, 35s",
        "✓ engine-0              ready after 4.0 s",
        "rl: the trainer starts",
    ]
    again = {
        "kind": "engine_restarted",
        "window": "engine-0",
        "reason": "it died",
        "restarts_left": 2,
    }
    view = fold(view, "events.jsonl", {"time": 40.0, **again})
    assert _shown(view, host_now=45.0)[1].endswith("2 more left, 5s")


def test_an_error_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Goal: the trainer's error and the supervisor's, of the same words, are one line; another error is another. Red
    with each event shown."""
    shown, view = PlainReporter(), View()
    for number, message in enumerate(
        ("no row is left", "no row is left", "its engine died", "no row is left")
    ):
        row = {"time": float(number), "kind": "error", "message": message, "window": "trainer"}
        view = fold(view, "events.jsonl", row)
        shown.row("events.jsonl", row, view)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["error: no row is left", "error: its engine died", "error: no row is left"]
