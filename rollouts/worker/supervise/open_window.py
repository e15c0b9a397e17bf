"""The supervisor's view of the windows that it opened: alive, how they ended, ending them. Standard library only."""

import signal
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.engines.diagnosis import diagnose
from rollouts.run_dir import ExitRecord, LaunchPlan, ProcessSpec, RunDir
from rollouts.worker import tmux
from rollouts.worker.processes import (
    POLL_S,
    Scan,
    descendants,
    end_marked,
    listens,
    marked_processes,
    send_signal,
    start_ticks,
    window_mark,
)
from rollouts.worker.supervise import without_tmux
from rollouts.worker.supervise.causes import SENTENCE, cause_of, may_pass, without_torchrun
from rollouts.worker.supervise.engine_answers import answers_ready
from rollouts.worker.supervise.output import DRAIN_S
from rollouts.worker.supervise.window import window_command

DIAGNOSED_LINES = 400  # of an engine's log, from its end: a chain of tracebacks is that long
WRAPPER_MARGIN_S = 2 * DRAIN_S + 2.0  # a wrapper's own work after its process's grace


@dataclass(frozen=True)
class OpenWindow:
    """A window with its wrapper process, known by id and start time."""

    run: RunDir
    stage: str
    spec: ProcessSpec
    may_end: bool  # its end with 0 is what it is for; an engine is never to end by itself
    wrapper: int
    wrapper_ticks: int | None
    log_start: int  # bytes that its log had before: of an engine's earlier lives
    # what descended from the wrapper: {id: start ticks}
    family: dict[int, int] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        return window_mark(self.stage, self.spec.window)

    def is_open(self) -> bool:
        """Is the wrapper alive? It outlives its process until it has ended what that left, and the log is complete."""
        return self.wrapper_ticks is not None and start_ticks(self.wrapper) == self.wrapper_ticks

    def look_around(self, seen: Scan) -> None:
        """Remember who descends from the wrapper: should that be killed, nothing else leads to them any more."""
        if self.is_open():
            self.family.clear()
            self.family.update(descendants(self.wrapper, self.run, seen=seen))

    def is_serving(self) -> bool:
        """Does the ready URL answer 200, and is it this window's process that listens there, not a stranger?"""
        assert self.spec.ready_url is not None
        port = urllib.parse.urlsplit(self.spec.ready_url).port
        assert port is not None, f"{self.spec.ready_url}: needs a port"
        return answers_ready(self.spec.ready_url) and listens(
            port, marked_processes(self.run, {self.mark})
        )

    def record(self) -> ExitRecord | None:
        return run_dir.read_exit(self.run, self.stage, self.spec.window)

    def ended_at(self) -> float:
        """Return when its process ended, for ordering; without a record, now."""
        record = self.record()
        return record.ended_at if record else time.time()

    def has_failed(self) -> bool:
        """Ended, or vanished without a record, and not as a trainer that is done."""
        was_open = self.is_open()  # before the record is read: a wrapper writes it while it lives
        return (self.record() is not None or not was_open) and not self.has_succeeded()

    def has_succeeded(self) -> bool:
        record = self.record()
        return self.may_end and record is not None and record.code == 0

    def failure_code(self) -> int:
        """Return the exit code of a run that failed because this window ended: never 0."""
        record = self.record()
        return (record.code if record else 0) or 1

    def diagnosis(self) -> str:
        """Return why this engine died or is not ready, as far as this life's log tells; else, and for a trainer, ""."""
        if self.may_end:
            return ""
        return (
            diagnose(
                run_dir.tail_lines(
                    self.run.log(self.spec.window), DIAGNOSED_LINES, start=self.log_start
                )
            )
            or ""
        )

    def describe_end(self) -> str:
        return ". ".join(filter(None, (self._end(), self.diagnosis())))

    def last_words(self) -> list[str]:
        """Return the end of this life's log, without torchrun's own traceback."""
        return without_torchrun(self._log_end())

    def _log_end(self) -> list[str]:
        return run_dir.tail_lines(
            self.run.log(self.spec.window), DIAGNOSED_LINES, start=self.log_start
        )

    def cause(self) -> tuple[str, bool]:
        """(why this trainer ended, in its own words or "", whether it is a sentence made for people)."""
        of_stage: list[dict[str, Any]] = []
        for row in run_dir.iter_jsonl(self.run.events):
            kind = row.get("kind")
            if kind == "stage_started":
                of_stage = []
            elif kind == "error" and row.get("window") == self.spec.window:
                of_stage.append(row)
        if of_stage:
            return str(of_stage[-1].get("message") or ""), True
        lines = self._log_end()
        return cause_of(lines) or "", any(line.startswith(SENTENCE) for line in lines)

    def may_pass(self) -> bool:
        """Whether what ended this trainer need not come again."""
        record = self.record()
        killed = record is None or record.signal is not None
        return self.may_end and (killed or may_pass(self._log_end()))

    def _end(self) -> str:
        record, name = self.record(), self.spec.window
        if record is None:
            return f"{name} ended without an exit record: its window was killed, so how it ended is unknown"
        if record.signal is not None:
            return f"{name} was ended by {signal.Signals(record.signal).name}"
        return f"{name} ended with exit code {record.exit_code}"


def open_window(
    run: RunDir, plan: LaunchPlan, stage: str, spec: ProcessSpec, *, may_end: bool
) -> OpenWindow:
    """Start a window of the plan: in the run's session, or without one under Slurm. Raises TmuxError or StartError."""
    command = window_command(plan.base_python, run, stage, spec.window)
    log = run.log(spec.window)
    log_start = log.stat().st_size if log.exists() else 0
    cwd = Path(plan.program_path)
    if plan.slurm is None:
        pid = tmux.open_window(run.run_id, spec.window, command, cwd=cwd)
    else:
        pid = without_tmux.start(command, cwd=cwd)
    return OpenWindow(
        run=run,
        stage=stage,
        spec=spec,
        may_end=may_end,
        wrapper=pid,
        wrapper_ticks=start_ticks(pid),
        log_start=log_start,
    )


def close_windows(
    run: RunDir, windows: Sequence[OpenWindow], *, grace_s: float, tick: Callable[[], None]
) -> list[int]:
    """End the windows' processes and all that came from them; returns the ids that survived SIGKILL.

    Each wrapper ends its own (SIGTERM, `grace_s`, SIGKILL) and writes the exit record. What a killed wrapper left
    behind, and a wrapper that hangs, is ended here.
    """
    for window in windows:
        if window.is_open():
            send_signal(window.wrapper, signal.SIGTERM)
    deadline = time.monotonic() + 2 * grace_s + WRAPPER_MARGIN_S
    orphaned = {window.mark for window in windows if not window.is_open()}
    family = {
        pid: ticks
        for window in windows
        if not window.is_open()
        for pid, ticks in window.family.items()
    }
    left = end_marked(run, orphaned, grace_s=grace_s, tick=tick, family=family)
    while any(window.is_open() for window in windows) and time.monotonic() < deadline:
        tick()
        time.sleep(POLL_S)
    for window in windows:
        if window.is_open():
            send_signal(window.wrapper, signal.SIGKILL)
    family = {pid: ticks for window in windows for pid, ticks in window.family.items()}
    return left + end_marked(
        run, {window.mark for window in windows}, grace_s=0, tick=tick, family=family
    )
