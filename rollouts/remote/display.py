"""Showing a run: a live display on a terminal, plain lines elsewhere, JSON lines for programs. Only prints."""

import json
import sys
from typing import Any

from rollouts.remote.view import (
    METRICS_SHOWN,
    View,
    duration,
    eval_line,
    event_line,
    metrics_line,
    number,
)
from rollouts.remote.watch import Reporter


def make_reporter(*, as_json: bool) -> Reporter:
    """The one that fits where stdout goes."""
    if as_json:
        return JsonReporter()
    return LiveReporter() if sys.stdout.isatty() else PlainReporter()


def print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


class JsonReporter:
    """One JSON object a line: {"type": "progress" | "event" | "metrics" | "eval", ...}."""

    def say(self, phase: str, text: str) -> None:
        print_json({"type": "progress", "phase": phase, "message": text})

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        kind = {"events.jsonl": "event", "metrics.jsonl": "metrics", "eval.jsonl": "eval"}[file]
        print_json({"type": kind, **row})

    def close(self) -> None:
        return None


class PlainReporter:
    """A line for each thing that happens: for pipes, files and CI."""

    def say(self, phase: str, text: str) -> None:
        print(f"{phase}: {text}", flush=True)

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        if file == "metrics.jsonl":
            print(metrics_line(view, row), flush=True)
        elif file == "eval.jsonl":
            print(eval_line(row), flush=True)
        else:
            print(event_line(row), flush=True)

    def close(self) -> None:
        return None


class LiveReporter:
    """Phases, a progress bar and the last metrics, redrawn in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._view = View()
        self._doing = ""
        self._live: Live | None = Live(self._render(), console=self._console, refresh_per_second=8, transient=False)
        self._live.start()

    def say(self, phase: str, text: str) -> None:
        self._doing = f"{phase}: {text}"
        self._redraw()

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        self._view, self._doing = view, ""
        if file == "eval.jsonl":
            self._console.print(eval_line(row), markup=False, highlight=False)
        elif row.get("kind") in ("checkpoint", "note", "engine_restarted", "engine_recovered"):
            self._console.print(event_line(row), markup=False, highlight=False)
        self._redraw()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None

    def _redraw(self) -> None:
        if self._live is not None:
            self._live.update(self._render())

    def _render(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        view = self._view
        lines: list[Any] = []
        for name, detail in view.phases:
            finished = detail.startswith(("done", "ready", "reused"))
            mark = ("✓ ", "green") if finished else ("• ", "yellow")
            lines.append(Text.assemble(mark, (f"{name:<22}", "bold"), (detail, "dim" if finished else "")))
        if view.steps_total:
            grid = Table.grid(padding=(0, 1))
            eta = "" if view.eta_s is None else f"eta {duration(view.eta_s)}"
            bar = ProgressBar(total=view.steps_total, completed=view.step, width=32)
            grid.add_row(f"  {view.stage}", bar, f"{view.step}/{view.steps_total}", eta)
            lines.append(grid)
            shown = [f"{name} {number(view.metrics[name])}" for name in METRICS_SHOWN if name in view.metrics]
            lines.append(Text("  " + "   ".join(shown), style="cyan"))
        if self._doing:
            lines.append(Text(self._doing, style="dim"))
        return Group(*lines)
