"""One stage: its engines, its trainer, and the end of both. Standard library only."""

import contextlib
import json
import time
from functools import partial
from pathlib import Path

from rollouts.engines.keys import ADMIN_KEY_VARIABLE
from rollouts.engines.send_model import START_NAME, SendError, send_directory
from rollouts.manifest import manifest_problems
from rollouts.plain_files import read_plain
from rollouts.run_dir import ModelToSend, ProcessSpec, StageSpec
from rollouts.worker import tmux
from rollouts.worker.processes import SUPERVISOR_WINDOW
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.engine_answers import answers
from rollouts.worker.supervise.engine_watch import EngineWatch, RestartBudget, record_end
from rollouts.worker.supervise.failures import HostLost, RunFailed, StopRequested
from rollouts.worker.supervise.open_window import OpenWindow, close_windows, open_window
from rollouts.worker.supervise.pulse import Pulse
from rollouts.worker.supervise.without_tmux import StartError

REACH_S = 10.0
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
            self._start_engines()
            self._pulse.meet(self._stage.name, f"all start {self._stage.name}")
            self._require_reach()
            if self._stage.trainer is not None:
                self._announce(
                    f"{self._stage.name}: the trainer runs: data and model first, then steps"
                )
                self._trainer = self._open(self._stage.trainer)
                self._await_trainer(self._trainer)
            # engines here serve until the ranks of all hosts have ended
            with contextlib.suppress(HostLost):  # what it had to do is done
                self._pulse.meet(
                    self._stage.name, f"all end {self._stage.name}", self._check_windows
                )
        finally:
            self._close_all()
        self._heed_stop()
        seconds = round(time.monotonic() - started, 3)
        self._pulse.journal.event("stage_ended", stage=self._stage.name, seconds=seconds)

    def _heed_stop(self) -> None:
        """Raise StopRequested where the trainer ended on request: a stage that has steps left has not ended."""
        run, name = self._pulse.run, self._stage.name
        if run.stop_asked.exists():
            why = read_plain(run.stop_asked).decode(errors="replace").strip()
            raise StopRequested(
                f"stopped in stage {name}, {why or 'on request'}, after a checkpoint"
            )

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

    def _start_engines(self) -> None:
        """Return once every engine answers 200; those that start with a model of the first host's get it before."""
        stage, name = self._stage, self._stage.name
        if stage.receiver is not None:
            self._watch.start([stage.receiver])
            self._await_engines()
        if stage.send is not None:
            self._pulse.meet(name, "what takes the model is ready", self._check_windows)
            if self._pulse.peers.leads:
                self._send_model(stage.send)
            self._pulse.meet(name, "the engines' model is sent", self._check_windows)
        self._watch.start(stage.engines)
        self._await_engines()

    def _send_model(self, send: ModelToSend) -> None:
        """Send the model that engines of other hosts start with. Raises RunFailed."""
        directory, run = Path(send.directory), self._pulse.run
        key = json.loads(read_plain(run.secrets))["engine_keys"][ADMIN_KEY_VARIABLE]
        for url in send.receivers:
            self._announce(f"{self._stage.name}: sending {directory} to {url}")
            started = time.monotonic()

            def work(url: str = url) -> SendError | None:
                try:
                    send_directory(url, directory, START_NAME, key=key)
                except SendError as error:
                    return error
                return None

            if (error := self._pulse.run_in_thread(work)) is not None:
                message = f"stage {self._stage.name}: the model that engines start with was not sent: {error}"
                raise RunFailed(message, window=SUPERVISOR_WINDOW, log_tail=[])
            seconds = round(time.monotonic() - started, 3)
            self._pulse.journal.event("model_sent", path=str(directory), url=url, seconds=seconds)

    def _require_reach(self) -> None:
        """Raise RunFailed where an engine of another host is ready there and does not answer from here."""
        for url in self._stage.far_ready_urls:
            if not self._pulse.run_in_thread(partial(answers, url, timeout_s=REACH_S)):
                raise RunFailed(
                    f"stage {self._stage.name}: the engine at {url} is ready on its host, and this host does not reach"
                    " it. Open that port between the hosts: the plan found it open.",
                    window=SUPERVISOR_WINDOW,
                    log_tail=[],
                )

    def _open(self, spec: ProcessSpec) -> OpenWindow:
        say(f"stage={self._stage.name} window={spec.window}: starting")
        is_trainer = spec is self._stage.trainer
        try:
            window = open_window(
                self._pulse.run, self._pulse.plan, self._stage.name, spec, may_end=is_trainer
            )
        except (tmux.TmuxError, StartError) as error:
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
        return RunFailed(
            end,
            window=window.spec.window,
            exit_code=code,
            log_tail=window.last_words(),
            may_pass=window.may_pass(),
        )

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
        left = close_windows(
            self._pulse.run, windows, grace_s=self._pulse.plan.stop_grace_s, tick=self._pulse.beat
        )
        for window in sorted(windows, key=lambda window: window.ended_at()):
            record_end(self._pulse.journal, window)
        if left:
            self._pulse.journal.event(
                "note", message=f"{self._stage.name}: still there after SIGKILL: {left}"
            )
        self._pulse.windows = tuple
