"""The supervisor's heartbeat: the run's status, stop requests, and every wait. Standard library only."""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.run_dir import LaunchPlan, RunDir, StageName, State, Status
from rollouts.worker.processes import SUPERVISOR_WINDOW, listeners, marked_processes, scan
from rollouts.worker.supervise.failures import RunFailed, StopRequested
from rollouts.worker.supervise.journal import Journal
from rollouts.worker.supervise.open_window import OpenWindow
from rollouts.worker.supervise.peers import Peers

POLL_S = 0.1
OPEN = "other machines reach it. What belongs to the run alone should listen on 127.0.0.1."


class Pulse:
    """Keeps status.json fresh in every wait, and raises StopRequested once the run is asked to end."""

    def __init__(self, run: RunDir, plan: LaunchPlan, journal: Journal, peers: Peers) -> None:
        self.windows: Callable[[], Sequence[OpenWindow]] = (
            tuple  # those that run now, looked at in each beat
        )
        self.run, self.plan, self.journal, self.peers = run, plan, journal, peers
        self._reported: set[tuple[str, int]] = set()  # listeners that an event named
        self._stop_signal: int | None = None
        launched = run_dir.read_status(run)
        self._started_at = launched.started_at if launched else time.time()
        self.state: State = "running"  # or queued
        self._stage: StageName | None = None
        self._message = ""
        self._beat_at = 0.0  # monotonic, of the last status written

    def request_stop(self, signum: int, _frame: Any = None) -> None:
        """Signal handler: let the next `tick` raise StopRequested. The first signal is the one that is named."""
        self._stop_signal = self._stop_signal or signum

    def tick(self) -> None:
        """Keep the heartbeat. Raises StopRequested after a signal, or where the run's directory was removed; on several
        hosts also what `Peers.check` raises."""
        if self._stop_signal is not None:
            raise StopRequested(f"stopped by {signal.Signals(self._stop_signal).name}")
        if self.journal.is_gone():
            raise StopRequested(f"{self.run.path} was removed")
        self.peers.check()
        self.beat()

    def pause(self) -> None:
        """Wait for one short moment. Raises as `tick`."""
        self.tick()
        time.sleep(POLL_S)
        self.tick()

    def meet(
        self, stage: StageName, where: str, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until all hosts of the run have come here, and call `meanwhile` again and again. Raises as `tick`, and
        what that raises."""

        def pause() -> None:
            self.pause()
            meanwhile()

        if self.plan.group is not None:
            self.announce(stage, f"waiting for the other hosts: {where}")
            self.peers.meet(pause)

    def run_in_thread(self, work: Callable[[], Any]) -> Any:
        """Run something slow in a thread and return its result, ticking meanwhile. Raises RunFailed where it raised."""
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
        thread.start()
        while thread.is_alive():
            self.tick()
            thread.join(POLL_S)
        if not results:
            raise RunFailed(
                "reading a checkpoint failed; the supervisor's log has the error",
                window=SUPERVISOR_WINDOW,
            )
        return results[0]

    def announce(self, stage: StageName | None, message: str) -> None:
        """Set the status's stage and message, and write them at once if they changed. Raises as `tick`."""
        self.set_message(stage, message)
        self.tick()

    def set_message(self, stage: StageName | None, message: str) -> None:
        """Set the status's stage and message; the next beat writes them if they changed."""
        if (stage, message) != (self._stage, self._message):
            self._stage, self._message = stage, message
            self._beat_at = 0.0

    def beat(self) -> None:
        """Write the status if the last one is old, and look at the run's processes."""
        if time.monotonic() - self._beat_at >= run_dir.HEARTBEAT_S / 2:
            self._beat_at = time.monotonic()
            self._write_status(self.state, None)
            if self.state != "queued":  # a run that waits has no processes but this one
                self._look_around()

    def finish(self, state: State, message: str, exit_code: int) -> None:
        """Write the final status."""
        self._message = message
        self._write_status(state, exit_code)

    def _look_around(self) -> None:
        """Remember which processes descend from each window, and report those that other machines can reach."""
        seen = scan()
        group = self.plan.group  # what is for the other hosts listens at this one's private address
        own_address = group.hosts[group.rank].address if group is not None else None
        for window in self.windows():
            window.look_around(seen)
        for found in listeners(marked_processes(self.run, seen=seen), beyond_loopback=True):
            if found.address != own_address and (found.address, found.port) not in self._reported:
                self._reported.add((found.address, found.port))
                message = f"{_process_name(found.pid)} listens on {found.address} port {found.port}: {OPEN}"
                self.journal.event("note", message=message)

    def _write_status(self, state: State, exit_code: int | None) -> None:
        self.journal.status(
            Status(
                run_id=self.plan.run_id,
                experiment_name=self.plan.experiment_name,
                state=state,
                stage=self._stage,
                message=self._message,
                started_at=self._started_at,
                updated_at=time.time(),
                exit_code=exit_code,
            )
        )


def _process_name(pid: int) -> str:
    """Return a process for people: `python (pid 4711)`; the rest of its command line may be secret."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        name = "a process that has ended"
    return f"{name} (pid {pid})"
