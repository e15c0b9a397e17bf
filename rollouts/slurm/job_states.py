"""What Slurm says of a job. Reading its answer is pure; `ask` runs scontrol, and sacct for a job that it forgot."""

import os
import re
import subprocess
from dataclasses import dataclass

ANSWER_S = 20.0
UNKNOWN = "UNKNOWN"
# What ended a job, for people; Slurm's own word stands before it
WORDS = {
    "TIMEOUT": "the job's time limit was over",
    "PREEMPTED": "another job took its nodes",
    "CANCELLED": "it was cancelled",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "it used more memory than it had asked for (--mem)",
    "BOOT_FAIL": "a node did not start",
    "DEADLINE": "its deadline was over",
    "REVOKED": "another cluster took it",
    UNKNOWN: "Slurm knows of no such job any more",
}


@dataclass(frozen=True)
class SeenJob:
    """A job as Slurm shows it."""

    state: str
    reason: str = ""  # "" for none
    starts_at: str = ""  # as Slurm guesses it; "" where it does not
    exit_code: str = ""

    @property
    def waits_for(self) -> str:
        """Say in Slurm's words why it is pending."""
        start = f"; it may start at {self.starts_at}" if self.starts_at else ""
        return f"{self.reason or 'no reason is given'}{start}"


def read_job(text: str) -> SeenJob | None:
    """Return the job of `scontrol --oneliner show job`; None for text that is none."""
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", text))
    state = fields.get("JobState", "")
    if not state:
        return None
    reason = fields.get("Reason", "")
    starts_at = fields.get("StartTime", "")
    return SeenJob(
        state=state,
        reason="" if reason in ("None", "(null)") else reason,
        starts_at=starts_at if state == "PENDING" and starts_at[:1].isdigit() else "",
        exit_code=fields.get("ExitCode", ""),
    )


def read_accounting(text: str) -> SeenJob | None:
    """Return the job of `sacct -n -P -X -o State,ExitCode`; None where it has none."""
    state, _, code = text.strip().partition("\n")[0].partition("|")
    word = state.split(" ")[0]  # "CANCELLED by 1000"
    return SeenJob(state=word, exit_code=code) if word else None


def ask(job_id: str, programs: str) -> SeenJob | None:
    """Return what Slurm says of the job now; None where it does not answer. `programs`: the directory of scontrol."""
    done = _run([f"{programs}/scontrol", "--oneliner", "show", "job", job_id])
    if done is None:
        return None
    if done.returncode == 0:
        return read_job(done.stdout)
    if "invalid job id" not in done.stderr.lower():
        return None
    told = _run([f"{programs}/sacct", "-n", "-P", "-X", "-o", "State,ExitCode", "-j", job_id])
    found = read_accounting(told.stdout) if told is not None and told.returncode == 0 else None
    return found or SeenJob(UNKNOWN)


def cancel(job_id: str, programs: str, *, signal: str = "") -> str:
    """End a job, or send its processes a signal. Returns what went wrong, in Slurm's words, or ""."""
    options = [f"--signal={signal}"] if signal else []
    done = _run([f"{programs}/scancel", *options, job_id])
    if done is None:
        return "scancel did not answer"
    return done.stderr.strip() if done.returncode else ""


def _run(argv: list[str]) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
            env={**os.environ, "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
