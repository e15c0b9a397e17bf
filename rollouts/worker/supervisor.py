"""The run's supervisor: environments, then each stage's engines and trainer, then an end that leaves nothing behind.

    python3 -m rollouts.worker.supervisor <run_path>

It decides nothing: plan.json says what runs, and how often an engine that died or hangs is started again. It holds
supervisor.lock for as long as it lives, and every window ends its process when that lock falls free. The exit code is
the run's: 0 only if every trainer ended with 0; else that of the process that failed first; STOPPED_CODE after a stop.
Standard library only.
"""

import json
import signal
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.manifest import manifest_problems
from rollouts.plain_files import read_plain
from rollouts.run_dir import LaunchPlan, ProcessSpec, RunDir, StageName, StageSpec, State, Status
from rollouts.worker import tmux
from rollouts.worker.bootstrap import BootstrapError, Patience, ensure_environment, fetch_model
from rollouts.worker.console import say
from rollouts.worker.engines import Engine, end_life, keep_record
from rollouts.worker.health import port_is_taken
from rollouts.worker.journal import Journal
from rollouts.worker.processes import (
    STOPPED_CODE,
    SUPERVISOR_STAGE,
    SUPERVISOR_WINDOW,
    end_marked,
    listeners,
    marked_processes,
    scan,
    window_mark,
)
from rollouts.worker.smoke import smoke_test
from rollouts.worker.windows import OpenWindow, close_windows, open_window

POLL_S = 0.1
SETTLE_S = 0.5  # what ends together (a stop of the whole session, an engine and its client) is seen together
LOG_TAIL_LINES = 50
OPEN = "other machines reach it. What belongs to the run alone should listen on 127.0.0.1."


class StopRequested(Exception):
    """Somebody asked the run to end."""


class RunFailed(Exception):
    """The run cannot go on. Carries what the `error` event says."""

    def __init__(self, message: str, *, window: str, exit_code: int = 1, log_tail: Sequence[str] | None = None) -> None:
        super().__init__(message)
        self.window, self.exit_code, self.log_tail = window, exit_code, log_tail


class Supervisor:
    """One run from bootstrap to its final status."""

    def __init__(self, run: RunDir, plan: LaunchPlan, journal: Journal) -> None:
        self.run, self.plan, self.journal = run, plan, journal
        self.told: set[tuple[str, int]] = set()  # listeners that an event named
        self.stop_signal: int | None = None
        self.engines: list[Engine] = []  # of the stage under way
        self.trainer: OpenWindow | None = None
        self.restarts_left, self.hang_timeout_s = plan.engine_restarts_max, plan.engine_hang_timeout_s
        launched = run_dir.read_status(run)
        self.started_at = launched.started_at if launched else time.time()
        self.state: State = "running"
        self.stage: StageName | None = None
        self.message = ""
        self.beat_at = 0.0  # monotonic, of the last status written

    # --- the whole -----------------------------------------------------------------------------------------------

    def main(self) -> int:
        """Do the plan. Returns the run's exit code; the final status is written by then."""
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        mode = json.loads(read_plain(self.run.config))["output"]["mode"]
        self._event("run_started", mode=mode)
        state: State = "failed"
        try:
            self._bootstrap()
            for stage in self.plan.stages:
                self._run_stage(stage)
            state, code, message = "done", 0, "all stages done"
        except StopRequested as error:
            state, code, message = "stopped", STOPPED_CODE, str(error)
        except RunFailed as error:
            code, message = error.exit_code, f"{error}{self.journal.full_disk()}"
            self._report(RunFailed(message, window=error.window, log_tail=error.log_tail))
        except Exception as error:  # a full disk, a mistake of ours: the run must end as failed, with nothing left
            say(traceback.format_exc())
            code, message = 1, f"the supervisor failed: {error!r}{self.journal.full_disk()}"
            self._report(RunFailed(message, window=SUPERVISOR_WINDOW, log_tail=traceback.format_exc().splitlines()))
        self._finish(state, code, message)
        return code

    def _bootstrap(self) -> None:
        self._announce("bootstrap", "making the environments")
        patience = Patience(self.plan.bootstrap_timeout_s, tick=self._tick)
        try:
            for spec in self.plan.environments:
                ensure_environment(spec, self.run, patience)
            for model in self.plan.models:
                self._announce("bootstrap", f"downloading {model.name}")
                fetch_model(model, self.plan.environments[0], self.run, patience)
            self._announce("bootstrap", "trying devices and environments")
            smoke_test(self.run, self.plan, event=self._event, tick=self._tick, beat=self._beat)
        except BootstrapError as error:
            raise RunFailed(str(error), window=error.window, log_tail=error.log_tail) from None

    def _finish(self, state: State, code: int, message: str) -> None:
        """End what is left of any window, then say how it ended: event, then status, then (by exiting) the lock."""
        marks = {window_mark(SUPERVISOR_STAGE, SUPERVISOR_WINDOW)}
        marks |= {window_mark(stage, spec.window) for stage, spec in self.plan.processes()}
        left = end_marked(self.run, marks, grace_s=self.plan.stop_grace_s, tick=self._beat)
        if left:
            message += f" (still there after SIGKILL: processes {left})"
        run_dir.remove_transient(self.run)
        say(f"run {self.run.run_id} {state}: {message} (exit code {code})")
        self._event("run_ended", last=True, state=state, exit_code=code, message=message)
        self.state, self.message = state, message
        self._write_status(code)

    def _report(self, error: RunFailed) -> None:
        """The `error` event, and the same for whoever looks at the supervisor's window or log."""
        tail = error.log_tail
        if tail is None:
            tail = run_dir.tail_lines(self.run.log(error.window), LOG_TAIL_LINES)
        tail = list(tail)[-LOG_TAIL_LINES:]
        say(f"--- the last lines of {error.window}:", *tail, "---", f"error: {error}")
        self._event("error", message=str(error), window=error.window, log_tail=tail)

    # --- one stage -----------------------------------------------------------------------------------------------

    def _run_stage(self, stage: StageSpec) -> None:
        started = time.monotonic()
        deadline = started + stage.timeout_s
        self._announce(stage.name, f"{stage.name}: starting")
        self._event("stage_started", stage=stage.name)
        self._check_checkpoint(stage)
        try:
            for spec in stage.engines:
                self._check_port(spec)
            for spec in stage.engines:
                self.engines.append(Engine(self._open(stage, spec), time.monotonic()))
            self._await_engines(stage, deadline)
            self._announce(stage.name, f"{stage.name}: the trainer runs: data and model first, then steps")
            self.trainer = self._open(stage, stage.trainer)
            self._await_trainer(stage, deadline, self.trainer)
        finally:
            self._close_all(stage)
        seconds = round(time.monotonic() - started, 3)
        self._event("stage_ended", stage=stage.name, seconds=seconds)

    def _check_checkpoint(self, stage: StageSpec) -> None:
        if stage.needs_checkpoint is None:
            return
        directory = Path(stage.needs_checkpoint)
        problems = self._apart(lambda: manifest_problems(directory.resolve()))
        if problems:
            listed = "\n".join(problems[:10])
            message = f"stage {stage.name} starts from {directory}, which is no completed checkpoint:\n{listed}"
            raise RunFailed(message, window=SUPERVISOR_WINDOW, log_tail=problems)

    def _check_port(self, spec: ProcessSpec) -> None:
        """A stranger on the engine's port would answer in its place."""
        if spec.ready_url is not None and port_is_taken(spec.ready_url):
            place = urllib.parse.urlsplit(spec.ready_url).netloc
            field = "engine.router_port" if spec.window == "router" else "engine.sglang_port"
            raise RunFailed(
                f"{spec.window} cannot use {place}: another process listens there already."
                f" Choose another {field}, or end that process (`ss -ltnp` shows it).",
                window=SUPERVISOR_WINDOW,
                log_tail=[],
            )

    def _open(self, stage: StageSpec, spec: ProcessSpec) -> OpenWindow:
        say(f"stage={stage.name} window={spec.window}: starting")
        try:
            return open_window(self.run, self.plan, stage.name, spec, may_end=spec is stage.trainer)
        except tmux.TmuxError as error:
            message = f"stage {stage.name}: cannot open a window for {spec.window}: {error}"
            raise RunFailed(message, window=SUPERVISOR_WINDOW) from None

    def _await_engines(self, stage: StageSpec, deadline: float) -> None:
        """Return once every engine answers 200 at its ready URL."""
        while waiting := [engine.name for engine in self.engines if engine.is_starting]:
            self._announce(stage.name, f"{stage.name}: waiting for {', '.join(waiting)}")
            self._pause()
            self._attend(stage)
            self._check_deadline(stage, deadline, waiting[0])

    def _await_trainer(self, stage: StageSpec, deadline: float, trainer: OpenWindow) -> None:
        while not trainer.has_succeeded():
            self._attend(stage)
            self._check_deadline(stage, deadline, trainer.spec.window)
            self._pause()

    def _attend(self, stage: StageSpec) -> None:
        """Look at everything that runs: greet engines that are ready, start those again that died or hang.

        Raises RunFailed for what cannot be mended.
        """
        starting = [engine for engine in self.engines if engine.is_starting]
        ready = [(engine, engine.window) for engine in starting if engine.window.is_serving()]
        self._check_alive(stage)
        for engine, window in ready:
            if engine.window is window:  # not started again meanwhile
                self._greet(stage, engine)
        for engine in self.engines:
            self._check_answers(stage, engine)

    def _greet(self, stage: StageSpec, engine: Engine) -> None:
        engine.serves(hang_timeout_s=self.hang_timeout_s)
        seconds = round(time.monotonic() - engine.opened_at, 3)
        self._event("engine_ready", window=engine.name, url=engine.window.spec.ready_url, seconds=seconds)
        say(f"stage={stage.name} window={engine.name}: ready after {seconds:.1f} s")

    def _check_alive(self, stage: StageSpec) -> None:
        """Start again the engines that ended; where that will not do, raise RunFailed for the first that ended."""
        windows = [engine.window for engine in self.engines] + ([self.trainer] if self.trainer else [])
        if not any(window.has_failed() for window in windows):
            return
        settled_at = time.monotonic() + SETTLE_S
        while time.monotonic() < settled_at:
            self._pause()
        if self.trainer is not None and self.trainer.has_succeeded():
            return
        failed = [window for window in windows if window.has_failed()]
        ended = [engine for engine in self.engines if engine.window in failed]
        only_engines = len(ended) == len(failed)
        if only_engines and len(ended) <= self.restarts_left and all(engine.may_restart() for engine in ended):
            for engine in ended:
                self._restart(stage, engine, engine.window.describe_end())
            return
        raise self._failure(stage, min(failed, key=lambda window: window.ended_at()))

    def _failure(self, stage: StageSpec, window: OpenWindow) -> RunFailed:
        """Why this window's end ends the run: for a trainer the sentence that it ended with, where it has one."""
        end = f"stage {stage.name}: {window.describe_end()}"
        if window.may_end:
            said, event = window.cause()
            end = said if event else f"{end}: {said}" if said else end
        else:
            end += self._budget_spent()
        code = window.failure_code()
        return RunFailed(end, window=window.spec.window, exit_code=code, log_tail=window.last_words())

    def _check_answers(self, stage: StageSpec, engine: Engine) -> None:
        """Has it been starting, or silent, for too long?"""
        url, limit_s, hang_s = engine.window.spec.ready_url, engine.window.spec.ready_timeout_s, self.hang_timeout_s
        advice = ""
        if engine.is_starting and time.monotonic() - engine.opened_at > limit_s:
            problem = f"{engine.name} did not answer 200 at {url} within limits.engine_ready_timeout_s={limit_s:g}"
            advice = ". Its last lines say how far it got; raise the limit if it was only slow. "
            advice = (advice + engine.window.diagnosis()).rstrip()
        elif engine.silent_s > hang_s:
            problem = f"{engine.name} hung: no answer at {url} for limits.engine_hang_timeout_s={hang_s:g}"
        else:
            return
        if not self.restarts_left or not engine.has_served:
            raise RunFailed(f"stage {stage.name}: {problem}{self._budget_spent()}{advice}", window=engine.name)
        self._restart(stage, engine, problem)

    def _budget_spent(self) -> str:
        """What to say of the budget when an engine's end ends the run."""
        allowed = self.plan.engine_restarts_max
        return f" (engine.restarts_max={allowed}, of which {self.restarts_left} are left)" if allowed else ""

    def _restart(self, stage: StageSpec, engine: Engine, reason: str) -> None:
        """The next life of an engine, for which the stage's trainer waits."""
        self.restarts_left -= 1
        left = end_life(self.run, engine, grace_s=self.plan.stop_grace_s, tick=self._tick)
        self._event_of_end(stage, engine.window)
        keep_record(self.run, engine)
        self._event(
            "engine_restarted",
            stage=stage.name,
            window=engine.name,
            reason=reason,
            restarts_left=self.restarts_left,
        )
        say(f"stage={stage.name} window={engine.name}: {reason}; starting it again, {self.restarts_left} more left")
        if left:
            message = f"stage {stage.name}: {reason}, and could not be ended: processes {left} survived SIGKILL"
            raise RunFailed(message, window=engine.name)
        self._check_port(engine.window.spec)
        engine.reopened(self._open(stage, engine.window.spec))

    def _check_deadline(self, stage: StageSpec, deadline: float, window: str) -> None:
        if time.monotonic() > deadline:
            raise RunFailed(
                f"stage {stage.name} was not done within limits.stage_timeout_s={stage.timeout_s:g}. Raise it, or see"
                " in the log what took so long.",
                window=window,
            )

    def _close_all(self, stage: StageSpec) -> None:
        """End the stage's windows and all that came from them; the order of their ends is in the events."""
        self._announce(stage.name, f"{stage.name}: ending its processes", check=False)
        for engine in self.engines:
            engine.rests()
        windows = [engine.window for engine in self.engines] + ([self.trainer] if self.trainer else [])
        left = close_windows(self.run, windows, grace_s=self.plan.stop_grace_s, tick=self._beat)
        for window in sorted(windows, key=lambda window: window.ended_at()):
            self._event_of_end(stage, window)
        if left:
            self._event("note", message=f"{stage.name}: still there after SIGKILL: {left}")
        self.engines, self.trainer = [], None

    def _event_of_end(self, stage: StageSpec, window: OpenWindow) -> None:
        record = window.record()
        self._event(
            "process_ended",
            stage=stage.name,
            window=window.spec.window,
            exit_code=record.exit_code if record else None,
            signal=record.signal if record else None,
        )

    # --- time, status, signals -----------------------------------------------------------------------------------

    def _on_signal(self, signum: int, _frame: Any) -> None:
        self.stop_signal = self.stop_signal or signum

    def _tick(self) -> None:
        """Called in every wait: keeps the heartbeat and notices a stop."""
        if self.stop_signal is not None:
            raise StopRequested(f"stopped by {signal.Signals(self.stop_signal).name}")
        if self.journal.is_gone():
            raise StopRequested(f"{self.run.path} was removed")
        self._beat()

    def _pause(self) -> None:
        self._tick()
        time.sleep(POLL_S)
        self._tick()

    def _apart(self, work: Callable[[], Any]) -> Any:
        """Run something slow in a thread, ticking meanwhile."""
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
        thread.start()
        while thread.is_alive():
            self._tick()
            thread.join(POLL_S)
        if not results:
            raise RunFailed("reading a checkpoint failed; the supervisor's log has the error", window=SUPERVISOR_WINDOW)
        return results[0]

    def _announce(self, stage: StageName, message: str, *, check: bool = True) -> None:
        if (stage, message) != (self.stage, self.message):
            self.stage, self.message = stage, message
            self.beat_at = 0.0
        if check:
            self._tick()
        else:
            self._beat()

    def _beat(self) -> None:
        if time.monotonic() - self.beat_at >= run_dir.HEARTBEAT_S / 2:
            self.beat_at = time.monotonic()
            self._write_status(None)
            self._look_around()

    def _look_around(self) -> None:
        """Remember whose the processes are, and tell of those that other machines can reach."""
        seen = scan()
        for window in [engine.window for engine in self.engines] + ([self.trainer] if self.trainer else []):
            window.look_around(seen)
        for found in listeners(marked_processes(self.run, seen=seen), beyond_loopback=True):
            if (found.address, found.port) not in self.told:
                self.told.add((found.address, found.port))
                self._event(
                    "note", message=f"{_command(found.pid)} listens on {found.address} port {found.port}: {OPEN}"
                )

    def _event(self, kind: str, *, last: bool = False, **fields: Any) -> None:
        self.journal.event(kind, last=last, **fields)

    def _write_status(self, exit_code: int | None) -> None:
        self.journal.status(
            Status(
                run_id=self.plan.run_id,
                experiment_name=self.plan.experiment_name,
                state=self.state,
                stage=self.stage,
                message=self.message,
                started_at=self.started_at,
                updated_at=time.time(),
                exit_code=exit_code,
            )
        )


def _command(pid: int) -> str:
    """A process for people: `python (pid 4711)`; the rest of its command line may be secret."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        name = "a process that has ended"
    return f"{name} (pid {pid})"


def main() -> None:
    run = RunDir(Path(sys.argv[1]))
    plan = run_dir.read_plan(run)
    assert plan is not None, f"{run.plan} is missing: the launcher writes it first"
    lock = run_dir.hold_lock(run)
    if lock is None:
        sys.exit(f"error: run {run.run_id} has a supervisor already")
    with lock:
        code = Supervisor(run, plan, Journal(run, lock)).main()
    sys.exit(code)


if __name__ == "__main__":
    main()
