"""The trackers that a run is fed into: an environment and a window each, and what they lack at the end.

Nothing here may cost the run a step: whatever becomes of a tracker is a warning. Standard library only.
"""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rollouts import run_dir
from rollouts.plain_files import read_plain
from rollouts.run_dir import TRACKER_STAGE, RunDir, State, TrackerSpec
from rollouts.worker import tmux
from rollouts.worker.environments.installer import BootstrapDeadline, BootstrapError
from rollouts.worker.environments.virtual_environment import ensure_environment
from rollouts.worker.processes import POLL_S
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.open_window import OpenWindow, close_windows, open_window
from rollouts.worker.supervise.pulse import Pulse
from rollouts.worker.supervise.without_tmux import StartError

STALL_S = 120.0  # steps wait for so long, and the tracker takes none
LOOK_S = 5.0


@dataclass
class _Fed:
    """One tracker of the run."""

    spec: TrackerSpec
    window: OpenWindow | None = None
    since: float = field(default_factory=time.time)  # it was started
    told: bool = False  # that it takes no more


class TrackerWindows:
    """Starts the trackers, notices those that end early or take nothing, and ends them with the run."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._fed = [_Fed(spec) for spec in pulse.plan.trackers]
        self._due_at = 0.0  # monotonic, of the next look

    def start(self) -> None:
        """Make each tracker's environment and open its window. Raises StopRequested alone."""
        for fed in self._fed:
            limit_s = self._pulse.plan.bootstrap_timeout_s
            deadline = BootstrapDeadline(limit_s, tick=self._pulse.tick)
            try:
                ensure_environment(fed.spec.environment, self._pulse.run, deadline)
                fed.window = open_window(
                    self._pulse.run,
                    self._pulse.plan,
                    TRACKER_STAGE,
                    fed.spec.process,
                    may_end=True,
                )
            except (BootstrapError, tmux.TmuxError, StartError, OSError) as error:
                self._warn(fed, f"{fed.spec.kind} gets nothing of this run: {error}")
            fed.since = time.time()

    def check(self) -> None:
        """Warn, once for each, of a tracker that has ended or takes nothing. Called often; looks now and then."""
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + LOOK_S
        for fed in self._fed:
            if fed.told or fed.window is None:
                continue
            if not fed.window.is_open() or fed.window.record() is not None:
                self._warn(fed, _end_of(fed.window))
            elif _stalls(self._pulse.run, fed):
                self._warn(fed, f"{fed.spec.kind} has taken no step for {STALL_S:.0f} s")

    def close(self, state: State, beat: Callable[[], None]) -> None:
        """Let each send what is left, within bounds, end it, and say what it lacks."""
        windows = [fed.window for fed in self._fed if fed.window is not None]
        if windows and not self._pulse.journal.is_gone():
            self._ask(state, windows, beat)
        reasons = [self._reason(fed) for fed in self._fed]
        close_windows(self._pulse.run, windows, grace_s=self._pulse.plan.stop_grace_s, tick=beat)
        if not self._pulse.journal.is_gone():
            for fed, reason in zip(self._fed, reasons, strict=True):
                self._say_missing(fed, reason)

    def _reason(self, fed: _Fed) -> str:
        """Return why a tracker may lack something, unless it was told; "" for one that ended well."""
        if fed.told or fed.window is None:
            return ""
        if fed.window.record() is None and fed.window.is_open():
            return f"{fed.spec.kind} did not end within {self._pulse.plan.stop_grace_s:g} s"
        return "" if fed.window.has_succeeded() else _end_of(fed.window)

    def _ask(self, state: State, windows: list[OpenWindow], beat: Callable[[], None]) -> None:
        try:
            self._pulse.run.trackers_end.write_text(state)
        except OSError as error:  # a full disk: they are asked by a signal, with less time
            say(f"trackers: {error}")
            return
        deadline = time.monotonic() + self._pulse.plan.stop_grace_s
        while any(window.is_open() for window in windows) and time.monotonic() < deadline:
            beat()
            time.sleep(POLL_S)

    def _say_missing(self, fed: _Fed, reason: str) -> None:
        logged, missing = _counts(self._pulse.run, fed.spec.kind)
        if reason or missing:
            lacks = f"{fed.spec.kind} lacks {missing} of {logged} steps" if missing else ""
            self._warn(fed, ". ".join(filter(None, (reason, lacks))))
        else:
            message = f"{fed.spec.kind}, project {fed.spec.project}: it has all {logged} steps"
            self._pulse.journal.event("note", message=message)

    def _warn(self, fed: _Fed, what: str) -> None:
        """Tell it in an event. The command brings what is missing, whenever it is run."""
        fed.told = True
        kind, project = fed.spec.kind, fed.spec.project
        send = f"deploy track {self._pulse.run.run_id} --to {kind} --project {shlex.quote(project)}"
        row = run_dir.last_jsonl_row(self._pulse.run.metrics) or {}
        self._pulse.journal.event(
            "warning",
            stage=row.get("stage", self._pulse.plan.stages[0].name),
            step=row.get("step", 0),
            cause=f"tracker_{kind}",
            message=f"{what}. No step and no data is lost: `{send}` sends what it lacks",
        )


def _end_of(window: OpenWindow) -> str:
    record = window.record()
    said = f": {record.message}" if record is not None and record.message else ""
    return f"{window.describe_end()}{said}"


def _stalls(run: RunDir, fed: _Fed) -> bool:
    """Return whether steps were logged that the tracker did not take, for long."""
    try:
        logged = run.metrics.stat().st_mtime
    except FileNotFoundError:
        return False
    cursor = run.tracker(fed.spec.kind)
    taken = cursor.stat().st_mtime if cursor.exists() else 0.0
    return logged > taken and time.time() - max(taken, fed.since) > STALL_S


def _counts(run: RunDir, kind: str) -> tuple[int, int]:
    """Return how many steps were logged, and how many of them the tracker lacks."""
    rows = run_dir.iter_jsonl(run.metrics)
    logged = {(row["stage"], row["step"]) for row in rows if _is_step(row)}
    taken = _taken(run, kind)
    return len(logged), sum(step > taken.get(stage, -1) for stage, step in logged)


def _is_step(row: dict[str, object]) -> bool:
    return isinstance(row.get("stage"), str) and type(row.get("step")) is int


def _taken(run: RunDir, kind: str) -> dict[str, int]:
    try:
        found = json.loads(read_plain(run.tracker(kind)))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {str(stage): step for stage, step in found.items() if type(step) is int}
