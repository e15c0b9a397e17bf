"""What a login host tells of its Slurm, and whether Slurm would take a job: asked before anything is sent."""

from collections.abc import Iterator
from dataclasses import dataclass

from rollouts.remote.errors import Problem
from rollouts.remote.host.transport import Transport

ASK_S = 60.0
TOOLS = ("sbatch", "srun", "scontrol", "scancel")
LOCAL_DISKS = ("ext2/ext3", "xfs", "btrfs", "tmpfs", "overlayfs", "zfs")
_SCRIPT = """
for tool in sbatch srun scontrol scancel; do command -v $tool >/dev/null && echo "tool=$tool"; done
place=$1; while [ ! -e "$place" ]; do place=$(dirname "$place"); done
echo "disk=$(stat -f -c %T "$place" 2>/dev/null)"
command -v sinfo >/dev/null && sinfo -h -o 'partition=%R' 2>&1 | sort -u
command -v scontrol >/dev/null && scontrol ping 2>&1 | sed 's/^/ping=/'
exit 0
"""


@dataclass(frozen=True)
class SlurmFacts:
    """The Slurm of a login host."""

    tools: tuple[str, ...]
    partitions: tuple[str, ...]
    disk: str  # of the rollouts home: "nfs", "lustre", "ext2/ext3"
    ping: str  # what the controller said

    @property
    def is_local_disk(self) -> bool:
        return self.disk in LOCAL_DISKS


def ask_slurm(transport: Transport, path: str, home: str) -> SlurmFacts:
    """Ask a login host about its Slurm; `path` is the PATH that runs get there. Raises TransportError."""
    done = transport.run(
        ["env", f"PATH={path}", "sh", "-s", home], stdin=_SCRIPT.encode(), timeout_s=ASK_S
    )
    lines = [line.partition("=") for line in done.out.splitlines()]
    found = {
        key: tuple(v for k, _, v in lines if k == key)
        for key in ("tool", "partition", "disk", "ping")
    }
    return SlurmFacts(
        tools=found["tool"],
        partitions=found["partition"],
        disk=next(iter(found["disk"]), ""),
        ping="; ".join(found["ping"]),
    )


def slurm_problems(facts: SlurmFacts, target: str) -> Iterator[Problem]:
    """Say that a host has no Slurm, or none that answers."""
    if lacking := [tool for tool in TOOLS if tool not in facts.tools]:
        yield Problem(
            f"{target} has no {', '.join(lacking)}: Slurm's jobs cannot be submitted there.",
            needed="the login host of a cluster, with Slurm's programs on the PATH of its commands",
            fix="name the login host with --remote, or leave --slurm out: then the run starts on that host",
        )
    elif "is UP" not in facts.ping:
        yield Problem(
            f"{target}: Slurm's controller does not answer.",
            found=facts.ping,
            fix="try again later, or ask the cluster's people; `scontrol ping` shows it",
        )


def refusal(
    transport: Transport, path: str, script: str, facts: SlurmFacts, target: str
) -> tuple[Problem | None, str]:
    """Have Slurm look at a job without submitting it. Return why it refuses, or (None, what it says of the start)."""
    done = transport.run(
        ["env", f"PATH={path}", "sbatch", "--test-only", "--chdir=/"],
        stdin=script.encode(),
        timeout_s=ASK_S,
    )
    said = done.err.strip() or done.out.strip()
    if done.returncode == 0:
        return None, said.removeprefix("sbatch: ")
    problem = Problem(
        f"{target}: Slurm would refuse the job.",
        found=said[-1500:],
        needed=f"partitions there: {', '.join(facts.partitions) or 'none'}",
        fix="correct the options file; `sinfo` and `sacctmgr show assoc user=$USER` on that host show what there is",
    )
    return problem, ""
