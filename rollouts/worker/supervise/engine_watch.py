"""The engines of a stage: wait until they are ready, notice one that died or hangs, start it again.

Standard library only.
"""

import time
import urllib.parse
from collections.abc import Callable, Sequence

from rollouts.run_dir import ProcessSpec, StageSpec
from rollouts.worker.processes import SUPERVISOR_WINDOW
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.engine_answers import port_is_taken
from rollouts.worker.supervise.engine_lives import EngineLives, end_life, keep_record
from rollouts.worker.supervise.failures import RunFailed
from rollouts.worker.supervise.journal import Journal
from rollouts.worker.supervise.open_window import OpenWindow
from rollouts.worker.supervise.pulse import Pulse


class RestartBudget:
    """How many engine restarts the run has left."""

    def __init__(self, restarts_max: int) -> None:
        self.allowed, self.left = restarts_max, restarts_max

    def __str__(self) -> str:
        """Return what to add where an engine's end ends the run; "" where no restart was allowed."""
        return (
            f" (engine.restarts_max={self.allowed}, of which {self.left} are left)"
            if self.allowed
            else ""
        )


class EngineWatch:
    """The engines of one stage, from their start to the stage's end."""

    def __init__(
        self,
        pulse: Pulse,
        stage: StageSpec,
        budget: RestartBudget,
        open_window: Callable[[ProcessSpec], OpenWindow],
    ) -> None:
        self.engines: list[EngineLives] = []
        self._pulse, self._stage, self._budget, self._open = pulse, stage, budget, open_window

    @property
    def windows(self) -> list[OpenWindow]:
        return [engine.window for engine in self.engines]

    def start(self, specs: Sequence[ProcessSpec]) -> None:
        """Start these of the stage's engines. Raises RunFailed where a port is taken or a window cannot be opened."""
        for spec in specs:
            _require_free_port(spec)
        for spec in specs:
            self.engines.append(EngineLives(self._open(spec), time.monotonic()))

    def starting(self) -> list[str]:
        """Return the names of the engines that do not answer yet."""
        return [engine.name for engine in self.engines if engine.is_starting]

    def serving(self) -> list[tuple[EngineLives, OpenWindow]]:
        """Return the engines that became ready since the last look, each with the window of that life."""
        starting = [engine for engine in self.engines if engine.is_starting]
        return [(engine, engine.window) for engine in starting if engine.window.is_serving()]

    def record_ready(self, ready: Sequence[tuple[EngineLives, OpenWindow]]) -> None:
        """Record which engines are ready and watch that they answer from now on."""
        for engine, window in ready:
            if engine.window is not window:  # started again meanwhile
                continue
            engine.mark_ready(hang_timeout_s=self._pulse.plan.engine_hang_timeout_s)
            seconds = round(time.monotonic() - engine.opened_at, 3)
            self._pulse.journal.event(
                "engine_ready", window=engine.name, url=window.spec.ready_url, seconds=seconds
            )
            say(f"stage={self._stage.name} window={engine.name}: ready after {seconds:.1f} s")

    def restart_ended(self, failed: Sequence[OpenWindow]) -> bool:
        """Start again the engines whose windows failed; return False, and start none, where that cannot mend it."""
        ended = [engine for engine in self.engines if engine.window in failed]
        only_engines = len(ended) == len(failed)
        if (
            not only_engines
            or len(ended) > self._budget.left
            or not all(engine.may_restart() for engine in ended)
        ):
            return False
        for engine in ended:
            self._restart(engine, engine.window.describe_end())
        return True

    def check_answers(self) -> None:
        """Start again each engine that hangs. Raises RunFailed for one that cannot be, or that starts for too long."""
        for engine in self.engines:
            problem, advice = self._silence(engine)
            if not problem:
                continue
            if not self._budget.left or not engine.has_served:
                message = f"stage {self._stage.name}: {problem}{self._budget}{advice}"
                raise RunFailed(message, window=engine.name)
            self._restart(engine, problem)

    def stop_heartbeats(self) -> None:
        """Stop checking the engines: they are about to be ended."""
        for engine in self.engines:
            engine.stop_heartbeat()

    def _silence(self, engine: EngineLives) -> tuple[str, str]:
        """Return (why an engine counts as hung, what may help), or two empty strings."""
        url, limit_s, hang_s = (
            engine.window.spec.ready_url,
            engine.window.spec.ready_timeout_s,
            self._pulse.plan.engine_hang_timeout_s,
        )
        if engine.is_starting and time.monotonic() - engine.opened_at > limit_s:
            advice = ". Its last lines say how far it got; raise the limit if it was only slow. "
            problem = f"{engine.name} did not answer 200 at {url} within limits.engine_ready_timeout_s={limit_s:g}"
            return problem, (advice + engine.window.diagnosis()).rstrip()
        if engine.silent_s > hang_s:
            return (
                f"{engine.name} hung: no answer at {url} for limits.engine_hang_timeout_s={hang_s:g}",
                "",
            )
        return "", ""

    def _restart(self, engine: EngineLives, reason: str) -> None:
        """Begin an engine's next life; the stage's trainer waits for it."""
        self._budget.left -= 1
        left = end_life(
            self._pulse.run, engine, grace_s=self._pulse.plan.stop_grace_s, tick=self._pulse.tick
        )
        record_end(self._pulse.journal, engine.window)
        keep_record(self._pulse.run, engine)
        self._pulse.journal.event(
            "engine_restarted",
            stage=self._stage.name,
            window=engine.name,
            reason=reason,
            restarts_left=self._budget.left,
        )
        say(
            f"stage={self._stage.name} window={engine.name}: {reason}; starting it again, {self._budget.left} more left"
        )
        if left:
            message = f"stage {self._stage.name}: {reason}, and could not be ended: processes {left} survived SIGKILL"
            raise RunFailed(message, window=engine.name)
        _require_free_port(engine.window.spec)
        engine.start_next_life(self._open(engine.window.spec))


def record_end(journal: Journal, window: OpenWindow) -> None:
    """Write the `process_ended` event of a window whose process has ended."""
    record = window.record()
    journal.event(
        "process_ended",
        stage=window.stage,
        window=window.spec.window,
        exit_code=record.exit_code if record else None,
        signal=record.signal if record else None,
    )


def _require_free_port(spec: ProcessSpec) -> None:
    """Raise RunFailed where another process has the engine's port: it would answer in the engine's place."""
    if spec.ready_url is not None and port_is_taken(spec.ready_url):
        place = urllib.parse.urlsplit(spec.ready_url).netloc
        fields = {"router": "another engine.router_port", "receiver": "another by deploying again"}
        fix = fields.get(spec.window, "another engine.sglang_port")
        raise RunFailed(
            f"{spec.window} cannot use {place}: another process listens there already."
            f" Choose {fix}, or end that process (`ss -ltnp` shows it).",
            window=SUPERVISOR_WINDOW,
            log_tail=[],
        )
