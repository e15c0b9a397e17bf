"""Watch a run from here until it ends: its rows to a reporter, its completed checkpoints pulled behind them.

Nothing here changes the run: to stop watching is only that.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rollouts.remote.run.checkpoints import CheckpointPuller
from rollouts.remote.run.connection import RetryPolicy, RunConnection
from rollouts.remote.run.follow import follow
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.mirror_files import is_checkpoint
from rollouts.remote.run.watch_hosts import USAGE, OtherHosts
from rollouts.run_dir import last_jsonl_row, read_status
from rollouts.view.fold import View, fold
from rollouts.view.reporter import Reporter
from rollouts.view.row_order import RowOrder

SAMPLE_S = 1.0  # between two rollouts that are shown
LINE_FILES = ("events.jsonl", "metrics.jsonl", "eval.jsonl", USAGE)


@dataclass(frozen=True)
class RunResult:
    """How the run ended, and what is here of it."""

    state: str
    exit_code: int | None
    view: View
    notes: tuple[str, ...] = ()  # what was left out of what the host sent


class _Watching:
    """Fold the rows seen so far, and start what each of them asks for."""

    def __init__(self, mirror: Mirror, reporter: Reporter, add: Callable[[str], None]) -> None:
        self.mirror, self.reporter, self._add = mirror, reporter, add
        self._lock = threading.Lock()  # rows of other hosts come from threads of their own
        self.named: Callable[[dict[str, Any]], dict[str, Any]] = dict  # a row, with its host
        self.view = View()
        self._order = RowOrder(self._show)
        self._doing = ""
        self._sample_due = 0.0  # monotonic

    def look_back(self) -> None:
        """Fold the rows that are here already; they are not shown again."""
        for file in LINE_FILES:
            for row in self.mirror.rows(file):
                self.view = fold(self.view, file, row)
        for path in self.view.checkpoints:
            self._add_checkpoint(path)

    def on_file(self, file: str) -> None:
        if file in LINE_FILES:
            for row in self.mirror.rows(file):
                self._order.add(file, row)
        elif file == "rollouts.jsonl":
            self._show_sample()
        elif file == "status.json":
            self._doing = _message_of(self.mirror)
            self.reporter.alive(self._doing)

    def on_message(self, message: dict[str, Any]) -> None:
        """Note the end of a look over the host's files, whose rows are shown then; a sign of life; or the run's end."""
        if "file" not in message:
            self._order.flush()
        if "alive" in message:
            self.reporter.alive(self._doing)

    def flush(self) -> None:
        self._order.flush()

    def _show_sample(self) -> None:
        """Show the last rollout, once a second at most: a step may have thousands."""
        if time.monotonic() < self._sample_due:
            return
        row = last_jsonl_row(self.mirror.run.rollouts)
        if row is not None:
            self._order.add("rollouts.jsonl", row)
        self._sample_due = time.monotonic() + SAMPLE_S

    def show_usage(self, row: dict[str, Any]) -> None:
        """Show how busy a host is, at once: its clock is not the first host's."""
        with self._lock:
            self.view = fold(self.view, USAGE, row)
            self.reporter.row(USAGE, row, self.view)

    def _show(self, file: str, row: dict[str, Any]) -> None:
        if file == USAGE:
            return self.show_usage(self.named(row))
        with self._lock:
            self.view = fold(self.view, file, row)
            self.reporter.row(file, row, self.view)
        if file == "events.jsonl" and row.get("kind") == "checkpoint":
            self._add_checkpoint(row.get("path"))

    def _add_checkpoint(self, path: object) -> None:
        if is_checkpoint(path):
            self._add(str(path))


def _message_of(mirror: Mirror) -> str:
    """Return what the run's status says that it does, or "" for a status that cannot be read."""
    try:
        status = read_status(mirror.run)
    except (ValueError, TypeError, OSError, RecursionError):
        return ""
    return str(status.message) if status else ""


def watch(connection: RunConnection, reporter: Reporter, policy: RetryPolicy) -> RunResult:
    """Follow a run to its end. Raises DeployError, or KeyboardInterrupt to detach."""
    entry = connection.entry
    mirror = Mirror(entry.mirror)
    puller = CheckpointPuller(
        connection.transport,
        entry.run_path,
        mirror.run,
        reporter.say,
        policy.pause_s,
        wanted=connection.wanted,
    )
    watching = _Watching(mirror, reporter, puller.add)
    watching.look_back()
    others = OtherHosts(connection, watching.show_usage, policy)
    watching.named = others.named
    if watching.view.phases:
        reporter.say(
            "attach",
            f"{entry.run_id} is at stage {watching.view.stage or 'bootstrap'}, step {watching.view.step}",
        )
    try:
        ended = follow(
            connection,
            mirror,
            watching.on_file,
            reporter.say,
            policy,
            on_message=watching.on_message,
        )
    finally:
        watching.flush()
    others.close()
    puller.finish()
    view = watching.view
    notes = mirror.left_out_notes(rows=view.malformed)
    return RunResult(state=ended["state"], exit_code=ended["exit_code"], view=view, notes=notes)
