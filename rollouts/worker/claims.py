"""What the live runs of this home have on this machine: GPUs and ports. Standard library only.

A run has what its plan.json names for as long as its supervisor's lock is held, which the kernel frees with its holder.
One that waits for its turn has nothing yet; its plan has the queue's part until then. Whoever takes something looks
first, under one lock of the home (`one_at_a_time`), so that two never get the same.
"""

import urllib.parse
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rollouts import run_dir
from rollouts.run_dir import LaunchPlan, RunDir, observe
from rollouts.worker.tickets import locked


@dataclass(frozen=True)
class Need:
    """What one run alone can have."""

    kind: str  # "GPU" or "port"
    number: str  # of a GPU nvidia-smi's index, or what CUDA_VISIBLE_DEVICES says

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


@dataclass(frozen=True)
class LiveRun:
    """A live run of this home and machine."""

    run: RunDir
    plan: LaunchPlan
    started_at: float


def one_at_a_time(home: Path) -> AbstractContextManager[None]:
    """Let one launch, or one turn, in this home decide at a time: what two of them want is given to the first."""
    return locked(home / "launch.lock")


def needs(plan: LaunchPlan) -> set[Need]:
    """Return what the run alone can have."""
    found: set[Need] = set()
    if plan.group is not None and plan.group.leads:
        found |= {
            Need("port", str(port))
            for port in (plan.group.supervisor_port, plan.group.trainer_port)
        }
    for spec in (spec for stage in plan.stages for spec in stage.processes()):
        devices = spec.env.get(run_dir.GPUS_VARIABLE, spec.env.get("CUDA_VISIBLE_DEVICES", ""))
        found |= {Need("GPU", device.strip()) for device in devices.split(",") if device.strip()}
        if spec.ready_url is not None:
            found.add(Need("port", str(urllib.parse.urlsplit(spec.ready_url).port)))
    return found


def uses_gpus(plan: LaunchPlan) -> bool:
    return any(need.kind == "GPU" for need in needs(plan))


def live_runs(home: Path, *, but: str) -> Iterator[LiveRun]:
    """List the runs that are live on this machine, or about to be, and those that wait for their turn; not `but`."""
    for path in sorted(home.glob("runs/*")):
        other = RunDir(path)
        try:
            seen = observe(other) if path.name != but else None
            plan = run_dir.read_plan(other) if seen is not None and seen.live else None
        except (OSError, ValueError, TypeError, KeyError):
            # another user's, or of another version of this program
            continue
        # machines may share a home, and no GPUs; Slurm gives its own
        if seen is None or plan is None or plan.slurm is not None or run_dir.is_elsewhere(other):
            continue
        yield LiveRun(other, plan, seen.status.started_at if seen.status else 0.0)


def taken(plan: LaunchPlan) -> str:
    """Say which live run has what the plan needs, or waited for it before; "" where nothing is taken."""
    wanted = needs(plan)
    for other in live_runs(Path(plan.home), but=plan.run_id):
        run_id = other.run.run_id
        if other.plan.queue is None:
            if shared := wanted & needs(other.plan):
                what = ", ".join(sorted(map(str, shared)))
                return f"run {run_id} is live and has {what}; `deploy stop {run_id}` ends it"
        elif shared := wanted & {Need("GPU", str(card.index)) for card in other.plan.queue.cards}:
            what = ", ".join(sorted(map(str, shared)))
            return f"run {run_id} waits in the host's queue for {what}; `--wait` goes behind it"
    return ""
