"""One stage: its engines, its trainer, and the end of both. Standard library only."""

import time
from pathlib import Path

from rollouts.manifest import manifest_problems
from rollouts.run_dir import ProcessSpec, StageSpec
from rollouts.worker import tmux
from rollouts.worker.processes import SUPERVISOR_WINDOW
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.engine_watch import EngineWatch, RestartBudget, record_end
from rollouts.worker.supervise.failures import RunFailed
from rollouts.worker.supervise.open_window import OpenWindow, close_windows, open_window
from rollouts.worker.supervise.pulse import Pulse

SETTLE_S = 0.5  # what ends together (a stop of the whole session, an engine and its client) is seen together


class StageRun:
    """One stage of the plan, from its first window to the end of all its processes."""

    def __init__(self, pulse: Pulse, stage: StageSpec, budget: RestartBudget) -> None:
        self._pulse, self._stage, self._budget = pulse, stage, budget
        self._watch = EngineWatch(pulse, stage, budget, self._open)
        self._trainer: OpenWindow | None = None
        self._deadline = time.monotonic() + stage.timeout_s

    def main(self) -> None:
        """Run the stage to its end. Raises RunFailed, or StopRequested; nothing of it runs on return."""
        started = time.monotonic()
        self._announce(f"{self._stage.name}: starting")
        self._pulse.journal.event("stage_started", stage=self._stage.name)
        self._require_checkpoint()
        self._pulse.windows = self._windows
        try:
            self._watch.start()
            self._await_engines()
            self._pulse.meet(self._stage.name, f"all start {self._stage.name}")
            self._announce(f"{self._stage.name}: the trainer runs: data and model first, then steps")
            self._trainer = self._open(self._stage.trainer)
            self._await_trainer(self._trainer)
        finally:
            self._close_all()
        seconds = round(time.monotonic() - started, 3)
        self._pulse.journal.event("stage_ended", stage=self._stage.name, seconds=seconds)

    def _announce(self, message: str) -> None:
        self._pulse.announce(self._stage.name, message)

    def _require_checkpoint(self) -> None:
        """Raise RunFailed where the checkpoint that the stage starts from is missing or damaged."""
        if self._stage.needs_checkpoint is None:
            return
        directory = Path(self._stage.needs_checkpoint)
        problems = self._pulse.run_in_thread(lambda: manifest_problems(directory.resolve()))
        if problems:
            listed = "\n".join(problems[:10])
            message = f"stage {self._stage.name} starts from {directory}, which is no completed checkpoint:\n{listed}"
            raise RunFailed(message, window=SUPERVISOR_WINDOW, log_tail=problems)

    def _open(self, spec: ProcessSpec) -> OpenWindow:
        say(f"stage={self._stage.name} window={spec.window}: starting")
        is_trainer = spec is self._stage.trainer
        try:
            window = open_window(self._pulse.run, self._pulse.plan, self._stage.name, spec, may_end=is_trainer)
        except tmux.TmuxError as error:
            message = f"stage {self._stage.name}: cannot open a window for {spec.window}: {error}"
            raise RunFailed(message, window=SUPERVISOR_WINDOW) from None
        return window

    def _windows(self) -> list[OpenWindow]:
        return [*self._watch.windows, *([self._trainer] if self._trainer else [])]

    def _await_engines(self) -> None:
        """Return once every engine answers 200 at its ready URL."""
        while waiting := self._watch.starting():
            self._announce(f"{self._stage.name}: waiting for {', '.join(waiting)}")
            self._pulse.pause()
            self._check_windows()
            self._check_deadline(waiting[0])

    def _await_trainer(self, trainer: OpenWindow) -> None:
        while not trainer.has_succeeded():
            self._check_windows()
            self._check_deadline(trainer.spec.window)
            self._pulse.pause()

    def _check_windows(self) -> None:
        """Record engines that became ready, and start those again that died or hang.

        Raises RunFailed for what cannot be mended.
        """
        ready = self._watch.serving()
        self._check_alive()
        self._watch.record_ready(ready)
        self._watch.check_answers()

    def _check_alive(self) -> None:
        """Start again the engines that ended. Raises RunFailed for the first window that ended, where none can be."""
        windows = self._windows()
        if not any(window.has_failed() for window in windows):
            return
        settled_at = time.monotonic() + SETTLE_S
        while time.monotonic() < settled_at:
            self._pulse.pause()
        if self._trainer is not None and self._trainer.has_succeeded():
            return
        failed = [window for window in windows if window.has_failed()]
        if not self._watch.restart_ended(failed):
            raise self._failure(min(failed, key=lambda window: window.ended_at()))

    def _failure(self, window: OpenWindow) -> RunFailed:
        """Return why this window's end ends the run: for a trainer its last sentence, where it has one."""
        end = f"stage {self._stage.name}: {window.describe_end()}"
        if window.may_end:
            said, event = window.cause()
            end = said if event else f"{end}: {said}" if said else end
        else:
            end += str(self._budget)
        code = window.failure_code()
        return RunFailed(end, window=window.spec.window, exit_code=code, log_tail=window.last_words())

    def _check_deadline(self, window: str) -> None:
        if time.monotonic() > self._deadline:
            raise RunFailed(
                f"stage {self._stage.name} was not done within limits.stage_timeout_s={self._stage.timeout_s:g}."
                " Raise it, or see in the log what took so long.",
                window=window,
            )

    def _close_all(self) -> None:
        """End the stage's windows and all that came from them; the order of their ends is in the events."""
        self._pulse.set_message(self._stage.name, f"{self._stage.name}: ending its processes")
        self._pulse.beat()
        self._watch.stop_heartbeats()
        windows = self._windows()
        left = close_windows(self._pulse.run, windows, grace_s=self._pulse.plan.stop_grace_s, tick=self._pulse.beat)
        for window in sorted(windows, key=lambda window: window.ended_at()):
            record_end(self._pulse.journal, window)
        if left:
            self._pulse.journal.event("note", message=f"{self._stage.name}: still there after SIGKILL: {left}")
        self._pulse.windows = tuple
