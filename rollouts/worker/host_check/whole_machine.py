"""Cores, memory and limits of this account, and whose the processes on the cards are."""

import contextlib
import os
import pwd
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60  # what version 1 of cgroups writes for no limit is of this order


def machine_row() -> dict[str, Any]:
    """Return cores, memory in MiB and limits; None: without a limit."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quotas = [quota for text in _values("cpu.max") if (quota := _cores(text)) is not None]
    quotas += [quota for quota in [_old_quota()] if quota is not None]
    memory = _memory_kib()
    return {
        "cores": os.cpu_count() or 1,
        "cores_allowed": float(min([allowed, *quotas])),
        "memory_mib": memory.get("MemTotal", 0) >> 10,
        "memory_free_mib": memory.get("MemAvailable", 0) >> 10,
        "memory_limit_mib": _memory_limit_mib(),
        "open_files": _limits(resource.RLIMIT_NOFILE),
        "processes": _limits(resource.RLIMIT_NPROC),
        "locked_kib": _limits(resource.RLIMIT_MEMLOCK, unit=1024),
        "file_mib": _limits(resource.RLIMIT_FSIZE, unit=1 << 20),
    }


def _limits(which: int, *, unit: int = 1) -> list[int | None]:
    """Return the soft and the hard limit."""
    return [
        None if limit == resource.RLIM_INFINITY else limit // unit
        for limit in resource.getrlimit(which)
    ]


def _memory_kib() -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {}


def _memory_limit_mib() -> int | None:
    found = [int(text) for text in _values("memory.max") if text.isdigit()]
    with contextlib.suppress(OSError, ValueError):
        found.append(int((CGROUPS / "memory/memory.limit_in_bytes").read_text()))
    limits = [limit for limit in found if limit < UNLIMITED_BYTES]
    return min(limits) >> 20 if limits else None


def _values(name: str) -> Iterator[str]:
    """Yield a setting of this process's control group and of each above it (cgroup version 2)."""
    try:
        own = next(
            line
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
    except (OSError, StopIteration):
        return
    group = CGROUPS / own[3:].lstrip("/")
    for directory in (group, *group.parents):
        if directory == CGROUPS or CGROUPS in directory.parents:
            with contextlib.suppress(OSError):
                yield (directory / name).read_text().strip()


def _cores(text: str) -> float | None:
    quota, _, period = text.partition(" ")
    return (
        int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
    )


def _old_quota() -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota = int((CGROUPS / "cpu/cpu.cfs_quota_us").read_text())
        return quota / int((CGROUPS / "cpu/cpu.cfs_period_us").read_text()) if quota > 0 else None
    return None


def owners(pids: list[int]) -> list[dict[str, Any]]:
    """Return whose these processes are, and since when they run; those that cannot be seen from here are left out."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            process = Path(f"/proc/{pid}")
            uid = process.stat().st_uid
            ticks = int((process / "stat").read_text().rpartition(")")[2].split()[19])
            since = _boot_time() + ticks / os.sysconf("SC_CLK_TCK")
            found.append({"pid": pid, "user": _user(uid), "started_at": since})
    return found


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def _boot_time() -> float:
    lines = Path("/proc/stat").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("btime ")))
