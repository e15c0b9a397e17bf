"""One engine through all its lives: does it still answer, and its end before it is started again.

An engine that ended has an exit record; one that hangs has none, and is known by its silence. Standard library only.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rollouts import run_dir
from rollouts.run_dir import RunDir
from rollouts.worker import tmux
from rollouts.worker.processes import POLL_S, end_marked, is_stopped, marked_processes
from rollouts.worker.supervise.engine_answers import answers
from rollouts.worker.supervise.open_window import WRAPPER_MARGIN_S, OpenWindow, close_windows

ATTEMPTS = 2  # at least so many unanswered heartbeats make a hung engine
PERIOD_MAX_S = 2.0  # between two heartbeats


class Heartbeat:
    """Asks one engine in a thread whether it answers, so that one that hangs does not hold up the supervisor.

    Any answer counts: SGLang's /ready is 503 for as long as sampling is paused. The ready URL has to be one that is
    answered while the model is busy (a long prefill, a weight load), which a route that samples a token would not be.
    A process of the engine's that is stopped (SIGSTOP) counts as silence: it may be another than the one that answers.
    """

    def __init__(self, window: OpenWindow, *, hang_timeout_s: float) -> None:
        self.silent_s = 0.0  # since it last answered, less the time between questions
        self._window = window
        self._attempt_s = hang_timeout_s / ATTEMPTS
        self._period_s = min(PERIOD_MAX_S, self._attempt_s / 2)
        self._stopped = threading.Event()
        threading.Thread(target=self._ask, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _ask(self) -> None:
        while not self._stopped.wait(self._period_s):
            asked_at = time.monotonic()
            answered = self._answers()
            # Bounded by what we waited on purpose: a supervisor that was itself stopped must not blame the engine.
            waited_s = self._period_s + min(time.monotonic() - asked_at, self._attempt_s)
            self.silent_s = 0.0 if answered else self.silent_s + waited_s

    def _answers(self) -> bool:
        window = self._window
        assert window.spec.ready_url is not None
        if not answers(window.spec.ready_url, timeout_s=self._attempt_s):
            return False
        return not any(map(is_stopped, marked_processes(window.run, {window.mark})))


@dataclass
class EngineLives:
    """One engine of the stage under way, through all its lives."""

    window: OpenWindow  # of the life it is in
    opened_at: float  # monotonic, of that life
    life: int = 1
    has_served: bool = False  # in any life: it can start, so an end is no mistake in the config
    heartbeat: Heartbeat | None = None  # of that life, once it is ready

    @property
    def name(self) -> str:
        return self.window.spec.window

    @property
    def is_starting(self) -> bool:
        return self.heartbeat is None and self.window.spec.ready_url is not None

    @property
    def silent_s(self) -> float:
        return self.heartbeat.silent_s if self.heartbeat else 0.0

    def mark_ready(self, *, hang_timeout_s: float) -> None:
        """Begin to check that this engine answers."""
        self.has_served = True
        self.heartbeat = Heartbeat(self.window, hang_timeout_s=hang_timeout_s)

    def start_next_life(self, window: OpenWindow) -> None:
        """Take the window of the engine's next life."""
        self.window, self.opened_at, self.life = window, time.monotonic(), self.life + 1

    def stop_heartbeat(self) -> None:
        """Stop checking this engine."""
        if self.heartbeat is not None:
            self.heartbeat.stop()
        self.heartbeat = None

    def may_restart(self) -> bool:
        """Return whether another life could go better: not where it gave up by itself before it ever served.

        SGLang gives up with SIGKILL, as a stranger would end it: then its log tells.
        """
        record = self.window.record()
        killed = record is None or record.signal is not None
        return self.has_served or (killed and not self.window.diagnosis())


def end_life(
    run: RunDir, engine: EngineLives, *, grace_s: float, tick: Callable[[], None]
) -> list[int]:
    """SIGKILL all that is left of the engine's life, those of its children that hold a GPU too, and wait until it,
    its wrapper and its tmux window are gone. Its exit record, if there is one, gets the life's number.

    Returns the ids that survived.
    """
    engine.stop_heartbeat()
    window = engine.window
    left = end_marked(run, {window.mark}, grace_s=0, tick=tick)
    left += close_windows(run, [window], grace_s=grace_s, tick=tick)
    if run.slurm_job.exists():  # no tmux
        return left
    deadline = time.monotonic() + WRAPPER_MARGIN_S
    while engine.name in tmux.window_names(run.run_id) and time.monotonic() < deadline:
        tick()
        time.sleep(POLL_S)
    return left


def keep_record(run: RunDir, engine: EngineLives) -> None:
    """Rename the exit record of the life that ended, so that the next life has none until it ends."""
    stage, name = engine.window.stage, engine.name
    # its wrapper was killed: how the engine ended is unknown
    with contextlib.suppress(FileNotFoundError):
        run.exit(stage, name).replace(run.exit(stage, run_dir.life_name(name, engine.life)))
