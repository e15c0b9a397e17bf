"""What a rented machine is doing, asked on the machine itself: the standard library and the run directory alone.

A machine is idle when no supervisor of a run lives on it, nothing is being copied, and its GPUs are hardly used.
"""

import contextlib
import json
import os
import subprocess
from pathlib import Path

from rollouts.run_dir.layout import RunDir, home_dir
from rollouts.run_dir.liveness import is_live

BUSY_PERCENT = 5  # of a GPU's time, from here on it is in use
NVIDIA_SMI_TIMEOUT_S = 20
COPIES = ("rsync",)


def doing(home: str) -> str:
    """Return what the machine of this rollouts home does now; "" for nothing. A few reads and two calls."""
    for run in sorted(Path(home, "runs").glob("*/supervisor.lock")):
        if is_live(RunDir(run.parent)):
            return f"the run {run.parent.name}"
    return _copying() or _gpu_use()


def _copying() -> str:
    """Return the name of a program of this account's home that copies files, such as a pull's; else ""."""
    own = f"HOME={os.environ.get('HOME', '')}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (process / "comm").read_text().strip()
            if name in COPIES and own in (process / "environ").read_bytes().split(b"\0"):
                return name
    return ""


def _gpu_use() -> str:
    """Return how much the busiest GPU is used, or that somebody holds one that does not tell; "" for idle ones.

    Where nvidia-smi is missing or fails, nothing is known of GPUs, and the runs alone count.
    """
    told = _nvidia_smi("--query-gpu=utilization.gpu")
    busiest = max((int(cell) for cell in told if cell.isdigit()), default=0)
    if busiest >= BUSY_PERCENT:
        return f"a GPU at {busiest} %"
    untold = any(not cell.isdigit() for cell in told)  # a part of a card tells no use
    return "a process on a GPU" if untold and _nvidia_smi("--query-compute-apps=pid") else ""


def _nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0
        else []
    )


def main() -> None:
    print(json.dumps({"doing": doing(str(home_dir().absolute()))}))
