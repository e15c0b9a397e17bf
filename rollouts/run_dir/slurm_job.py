"""What a run's files hold of the job in which Slurm runs it. Standard library only."""

import json
from dataclasses import dataclass
from typing import Any

from rollouts.plain_files import read_plain
from rollouts.run_dir.layout import HOME_VARIABLE, RunDir

PENDING, RUNNING = "PENDING", "RUNNING"
# Slurm's words for a job that is over
ENDED = (
    *("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED"),
    *("OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED", "UNKNOWN"),
)


@dataclass(frozen=True, kw_only=True)
class SlurmSpec:
    """How Slurm runs the run, as plan.json has it."""

    script: str  # for sbatch; "" in the plan of another node than the first
    gpus: int  # that the node has to give it
    ports: list[int]  # stand-ins: the node puts free ones in their place
    requeue: bool = False  # Slurm may start the job again: the run goes on from its last checkpoint
    restarts: int = 0  # how often it did

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SlurmSpec":
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """slurm.json: the job that was submitted, and what Slurm said of it last."""

    job_id: str
    programs: str  # the directory of Slurm's programs on the login host
    state: (
        str  # Slurm's word: PENDING, RUNNING, TIMEOUT, …; UNKNOWN: it knows of no such job any more
    )
    reason: str  # Slurm's too

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


def not_seen(run: RunDir) -> str:
    """Say of a node that it has another home than the login host, and what helps."""
    return (
        f"does not see {run.path}, which the login host and the job's nodes have to share."
        f" On the login host set {HOME_VARIABLE} to a directory that they share (in ~/.bashrc), and deploy again."
    )


def read_slurm_job(run: RunDir) -> SlurmJob | None:
    """Return the run's job; None for a run without, or where it is not submitted. Raises ValueError for damage."""
    try:
        found = json.loads(read_plain(run.slurm_job))
    except FileNotFoundError:
        return None
    names = ("job_id", "programs", "state", "reason")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in names):
        raise ValueError(f"{run.slurm_job}: not the record of a job")
    return SlurmJob(**{name: found[name] for name in names})
