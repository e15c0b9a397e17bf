"""Hand a run that is written down to Slurm, on the login host. Standard library only."""

import os
import shutil
import subprocess

from rollouts import run_dir
from rollouts.run_dir import LaunchPlan, RunDir, SlurmJob

SBATCH_S = 60.0


class SubmitError(Exception):
    """Slurm did not take the job. The message is for the user."""


def submit(run: RunDir, plan: LaunchPlan) -> str:
    """Submit the run's job and write down which it is. Returns its id. Raises SubmitError, or OSError."""
    assert plan.slurm is not None
    program = shutil.which("sbatch")
    if program is None:
        raise SubmitError(f"this host has no sbatch (PATH={os.environ.get('PATH')}).")
    run.log("slurm").parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # Slurm writes there
    try:
        done = subprocess.run(
            [program, "--parsable"],
            input=plan.slurm.script,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SBATCH_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SubmitError(f"sbatch did not answer within {SBATCH_S:g} s.") from None
    job_id = done.stdout.strip().partition(";")[0]
    if done.returncode != 0 or not job_id.isdigit():
        raise SubmitError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
    job = SlurmJob(job_id=job_id, programs=os.path.dirname(program), state="SUBMITTED", reason="")
    run_dir.write_json_atomic(run.slurm_job, job)
    return job_id
