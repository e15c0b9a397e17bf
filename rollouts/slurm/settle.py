"""What Slurm says of a run's job, written into the run's own files: so the run is followed as any other.

A job that is pending has no supervisor yet, and one that Slurm ended may have none any more: whoever looks at the run
on the login host asks Slurm and writes the answer down. While a supervisor is heard of, nobody asks.
"""

import dataclasses
import time
from typing import Any

from rollouts import run_dir
from rollouts.run_dir import FINAL_STATES, RunDir, SlurmJob, Status
from rollouts.slurm.job_states import WORDS, SeenJob, ask

PENDING_S, SILENT_S = (
    10.0,
    2.0,
)  # between two questions: of a pending job, of one that is not heard of
HEARD_S = 60.0  # a heartbeat comes every 5 s; a shared disk may show it late
LAST_LINES = 5  # of the job's own output
LOG = "slurm"  # its log, beside those of the windows
STOPPED_CODE, FAILED_CODE = 143, 1
STOPS = ("CANCELLED", "TIMEOUT", "PREEMPTED")  # nothing is wrong with the run
INTERRUPTS = ("TIMEOUT", "PREEMPTED", "NODE_FAIL")  # nobody asked for the end, and it may go on
UNSEEN_CODES = ("0:53",)  # slurmstepd could not open the job's log

_asked: dict[str, float] = {}  # run path -> monotonic


def settle(run: RunDir, *, at_once: bool = False) -> bool:
    """Write down what Slurm says of the run's job, if it is time to ask; return whether all of it is written down.

    True for a run without a job. `at_once`: ask, whenever the last question was. The run is all of it, of whichever
    node's part this is called.
    """
    run = run.first
    try:
        job, status = run_dir.read_slurm_job(run), run_dir.read_status(run)
    except (ValueError, TypeError):
        return True
    if job is None or status is None or job.has_ended or status.state == "done":
        return True
    if _is_heard(run, status):
        return False
    now, pause = time.monotonic(), PENDING_S if status.state == "queued" else SILENT_S
    if not at_once and now - _asked.get(str(run.path), now - pause) < pause:
        return False
    _asked[str(run.path)] = now
    with run_dir.launching(run, wait=at_once) as alone:
        return alone and _ask_and_write(run, job)


def _ask_and_write(run: RunDir, job: SlurmJob) -> bool:
    seen = ask(job.job_id, job.programs)
    status = run_dir.read_status(run)  # it may have ended meanwhile
    return seen is not None and status is not None and _write(run, job, seen, status)


def _is_heard(run: RunDir, status: Status) -> bool:
    """Return whether its supervisor lives, as far as its lock or its heartbeat tell."""
    if status.state in FINAL_STATES or status.state == "queued":
        return False
    return run_dir.is_live(run) or (
        run_dir.is_elsewhere(run) and abs(time.time() - status.updated_at) < HEARD_S
    )


def _write(run: RunDir, job: SlurmJob, seen: SeenJob, status: Status) -> bool:
    changed = (seen.state, seen.reason) != (job.state, job.reason)
    now = dataclasses.replace(job, state=seen.state, reason=seen.reason)
    if changed and (seen.state == run_dir.PENDING or now.has_ended):
        run_dir.append_event(
            run, "slurm_job", job_id=job.job_id, state=seen.state, reason=seen.waits_for
        )
    if seen.state == run_dir.PENDING:
        message = f"Slurm's job {job.job_id} is pending: {seen.waits_for}"
        if (status.state, status.message) != ("queued", message):
            _write_status(run, status, state="queued", message=message, exit_code=None)
    elif now.has_ended:
        for part in (run, *run.nodes_runs()):
            own = status if part == run else run_dir.read_status(part)
            if own is not None:
                _write_end(part, job, seen, own)
    if changed:
        run_dir.write_json_atomic(run.slurm_job, now)
    return now.has_ended


def _write_end(run: RunDir, job: SlurmJob, seen: SeenJob, status: Status) -> None:
    """Write how the run ended where its supervisor could not; else add Slurm's word where it tells more."""
    run_dir.remove_transient(run, job_is_over=True)
    state: run_dir.State = "stopped" if seen.state in STOPS else "failed"
    code = STOPPED_CODE if state == "stopped" else FAILED_CODE
    if status.state in FINAL_STATES:
        if seen.state in WORDS and seen.state not in status.message:
            message = f"{status.message} ({_words(run, job, seen)})"
            if status.state != "stopped":  # it was asked to end, and Slurm says why
                state, code = status.state, status.exit_code or code
            _write_status(run, status, state=state, message=message, exit_code=code)
        return
    message = _words(run, job, seen)
    if status.state == "queued" and seen.state not in WORDS:  # its supervisor never was there
        message += f". Its supervisor did not start: {_why_not_started(run, seen)}"
    run_dir.append_event(run, "run_ended", state=state, exit_code=code, message=message)
    _write_status(run, status, state=state, message=message, exit_code=code)


def _why_not_started(run: RunDir, seen: SeenJob) -> str:
    lines = run_dir.tail_lines(run.first.log(LOG), LAST_LINES)
    if not lines and seen.exit_code in UNSEEN_CODES:
        return f"its node {run_dir.not_seen(run.first)}"
    errors = [line for line in lines if line.startswith("error: ")]  # our own sentences
    said = "; ".join(dict.fromkeys(errors or lines))
    return f"its processes said: {said}" if said else f"it wrote nothing into {run.path}"


def _words(run: RunDir, job: SlurmJob, seen: SeenJob) -> str:
    more = WORDS.get(seen.state) or f"exit code {seen.exit_code or 'not known'}"
    reason = f", reason {seen.reason}" if seen.reason else ""
    hint = ""
    if seen.state in INTERRUPTS:
        hint = f"; `deploy resume {run.run_id} --slurm FILE` goes on from its last checkpoint"
    return f"Slurm's job {job.job_id} ended as {seen.state}: {more}{reason}{hint}"


def _write_status(run: RunDir, status: Status, **changes: Any) -> None:
    run_dir.write_json_atomic(
        run.status, dataclasses.replace(status, updated_at=time.time(), **changes)
    )
