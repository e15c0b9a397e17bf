"""End a run on this host, whatever state it is in.

    python3 -m rollouts.worker.stop <run_path> [--now]

Where steps are trained, and without --now: asks for a checkpoint after the step under way, and waits for it. Then asks
the supervisor, which ends everything itself; where it cannot, ends everything here. A run that is yet to be launched is
not launched any more. Prints one JSON line {"state", "exit_code", "checkpoint"}, the last being the newest that is
complete, if there is one; a run that had ended stays as it is. The run is known by its processes: it is ended where its
directory was removed, too, so `deploy` sends this program along (remote/host/sending.py). Standard library only.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.plain_files import read_plain
from rollouts.run_dir import FINAL_STATES, Observed, ProcessRecord, RunDir, Status, observe
from rollouts.slurm.job_states import cancel
from rollouts.slurm.settle import settle
from rollouts.worker import tmux
from rollouts.worker.on_end import room_s
from rollouts.worker.processes import (
    POLL_S,
    STOPPED_CODE,
    SUPERVISOR_MARGIN_S,
    SUPERVISOR_WINDOW,
    end_marked,
    marked_processes,
    send_signal,
)

GRACE_S = 5.0  # where no plan tells
CHECKPOINT_WAIT_S = 600.0  # for the step under way and its checkpoint
ASK_S = 0.5  # between two questions to Slurm, of a job that is being ended
JOB_LEAVES_S = 15.0  # for the job of a run that has ended
JOB_END_S = 120.0  # for Slurm to end a job; its KillWait is 30 s
RECORD_WAIT_S = 5.0  # from the session's start to the supervisor's process record


def stop(run: RunDir, *, now: bool = False) -> dict[str, Any]:
    """Have nothing of the run left on return. Returns {"state", "exit_code", "checkpoint"} as they are then."""
    grace_s = _grace_s(run)
    if run.slurm_job.exists():
        return _stop_job(run, now=now, grace_s=grace_s)
    seen = observe(run)
    was_live = seen.live
    if (was_live or seen.state == "silent") and (host := run_dir.other_host(run)) is not None:
        gone = "" if was_live else f" If that machine is no more, remove {run.path}."
        sys.exit(
            f"error: run {run.run_id} runs on {host}, whose files this host shares; this is {os.uname().nodename}."
            f" From here its processes cannot be ended: `deploy stop {run.run_id} --remote {host}`.{gone}"
        )
    if was_live:
        _note_request(run, now=now)
    if was_live and not now:
        _await_checkpoint(run)
    if was_live:
        _ask_supervisor(run, within_s=2 * grace_s + SUPERVISOR_MARGIN_S + room_s(run))
    _end_session(run)
    left = end_marked(run, None, grace_s=grace_s)
    run_dir.remove_transient(run)
    seen = observe(run)
    if was_live and seen.state not in ("done", "failed", "stopped"):
        _write_stopped(run, seen.status)
        seen = observe(run)
    if not seen.live and seen.status is None:  # its directory was removed
        seen = dataclasses.replace(seen, state="stopped", exit_code=STOPPED_CODE)
    if left:
        sys.exit(f"error: still there after SIGKILL, the kernel holds them: processes {left}")
    return _answer(run, seen)


def _answer(run: RunDir, seen: Observed) -> dict[str, Any]:
    checkpoint = _newest_checkpoint(run)
    return {"state": seen.state, "exit_code": seen.exit_code} | (
        {"checkpoint": checkpoint} if checkpoint else {}
    )


def _stop_job(run: RunDir, *, now: bool, grace_s: float) -> dict[str, Any]:
    """End a run that Slurm started, or is to start."""
    job = run_dir.read_slurm_job(run)
    assert job is not None
    settle(run, at_once=True)
    if not now and run.heeds_stop.exists():
        _await_checkpoint(run)
        _ended(run, JOB_LEAVES_S)
    if observe(run).state not in ("queued", *FINAL_STATES):
        cancel(job.job_id, job.programs, signal="TERM")
        _ended(run, 2 * grace_s + SUPERVISOR_MARGIN_S + room_s(run))
    pending = observe(run).state == "queued"
    problem = ""
    if pending or not _ended(run, JOB_LEAVES_S):
        problem = cancel(job.job_id, job.programs)
    seen = observe(run) if _ended(run, JOB_END_S) else None
    if seen is None or seen.state not in FINAL_STATES:
        sys.exit(f"error: Slurm's job {job.job_id} did not end: {problem or 'it is still there'}")
    return _answer(run, seen)


def _ended(run: RunDir, within_s: float) -> bool:
    """Wait for the end of the run's job; return whether it came."""
    deadline = time.monotonic() + within_s
    while not (over := settle(run, at_once=True)) and time.monotonic() < deadline:
        time.sleep(ASK_S)
    return over


def _note_request(run: RunDir, *, now: bool) -> None:
    """Leave word that somebody wanted the end: a machine that is taken away may end its processes in the same way."""
    with contextlib.suppress(OSError):  # a full disk keeps no run from ending
        run_dir.append_event(run, "stop_asked", at_once=now)


def _await_checkpoint(run: RunDir) -> None:
    """Ask the steps that are trained now for a checkpoint and their end; return once they ended, or after a while."""
    deadline = time.monotonic() + CHECKPOINT_WAIT_S
    if run.heeds_stop.exists():
        run.stop_asked.touch(mode=0o600)
    while run.heeds_stop.exists() and observe(run).live and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _newest_checkpoint(run: RunDir) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        paths = [
            row.get("path")
            for row in run_dir.iter_jsonl(run.events)
            if row.get("kind") == "checkpoint"
        ]
        return str(paths[-1]) if paths else None
    return None


def _grace_s(run: RunDir) -> float:
    """Of its plan, whichever version of this program wrote that."""
    try:
        return float(json.loads(read_plain(run.plan))["stop_grace_s"])
    except (OSError, ValueError, TypeError, KeyError):
        return GRACE_S


def _ask_supervisor(run: RunDir, *, within_s: float) -> None:
    """SIGTERM to the supervisor, then wait for its end, and that of its windows, for so long at most."""
    deadline = time.monotonic() + within_s
    record_deadline = time.monotonic() + RECORD_WAIT_S
    asked = False
    while time.monotonic() < deadline and (
        run_dir.is_live(run) or not asked or marked_processes(run)
    ):
        pid = None if asked else _supervisor_pid(run)
        if pid is not None:
            send_signal(pid, signal.SIGTERM)
            asked = True
        elif not asked and (time.monotonic() > record_deadline or not observe(run).live):
            return
        time.sleep(POLL_S)


def _end_session(run: RunDir) -> None:
    """End the run's tmux session; not one of that name that is another home's run's, or a person's own."""
    if shutil.which("tmux") is None:
        return
    panes = set(tmux.pane_processes(run.run_id))
    if not panes or panes & set(marked_processes(run)):
        tmux.kill_session(run.run_id)


def _supervisor_pid(run: RunDir) -> int | None:
    """Return the recorded supervisor, if it is still that process."""
    try:
        record = ProcessRecord(**json.loads(read_plain(run.process(SUPERVISOR_WINDOW))))
    except (OSError, ValueError, TypeError):
        return None
    return record.pid if record.pid in marked_processes(run) else None


def _write_stopped(run: RunDir, status: Status | None) -> None:
    if status is None:
        return
    message = "stopped; the supervisor had to be killed"
    run_dir.append_event(run, "run_ended", state="stopped", exit_code=STOPPED_CODE, message=message)
    changes: dict[str, Any] = {"state": "stopped", "exit_code": STOPPED_CODE, "message": message}
    run_dir.write_json_atomic(
        run.status, dataclasses.replace(status, updated_at=time.time(), **changes)
    )


def main() -> None:
    run, now = RunDir(Path(sys.argv[1])), "--now" in sys.argv[2:]
    if run.path.is_dir() and not run.status.exists() and not marked_processes(run):
        run.stop_asked.touch(mode=0o600)  # its deploy is sending it: `launch` looks there
        print(json.dumps({"state": "not launched", "exit_code": None}), flush=True)
        return
    if not run.status.exists() and not marked_processes(run):
        sys.exit(f"error: {run.path}: no run was launched there. `deploy ls` lists the runs.")
    print(json.dumps(stop(run, now=now)), flush=True)


if __name__ == "__main__":
    main()
