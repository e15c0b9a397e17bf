"""What Slurm says of a job, written into the run's files. scontrol is stood in for: a real one cannot be made to say
TIMEOUT or OUT_OF_MEMORY within seconds; tests/remote/test_slurm.py has the real one."""

import dataclasses
import time
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.run_dir import RunDir, SlurmJob, SlurmSpec, State, Status, observe, read_jsonl
from rollouts.slurm.settle import settle
from rollouts.worker.slurm_node import NodeError, prepare, put_exits_aside
from tests.remote.test_gone_runs import launch_plan


def job_of(tmp_path: Path, state: State, message: str, said: str) -> RunDir:
    """A run with a job, of which scontrol prints `said`; "" has it fail."""
    run = RunDir(tmp_path / "home" / "runs" / "r1")
    run.path.mkdir(parents=True)
    status = Status(
        run_id="r1",
        experiment_name="example",
        state=state,
        stage=None,
        message=message,
        started_at=time.time(),
        updated_at=time.time(),
        exit_code=None if state in ("queued", "running") else 143,
    )
    run_dir.write_json_atomic(run.status, status)
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\n{f'echo {said!r}' if said else 'exit 1'}\n")
    program.chmod(0o755)
    job = SlurmJob(job_id="7", programs=str(tmp_path), state="SUBMITTED", reason="")
    run_dir.write_json_atomic(run.slurm_job, job)
    return run


@pytest.mark.parametrize(
    ("state", "message", "said", "then"),
    [
        (
            "queued",
            "Slurm gets its job",
            "JobState=PENDING Reason=Resources StartTime=2026-12-01T04:10:00",
            "queued: Slurm's job 7 is pending: Resources; it may start at 2026-12-01T04:10:00",
        ),
        (
            "running",
            "sft: the trainer runs",
            "JobState=OUT_OF_MEMORY Reason=OutOfMemory ExitCode=0:125",
            "failed: Slurm's job 7 ended as OUT_OF_MEMORY: it used more memory than it had asked for (--mem),"
            " reason OutOfMemory",
        ),
        (
            "running",
            "sft: the trainer runs",
            "JobState=PENDING Reason=BeginTime",
            "queued: Slurm's job 7 is pending: BeginTime",
        ),
        (
            "stopped",
            "stopped by SIGTERM",
            "JobState=TIMEOUT Reason=TimeLimit",
            "stopped: stopped by SIGTERM (Slurm's job 7 ended as TIMEOUT: the job's time limit was over,"
            " reason TimeLimit; `deploy resume r1 --slurm FILE` goes on from its last checkpoint)",
        ),
        (
            "running",
            "sft: the trainer runs",
            "JobState=PREEMPTED Reason=None",
            "stopped: Slurm's job 7 ended as PREEMPTED: another job took its nodes;"
            " `deploy resume r1 --slurm FILE` goes on from its last checkpoint",
        ),
        (
            "stopped",
            "stopped by SIGTERM",
            "JobState=NODE_FAIL Reason=None",
            "failed: stopped by SIGTERM (Slurm's job 7 ended as NODE_FAIL: a node failed;"
            " `deploy resume r1 --slurm FILE` goes on from its last checkpoint)",
        ),
        (
            "queued",
            "Slurm gets its job",
            "JobState=FAILED Reason=NonZeroExitCode ExitCode=0:53",
            "failed: Slurm's job 7 ended as FAILED: exit code 0:53, reason NonZeroExitCode. Its supervisor did not"
            " start: its node does not see RUN, which the login host and the job's nodes have to share. On the login"
            " host set ROLLOUTS_HOME to a directory that they share (in ~/.bashrc), and deploy again.",
        ),
        (
            "queued",
            "Slurm gets its job",
            "JobState=FAILED Reason=NonZeroExitCode ExitCode=127:0",
            "failed: Slurm's job 7 ended as FAILED: exit code 127:0, reason NonZeroExitCode. Its supervisor did not"
            " start: it wrote nothing into RUN",
        ),
        ("queued", "as it was", "", "queued: as it was"),  # the controller does not answer
    ],
)
def test_slurms_word_is_written_down(
    tmp_path: Path, state: State, message: str, said: str, then: str
) -> None:
    """Goal: the run's state and message are Slurm's where no supervisor says more; an event each, once; nothing where
    Slurm does not answer."""
    run = job_of(tmp_path, state, message, said)
    over = settle(run, at_once=True)
    settle(run, at_once=True)
    seen = observe(run)
    assert seen.status is not None
    assert f"{seen.state}: {seen.status.message}" == then.replace("RUN", str(run.path))
    events = [row["kind"] for row in read_jsonl(run.events)]
    assert events.count("slurm_job") == (1 if said else 0)
    assert over == (seen.state in ("failed", "stopped"))
    assert seen.live == (seen.state == "queued")


def test_a_job_that_slurm_starts_again_is_refused(tmp_path: Path) -> None:
    """Goal: a run is not begun twice without --requeue, with it not without its secrets, nor once it is done; and its
    job's log says how to go on."""
    run = job_of(tmp_path, "running", "", "")
    run.lock.touch()
    with pytest.raises(NodeError, match="and this is 8: it ends"):
        prepare(run, {"SLURM_JOB_ID": "8"})
    plan = launch_plan(tmp_path / "home", "r1")
    for requeue, message in (
        (False, r"`deploy resume r1` goes on from its last checkpoint; with --requeue"),
        (True, r"its secrets are gone: `deploy resume r1` goes on"),
    ):
        slurm = SlurmSpec(script="", gpus=0, ports=[], requeue=requeue)
        run.submitted_plan.unlink(missing_ok=True)
        run_dir.write_json_atomic(run.plan, dataclasses.replace(plan, slurm=slurm).to_json())
        with pytest.raises(NodeError, match=message):
            prepare(run, {"SLURM_JOB_ID": "7"})


def test_exit_records_of_an_earlier_start_are_put_aside(tmp_path: Path) -> None:
    """Goal: what ended before the job was started again is no end of this start; a stage that came to its end keeps its
    record. Red with all of them left: the smoke test passed before it began."""
    run = job_of(tmp_path, "running", "", "")
    run_dir.append_event(run, "stage_ended", stage="sft", seconds=1.0)
    for name in ("sft-trainer", "rl-trainer", "rl-trainer.life-1", "bootstrap-smoke"):
        run_dir.write_json_atomic(run.path / "exit" / f"{name}.json", {})
    put_exits_aside(run)
    names = sorted(file.name for file in (run.path / "exit").iterdir())
    assert names == [
        "bootstrap-smoke.life-1.json",
        "rl-trainer.life-1.json",
        "rl-trainer.life-2.json",
        "sft-trainer.json",
    ]
