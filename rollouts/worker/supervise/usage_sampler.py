"""How busy a run's GPUs and processes are, sampled into gpu.jsonl. Standard library only."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

from rollouts.machine.nvidia_smi import (
    NVIDIA_SMI_TIMEOUT_S,
    USAGE_FIELDS,
    GpuUsage,
    read_usage,
)
from rollouts.run_dir import GPUS_VARIABLE, RunDir, StageSpec, append_jsonl
from rollouts.worker.processes import Scan, marked_processes, process_usage, scan, window_mark

INTERVAL_S = 5.0
WIDER_BYTES = 1 << 20  # samples come half as often after each: a file of a month holds 10 MiB
FAILURES_MAX = 3  # of nvidia-smi, in a row: then it is not asked again
GIB = 1 << 30
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def interval_s(file_bytes: int) -> float:
    """Return the seconds between two samples, by the size of the file."""
    return float(INTERVAL_S * 2 ** (file_bytes // WIDER_BYTES))


class UsageSampler:
    """Appends a sample of one run to its gpu.jsonl whenever one is due."""

    def __init__(self, run: RunDir, note: Callable[[str], None]) -> None:
        self._run, self._note = run, note
        self._due_at = 0.0  # monotonic
        self._failures = 0
        # of each process at the last sample: clock ticks that it had used, when that was
        self._ticks: dict[int, int] = {}
        self._looked_at = 0.0

    def sample(self, stage: StageSpec) -> None:
        """Append a sample if it is time for one. Raises OSError, as of a full disk."""
        if time.monotonic() < self._due_at:
            return
        cards = self._cards(stage)
        row = {
            "time": round(time.time(), 3),
            "stage": stage.name,
            "gpus": [_gpu_row(usage, cards[usage.index]) for usage in self._usage(cards)],
            "processes": self._processes(stage),
        }
        if row["gpus"] or row["processes"]:
            append_jsonl(self._run.gpu, row)
        size = self._run.gpu.stat().st_size if self._run.gpu.exists() else 0
        self._due_at = time.monotonic() + interval_s(size)

    def _cards(self, stage: StageSpec) -> dict[int, list[str]]:
        """Return which processes of a stage have which card, by nvidia-smi's number."""
        found: dict[int, list[str]] = {}
        for spec in sorted(stage.processes(), key=lambda spec: spec is not stage.trainer):
            numbers = [int(word) for word in spec.env.get(GPUS_VARIABLE, "").split(",") if word]
            for place, number in enumerate(numbers):
                name = f"trainer-{place}" if spec is stage.trainer else spec.window
                found.setdefault(number, []).append(name)
        return found

    def _usage(self, cards: Mapping[int, list[str]]) -> list[GpuUsage]:
        """Ask nvidia-smi for the run's cards. After FAILURES_MAX vain attempts in a row it is not asked again."""
        if not cards or self._failures >= FAILURES_MAX:
            return []
        found = [usage for usage in _ask(cards) if usage.index in cards]
        self._failures = 0 if found else self._failures + 1
        if self._failures == FAILURES_MAX:
            self._note("nvidia-smi does not tell how busy the GPUs are: gpu.jsonl goes on without")
        return found

    def _processes(self, stage: StageSpec) -> list[dict[str, Any]]:
        """Return CPU (in cores, since the last sample) and resident memory of each process, by its name."""
        seen, now = scan(), time.monotonic()
        passed_s, ticks_now, rows = now - self._looked_at, dict[int, int](), []
        for name, pids in self._named(stage, seen).items():
            cores, memory = 0.0, 0
            for pid in pids:
                if (usage := process_usage(pid)) is not None:
                    ticks_now[pid] = usage.ticks
                    cores += max(0, usage.ticks - self._ticks.get(pid, usage.ticks)) / TICKS_PER_S
                    memory += usage.memory_bytes
            known = self._ticks.keys() & set(pids)
            cpu = round(cores / passed_s, 3) if known and passed_s > 0 else None
            rows.append({"name": name, "cpu": cpu, "memory_gib": round(memory / GIB, 3)})
        self._ticks, self._looked_at = ticks_now, now
        return rows

    def _named(self, stage: StageSpec, seen: Scan) -> dict[str, list[int]]:
        """Return the processes of each window; of the trainer those of each rank, with what the rank started."""
        found: dict[str, list[int]] = {}
        for spec in stage.processes():
            for pid in marked_processes(
                self._run, {window_mark(stage.name, spec.window)}, seen=seen
            ):
                name = _rank_name(seen, pid) if spec is stage.trainer else spec.window
                if name:
                    found.setdefault(name, []).append(pid)
        return dict(sorted(found.items()))


def _ask(cards: Mapping[int, list[str]]) -> tuple[GpuUsage, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [f"--query-gpu={','.join(USAGE_FIELDS)}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [program, f"--id={','.join(map(str, sorted(cards)))}", *query],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
        return read_usage(done.stdout.decode(errors="replace").splitlines())
    return ()


def _gpu_row(usage: GpuUsage, names: list[str]) -> dict[str, Any]:
    def gib(mib: int | None) -> float | None:
        return None if mib is None else round(mib / 1024, 3)

    return {
        "gpu": usage.index,
        "processes": names,
        "use": usage.use,
        "memory_gib": gib(usage.memory_mib),
        "memory_total_gib": gib(usage.memory_total_mib),
    }


def _rank_name(seen: Scan, pid: int) -> str:
    """Return `trainer-<local rank>`; "" for torchrun itself, which trains nothing."""
    for entry in seen.environments.get(pid, ()):
        if entry.startswith(b"LOCAL_RANK="):
            return f"trainer-{entry[11:].decode(errors='replace')[:4]}"
    return ""
