"""Watches a run beside the supervisor's own work: how busy its machine is, and whether it is well.

It has a thread of its own. What it does delays nothing, and where it fails the run goes on. Standard library only.
"""

import threading
import time
import traceback
from collections.abc import Callable

from rollouts.run_dir import RunDir, StageSpec
from rollouts.worker.on_end import on_warning_command, on_warning_room_s
from rollouts.worker.processes import POLL_S
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.health_watch import HealthWatch
from rollouts.worker.supervise.journal import Journal
from rollouts.worker.supervise.on_warning import WarningCommand
from rollouts.worker.supervise.usage_sampler import UsageSampler

TICK_S = 0.5
LAST_LOOK_S = 5.0  # at the run's end: what its last steps tell


class Observer:
    """Samples usage while a stage runs, and applies the health rules until the run's end.

    On several hosts each samples its own machine; the first alone has the records of the run (`judges`). `also` is
    called again and again.
    """

    def __init__(
        self, run: RunDir, journal: Journal, *, judges: bool, also: Callable[[], None]
    ) -> None:
        self._journal, self._also = journal, also
        self._sampler = UsageSampler(run, lambda message: journal.event("note", message=message))
        self._watch = HealthWatch(run, journal.event) if judges else None
        command = on_warning_command(run) if judges else None
        self._command = WarningCommand(run, command) if command is not None else None
        self._last_s = LAST_LOOK_S + on_warning_room_s(run)
        self._stage: StageSpec | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch_on, daemon=True)
        self._thread.start()

    def begin(self, stage: StageSpec) -> None:
        """Sample the processes of a stage from now on."""
        self._stage = stage

    def end(self) -> None:
        """Sample no more until the next stage begins."""
        self._stage = None

    def close(self, beat: Callable[[], None]) -> None:
        """Look a last time, and let the user's command be told of what was found; both within bounds."""
        self._closed.set()
        deadline = time.monotonic() + self._last_s
        while self._is_busy() and time.monotonic() < deadline:
            beat()
            time.sleep(POLL_S)
        if self._command is not None:
            self._command.give_up()

    def _is_busy(self) -> bool:
        return self._thread.is_alive() or (self._command is not None and self._command.is_alive())

    def _watch_on(self) -> None:
        try:
            while not self._closed.wait(TICK_S):
                self._sample()
                self._judge()
                self._also()
            self._judge(now=True)  # the last steps
            self._judge(now=True)  # what that wrote
        except Exception:  # a mistake of ours: the run is worth more than what is seen of it
            say("the run goes on, but nobody watches its health:", traceback.format_exc())
        if self._command is not None:
            self._command.close()

    def _sample(self) -> None:
        stage = self._stage
        try:
            if stage is not None and not self._journal.is_gone():
                self._sampler.sample(stage)
        except (
            OSError
        ) as error:  # a full disk, a directory that was removed: the supervisor's to tell
            say(f"no sample of the machine: {error}")

    def _judge(self, *, now: bool = False) -> None:
        for warning in self._watch.look(now=now) if self._watch is not None else ():
            if self._command is not None:
                self._command.offer(warning)
