"""Which of this machine's GPUs are free, decided as by the check before a launch. Standard library only."""

import subprocess
import time
from collections.abc import Iterable, Mapping

from rollouts.machine.nvidia_smi import (
    FIELDS,
    NVIDIA_SMI_TIMEOUT_S,
    PROCESS_FIELDS,
    Gpu,
    GpuProcess,
    holders,
    is_broken,
    is_free,
    read_gpus,
    read_processes,
)
from rollouts.worker.host_check.whole_machine import owners


def look() -> Mapping[int, str]:
    """Return why each GPU is not free, or "", by nvidia-smi's index. Raises OSError where it tells nothing."""
    lines = _nvidia_smi(f"--query-gpu={','.join(FIELDS)}")
    gpus, problem = read_gpus(lines, ",".join(FIELDS))
    if not gpus:
        raise OSError(f"nvidia-smi lists no GPU: {problem or 'no output'}")
    processes = read_processes(_nvidia_smi(f"--query-compute-apps={','.join(PROCESS_FIELDS)}"))
    return {gpu.index: _why_not(gpu, processes) for gpu in gpus}


def _nvidia_smi(query: str) -> list[str]:
    argv = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi did not answer within {NVIDIA_SMI_TIMEOUT_S} s") from None
    return done.stdout.splitlines()


def _why_not(gpu: Gpu, processes: Iterable[GpuProcess]) -> str:
    """Name the processes on a card, with owner and start, as far as they are seen from here; "" for a free one."""
    if is_broken(gpu):
        return f"it cannot be read: {gpu.unreadable}"
    if is_free(gpu, processes):
        return ""
    named = [found for found in holders(gpu, processes) if found.name != "[Not Found]"]
    if not named:
        return f"{gpu.memory_total_mib - gpu.memory_free_mib} MiB of it are in use"
    return ", ".join(f"pid {found.pid} {found.name}{_owner(found.pid)}" for found in named)


def _owner(pid: int) -> str:
    return "".join(
        f" of {found['user']} since {since(found['started_at'])}" for found in owners([pid])
    )


def since(began: float) -> str:
    """Return a moment for people, in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(began))
