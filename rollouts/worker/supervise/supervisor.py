"""The run's supervisor: its turn, environments, then each stage's engines and trainer, then the end of every process.

    python3 -m rollouts.worker.supervise.supervisor <run_path>

It decides nothing: plan.json says what runs, and how often an engine that died or hangs is started again. It holds
supervisor.lock for as long as it lives, and every window ends its process when that lock falls free. The exit code is
the run's: 0 only if every trainer ended with 0; else that of the process that failed first; STOPPED_CODE after a stop.
Standard library only.
"""

import json
import signal
import sys
import traceback
from pathlib import Path

from rollouts import run_dir
from rollouts.plain_files import read_plain
from rollouts.run_dir import LaunchPlan, RunDir, StageSpec, State
from rollouts.worker.environments.hub_model import fetch_model
from rollouts.worker.environments.installer import BootstrapDeadline, BootstrapError
from rollouts.worker.environments.virtual_environment import ensure_environment
from rollouts.worker.on_end import on_end_command
from rollouts.worker.processes import (
    STOPPED_CODE,
    SUPERVISOR_STAGE,
    SUPERVISOR_WINDOW,
    end_marked,
    window_mark,
)
from rollouts.worker.supervise.at_end import run_at_end
from rollouts.worker.supervise.begun import stages_left, under_way
from rollouts.worker.supervise.console import say
from rollouts.worker.supervise.engine_watch import RestartBudget
from rollouts.worker.supervise.failures import HostLost, PeerFailed, RunFailed, StopRequested
from rollouts.worker.supervise.fewer_hosts import on_hosts
from rollouts.worker.supervise.journal import Journal
from rollouts.worker.supervise.observer import Observer
from rollouts.worker.supervise.on_warning import MARK as ON_WARNING_MARK
from rollouts.worker.supervise.peers import GroupPeers, NoPeers, Peers
from rollouts.worker.supervise.pulse import Pulse
from rollouts.worker.supervise.smoke_windows import smoke_test, try_network
from rollouts.worker.supervise.stage_restarts import Restarts
from rollouts.worker.supervise.stage_run import StageRun
from rollouts.worker.supervise.tracker_windows import TrackerWindows
from rollouts.worker.supervise.turn import await_turn
from rollouts.worker.tickets import OwnTicket, draw

LOG_TAIL_LINES = 50


class Supervisor:
    """One run from bootstrap to its final status."""

    def __init__(
        self,
        run: RunDir,
        plan: LaunchPlan,
        journal: Journal,
        peers: Peers,
        ticket: OwnTicket | None,
    ) -> None:
        self._run, self._plan, self._journal, self._peers, self._ticket = (
            run,
            plan,
            journal,
            peers,
            ticket,
        )
        self._pulse = Pulse(run, plan, journal, peers)
        leads = plan.group is None or plan.group.leads
        self._trackers = TrackerWindows(self._pulse)
        self._observer = Observer(run, journal, judges=leads, also=self._trackers.check)

    def main(self) -> int:
        """Carry out the plan and return the run's exit code; the final status is written by then."""
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(signum, self._pulse.request_stop)
        state: State = "failed"
        own = True  # not another host's end
        try:
            self._wait_for_turn()
            mode = json.loads(read_plain(self._run.config))["output"]["mode"]
            self._journal.event("run_started", mode=mode)
            self._pulse.meet("bootstrap", "all start, or none")
            self._bootstrap()
            budget, restarts = RestartBudget(self._plan.engine_restarts_max), Restarts(self._pulse)
            begun = under_way(self._run, self._plan)
            for stage in stages_left(self._run, self._plan):
                if begun is not None and stage.name == begun.name:
                    restarts.take_up(stage)
                self._run_stage(stage, budget, restarts)
                restarts.note_left()
            self._meet_at_the_end(restarts)
            state, code, message = "done", 0, "all stages done"
        except StopRequested as error:
            state, code, message = "stopped", STOPPED_CODE, str(error)
        except RunFailed as error:
            own = not isinstance(error, PeerFailed)
            code, message = error.exit_code, f"{error}{self._journal.full_disk()}"
            message += self._peers.others_reasons() if own else ""
            self._report(RunFailed(message, window=error.window, log_tail=error.log_tail))
        except Exception as error:
            # a full disk, a mistake of ours: the run must end as failed, with nothing left
            say(traceback.format_exc())
            code, message = 1, f"the supervisor failed: {error!r}{self._journal.full_disk()}"
            self._report(
                RunFailed(
                    message, window=SUPERVISOR_WINDOW, log_tail=traceback.format_exc().splitlines()
                )
            )
        self._peers.end(state, message, code, own=own)
        self._finish(state, code, message)
        return code

    def _wait_for_turn(self) -> None:
        """Stand in the host's queue, where the plan says so; no time limit counts that. Raises StopRequested."""
        if self._ticket is not None:
            self._plan = self._pulse.plan = await_turn(self._pulse, self._ticket)

    def _run_stage(self, stage: StageSpec, budget: RestartBudget, restarts: Restarts) -> None:
        """Run the stage to its end, again from its last checkpoint where that may help. Raises as `StageRun.main`."""
        while True:
            stage = self._on_hosts_that_are_left(stage)
            self._observer.begin(stage)
            try:
                return StageRun(self._pulse, stage, budget).main()
            except RunFailed as error:
                restarts.prepare(stage, restarts.settle(error))
            finally:
                self._observer.end()

    def _on_hosts_that_are_left(self, stage: StageSpec) -> StageSpec:
        """Return the stage as the hosts run it that are in the job still; plan.json has it by then."""
        plan = on_hosts(self._plan, self._peers.hosts)
        if plan != self._plan:
            self._plan = self._pulse.plan = plan
            run_dir.write_json_atomic(self._run.plan, plan.to_json())
        return next(one for one in plan.stages if one.name == stage.name)

    def _meet_at_the_end(self, restarts: Restarts) -> None:
        """Return once all hosts have done their part, as one has that is gone by now. Raises as `tick`."""
        try:
            self._pulse.meet(self._plan.stages[-1].name, "all have done their part")
        except HostLost:
            restarts.note_left()

    def _bootstrap(self) -> None:
        """Make the environments, download models, and try the devices. Raises RunFailed."""
        self._announce("making the environments")
        deadline = BootstrapDeadline(self._plan.bootstrap_timeout_s, tick=self._pulse.tick)
        try:
            for spec in self._plan.environments:
                ensure_environment(spec, self._run, deadline)
            for model in self._plan.models:
                self._announce(f"downloading {model.name}")
                fetch_model(model, self._plan.environments[0], self._run, deadline)
            self._announce("trying devices and environments")
            pulse = self._pulse
            smoke_test(
                self._run, self._plan, event=self._journal.event, tick=pulse.tick, beat=pulse.beat
            )
            pulse.meet("bootstrap", "environments are made")
            if self._plan.network is not None:
                self._announce("trying the network between the hosts")
                try_network(
                    self._run,
                    self._plan,
                    event=self._journal.event,
                    tick=pulse.tick,
                    beat=pulse.beat,
                )
            self._announce("starting the trackers")
            self._trackers.start()
        except BootstrapError as error:
            raise RunFailed(str(error), window=error.window, log_tail=error.log_tail) from None

    def _announce(self, message: str) -> None:
        self._pulse.announce("bootstrap", message)

    def _finish(self, state: State, code: int, message: str) -> None:
        """End what is left of any window, then say how it ended: event, then status, then (by exiting) the lock."""
        self._observer.close(self._pulse.beat)
        self._trackers.close(state, self._pulse.beat)
        marks = {window_mark(SUPERVISOR_STAGE, SUPERVISOR_WINDOW), ON_WARNING_MARK}
        marks |= {window_mark(stage, spec.window) for stage, spec in self._plan.processes()}
        left = end_marked(self._run, marks, grace_s=self._plan.stop_grace_s, tick=self._pulse.beat)
        if left:
            message += f" (still there after SIGKILL: processes {left})"
        self._run_on_end(state, code)
        run_dir.remove_transient(self._run)
        say(f"run {self._run.run_id} {state}: {message} (exit code {code})")
        self._journal.event("run_ended", last=True, state=state, exit_code=code, message=message)
        self._pulse.finish(state, message, code)

    def _run_on_end(self, state: State, code: int) -> None:
        """Run output.on_end, where there is one, on the first host. What becomes of it is an event, and no more."""
        another_does = self._plan.group is not None and not self._plan.group.leads
        command = None if another_does or self._journal.is_gone() else on_end_command(self._run)
        if command is None:
            return
        say(f"output.on_end: {command}")
        try:
            fields = run_at_end(self._run, command, state, code, beat=self._pulse.beat)
        except Exception as error:  # a mistake of ours, or no room: the run has ended as it has
            say(traceback.format_exc())
            fields = {
                "exit_code": None,
                "seconds": 0.0,
                "message": f"output.on_end could not be run: {error!r}",
            }
        self._journal.event("on_end", **fields)

    def _report(self, error: RunFailed) -> None:
        """Write the `error` event, and the same into the supervisor's window and log."""
        tail = error.log_tail
        if tail is None:
            tail = run_dir.tail_lines(self._run.log(error.window), LOG_TAIL_LINES)
        tail = list(tail)[-LOG_TAIL_LINES:]
        say(f"--- the last lines of {error.window}:", *tail, "---", f"error: {error}")
        self._journal.event("error", message=str(error), window=error.window, log_tail=tail)


def main() -> None:
    run = RunDir(Path(sys.argv[1]))
    plan = run_dir.read_plan(run)
    assert plan is not None, f"{run.plan} is missing: the launcher writes it first"
    # Before the lock, for which the launcher waits: who launches next draws a higher number
    ticket = draw(Path(plan.home), run.run_id) if plan.queue is not None else None
    lock = run_dir.hold_lock(run)
    if lock is None:
        sys.exit(f"error: run {run.run_id} has a supervisor already")
    with lock:
        code = Supervisor(run, plan, Journal(run, lock), _peers(run, plan), ticket).main()
    sys.exit(code)


def _peers(run: RunDir, plan: LaunchPlan) -> Peers:
    if plan.group is None:
        return NoPeers()
    return GroupPeers(plan.group, json.loads(read_plain(run.secrets))["group_key"].encode())


if __name__ == "__main__":
    main()
