"""Rows of gpu.jsonl: which are usable, and how busy each GPU was over some of them. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuLoad:
    """One GPU over some samples."""

    gpu: int
    processes: tuple[str, ...]  # of the run, at the last sample
    idle: float  # share of the time, 0 to 1
    memory_gib: float  # the most


def is_usage_row(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the form that docs/reference/run-directory.md describes."""
    return (
        is_finite(row.get("time"))
        and isinstance(row.get("stage"), str)
        and all(map(_is_gpu, _listed(row, "gpus")))
        and all(map(_is_process, _listed(row, "processes")))
    )


def is_finite(value: object) -> bool:
    """Return whether a JSON value is a number that one can compute with."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )


def _listed(row: Mapping[str, Any], name: str) -> list[Any]:
    found = row.get(name)
    return found if isinstance(found, list) else [None]  # which is no entry of either kind


def _is_gpu(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("gpu"), int):
        return False
    names = entry.get("processes")
    numbers = (entry.get(name) for name in ("use", "memory_gib", "memory_total_gib"))
    return (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and all(value is None or is_finite(value) for value in numbers)
    )


def _is_process(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    return is_finite(entry.get("memory_gib")) and (
        entry.get("cpu") is None or is_finite(entry["cpu"])
    )


def gpu_loads(rows: Iterable[Mapping[str, Any]]) -> list[GpuLoad]:
    """Return how busy each GPU was over these rows, by its number; one that never told its use is left out."""
    entries: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        for entry in row["gpus"]:
            if entry.get("use") is not None:
                entries.setdefault(entry["gpu"], []).append(entry)
    return [
        GpuLoad(
            gpu,
            tuple(found[-1]["processes"]),
            1 - sum(entry["use"] for entry in found) / len(found),
            max(entry.get("memory_gib") or 0.0 for entry in found),
        )
        for gpu, found in sorted(entries.items())
    ]
