"""Show a run: a live display on a terminal, plain lines elsewhere, JSON lines for programs.

Whatever comes from a host goes through escape.py first.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rollouts.run_dir import FINAL_STATES
from rollouts.view.escape import one_line
from rollouts.view.fold import (
    View,
    duration,
    eval_line,
    event_line,
    finished,
    is_repeated,
    metric_pairs,
    metrics_line,
    time_of,
)
from rollouts.view.keyboard import Keys, interrupt
from rollouts.view.panes import PANES, PaneState, sample_lines, status_lines, warning_lines
from rollouts.view.reporter import Reporter
from rollouts.view.screen import print_json, show
from rollouts.view.sparklines import trace_lines
from rollouts.view.step_time import step_time_text
from rollouts.view.usage_lines import pair_lines, usage_lines

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

KEPT_PHASES = ("run", "note", "pull")  # of what deploy itself says: these stay on the screen
ROW_TYPES = {
    "events.jsonl": "event",
    "metrics.jsonl": "metrics",
    "eval.jsonl": "eval",
    "gpu.jsonl": "usage",
}
PLAIN_VARIABLE = "ROLLOUTS_PLAIN"  # set: plain lines on a terminal too, as screen readers want them
STEP_LINE_S = (
    1.0  # plain lines: between two steps that are printed; the last of each stage always is
)
QUIET_S = 30.0  # plain lines: after so long without one, say that it goes on
TICK_S = 0.25
SHOWN_EVENTS = (
    "checkpoint",
    "note",
    "warning",
    "error",
    "engine_restarted",
    "engine_recovered",
    "host_left",
    "on_end",
)
# by the first character of a line
STYLES = {"✓": "green", "+": "green", "•": "yellow", "*": "yellow", " ": "cyan"}


def make_reporter(*, as_json: bool, cost: Callable[[], str] = str) -> Reporter:
    """Return the reporter that fits where stdout goes; `cost` tells what a rented machine has cost so far."""
    if as_json:
        return JsonReporter()
    dumb = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get(PLAIN_VARIABLE)
    return LiveReporter(cost) if sys.stdout.isatty() and not dumb else PlainReporter()


class JsonReporter:
    """One JSON object a line: {"type": "progress" | "event" | "metrics" | "eval" | "usage", ...}."""

    def say(self, phase: str, text: str) -> None:
        print_json({"type": "progress", "phase": phase, "message": text})

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        if file in ROW_TYPES:
            print_json({"type": ROW_TYPES[file], **row})

    def alive(self, doing: str) -> None:
        return None

    def take_stop(self) -> bool:
        return False

    def close(self) -> None:
        return None


class PlainReporter:
    """A line for each thing that happens: for pipes, files, CI and screen readers.

    Of steps that follow each other fast, one a second is printed, and the last before anything else.
    """

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()
        self._stepped = 0.0  # when a step was printed
        self._step_left = ""  # the last step, if it was not
        self._view = View()

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        show(text)

    def say(self, phase: str, text: str) -> None:
        self._print_left()
        self._print(f"{phase}: {text}")

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        if file == "metrics.jsonl":
            self._step_left = row_line(file, row, view)
            self._print_left(after_s=STEP_LINE_S)
        elif file in ("events.jsonl", "eval.jsonl") and not is_repeated(self._view, row):
            self._print_left()
            self._print(row_line(file, row, view))
        self._view = view

    def _print_left(self, *, after_s: float = 0.0) -> None:
        """Print the last step, where it was not printed, and the one before was so long ago."""
        if self._step_left and time.monotonic() - self._stepped >= after_s:
            self._print(self._step_left)
            self._stepped, self._step_left = time.monotonic(), ""

    def alive(self, doing: str) -> None:
        self._print_left(after_s=STEP_LINE_S)
        if time.monotonic() - self._printed >= QUIET_S:
            elapsed = duration(time.monotonic() - self._started)
            self._print(
                f"alive: {one_line(doing or 'nothing new')} ({elapsed} since deploy began to follow)"
            )

    def take_stop(self) -> bool:
        return False

    def close(self) -> None:
        self._print_left()


def row_line(file: str, row: dict[str, Any], view: View) -> str:
    if file == "metrics.jsonl":
        return metrics_line(view, row)
    return eval_line(row) if file == "eval.jsonl" else event_line(row)


class LiveReporter:
    """Phases, a progress bar and the last metrics, redrawn in place by rich; what stays scrolls by above.

    After a change of the window's size the screen is drawn anew: where the terminal has wrapped the old lines cannot
    be known.
    """

    def __init__(self, cost: Callable[[], str] = str) -> None:
        from rich.console import Console

        self._lock = threading.RLock()
        # The terminal's own size: COLUMNS and LINES of a shell that exports them stay as they were on a resize.
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")
        }
        self._console = Console(markup=False, highlight=False, emoji=False, _environ=environment)
        self._view, self._doing, self._doing_since = View(), "", time.monotonic()
        self._host_ahead: float | None = None  # the host's clock less ours, as far as its rows tell
        self._kept: deque[str] = deque(maxlen=200)  # the last lines that stay
        self._size = self._console.size
        self._state = PaneState(cost=cost)
        self._live = self._new_live()
        self._keys = Keys(self._press)
        self._state.keys = self._keys.work
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def say(self, phase: str, text: str) -> None:
        with self._lock:
            if phase in KEPT_PHASES:
                self._keep(f"{phase}: {text}")
            self._do(f"{phase}: {text}")
            self._draw()

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        with self._lock:
            before, self._view = self._view, view
            if (at := time_of(row)) is not None:
                # rows of a while ago come late: the latest tells the clock
                ahead = at - time.monotonic()
                self._host_ahead = (
                    ahead if self._host_ahead is None else max(ahead, self._host_ahead)
                )
            if file in ("metrics.jsonl", "eval.jsonl"):
                self._do("")
            if file == "eval.jsonl" or (
                row.get("kind") in SHOWN_EVENTS and not is_repeated(before, row)
            ):
                self._keep(row_line(file, row, view))
            self._draw()

    def alive(self, doing: str) -> None:
        with self._lock:
            self._do("" if self._view.metrics else doing)

    def _do(self, doing: str) -> None:
        """Note what is under way. Its time starts anew when it changes."""
        if doing != self._doing:
            self._doing, self._doing_since = doing, time.monotonic()

    def take_stop(self) -> bool:
        return self._state.take_stop()

    def close(self) -> None:
        if self._keys.closed.is_set():
            return
        self._keys.close()
        self._thread.join(timeout=5)
        with self._lock:
            self._state = PaneState(cost=self._state.cost)
            self._draw()
            self._live.stop()

    def _tick(self) -> None:
        while not self._keys.closed.wait(TICK_S):
            with self._lock:
                self._draw()

    def _press(self, key: str) -> None:
        with self._lock:
            may_stop = bool(self._view.phases) and self._view.state not in FINAL_STATES
            asked = self._state.press(key, may_stop=may_stop)
            if asked == "stop":
                self._do("stopping the run: its checkpoint first")
            if not self._state.paused and self._state.held:
                for text in list(self._kept)[-self._state.held :]:
                    self._console.print(text, soft_wrap=True)
                self._state.held = 0
            self._draw()
        if asked:
            interrupt()

    def _keep(self, text: str) -> None:
        """Print a line that stays."""
        text = one_line(text, limit=2000)
        self._kept.append(text)
        if self._state.paused:
            self._state.held += 1
        else:
            self._console.print(text, soft_wrap=True)

    def _new_live(self) -> "Live":
        from rich.live import Live

        live = Live(
            self._rendered(), console=self._console, auto_refresh=False, vertical_overflow="crop"
        )
        live.start(refresh=True)
        return live

    def _draw(self) -> None:
        if self._console.size == self._size:
            self._live.update(self._rendered(), refresh=True)
            return
        self._size = self._console.size
        self._live.stop()
        self._console.clear()
        room = max(0, self._size.height - 1 - len(self._lines()))
        for line in wrapped_tail(list(self._kept), self._size.width, room):
            self._console.print(line, soft_wrap=True)
        self._live = self._new_live()

    def _lines(self) -> list[str]:
        width = self._size.width
        lines = live_lines(
            self._view,
            self._doing,
            width=width,
            utf8=not self._console.options.ascii_only,
            doing_s=time.monotonic() - self._doing_since,
            host_now=time.monotonic() + (self._host_ahead or 0.0),
            pane=self._state.pane,
        )
        below = [cut_to_width(line, width - 1) for line in status_lines(self._state, width=width)]
        return [*self._state.shown(lines)[: max(1, self._size.height - 1 - len(below))], *below]

    def _rendered(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        return Group(
            *(Text(line, style=STYLES.get(line[:1], "dim"), no_wrap=True) for line in self._lines())
        )


def wrapped_tail(lines: list[str], width: int, room: int) -> list[str]:
    """Return the last of `lines` that fit into `room` lines of a terminal."""
    from rich.cells import cell_len

    taken: list[str] = []
    for line in reversed(lines):
        room -= max(1, -(-cell_len(line) // max(1, width)))
        if room < 0:
            break
        taken.append(line)
    return taken[::-1]


def live_lines(
    view: View,
    doing: str,
    *,
    width: int,
    utf8: bool,
    doing_s: float,
    host_now: float,
    pane: str = PANES[0],
) -> list[str]:
    """Return what is redrawn, line by line, none wider than the terminal.

    Until the first metrics each phase under way says how long it has taken; what deploy does says so where none is.
    """
    clocks = {} if view.metrics else {name: host_now - begun for name, begun in view.begun.items()}
    lines = [
        _phase_line(name, detail, width - 1, utf8, clocks.get(name)) for name, detail in view.phases
    ]
    if view.steps_total:
        filled = max(0, min(32, 32 * view.step // view.steps_total))
        full, empty = ("━", "╌") if utf8 else ("=", "-")
        eta = "" if view.eta_s is None else f" eta {duration(view.eta_s)}"
        bar = full * filled + empty * (32 - filled)
        lines.append(f"  {one_line(view.stage)} {bar} {view.step}/{view.steps_total}{eta}")
    lines += _pane_lines(view, pane, width, utf8)
    if doing or not view.phases:
        timed = clocks and not all(finished(detail) for _, detail in view.phases)
        lines.append(one_line(doing or "starting") + ("" if timed else f" ({duration(doing_s)})"))
    return [cut_to_width(line, width - 1) for line in lines]


def _pane_lines(view: View, pane: str, width: int, utf8: bool) -> list[str]:
    if pane == "samples":
        return sample_lines(view)
    if pane == "warnings":
        return warning_lines(view)
    lines = []
    if view.steps_total:
        lines += pair_lines(
            [f"{name} {text}" for name, text in metric_pairs(view.metrics)], width - 1
        )
        lines += trace_lines(view.traces, width=width - 1, utf8=utf8)
        lines += [f"  {text}" for text in [step_time_text(view.metrics)] if text]
    return lines + usage_lines(view.usage, utf8=utf8, width=width - 1)


def _phase_line(name: str, detail: str, width: int, utf8: bool, seconds: float | None) -> str:
    over = finished(detail)
    mark = ("✓" if over else "•") if utf8 else ("+" if over else "*")
    clock = "" if over or seconds is None else f", {duration(max(0.0, seconds))}"
    return cut_to_width(f"{mark} {f'{name} ':<22}{detail}", width - len(clock)).rstrip() + clock


def cut_to_width(text: str, width: int) -> str:
    """Return as much of `text` as `width` columns hold; characters of East Asian scripts take two."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, max(0, width))
