"""How busy a run's GPUs and processes are, in lines of a terminal, and lines of any short words. Pure."""

from collections.abc import Mapping
from typing import Any

from rollouts.view.escape import one_line

BAR = 10  # characters
LINES_MAX = 9  # GPUs that have a line of their own


def usage_lines(by_host: Mapping[str, Mapping[str, Any]], *, utf8: bool, width: int) -> list[str]:
    """Return the lines of each host, by its last usable row of gpu.jsonl; below its name, where it has one."""
    lines = []
    for host in sorted(by_host):
        lines += [f"  {one_line(host, limit=40)}"] if host else []
        lines += _host_lines(by_host[host], utf8=utf8, width=width)
    return lines


def _host_lines(row: Mapping[str, Any], *, utf8: bool, width: int) -> list[str]:
    """Return a line a GPU; where it has none, all processes."""
    gpus = [_gpu_line(entry, utf8=utf8) for entry in row["gpus"][:LINES_MAX]]
    if len(row["gpus"]) > LINES_MAX:
        gpus.append(f"  and {len(row['gpus']) - LINES_MAX} more GPUs")
    processes = [_process_words(entry) for entry in row["processes"]]
    return gpus or pair_lines(processes, width)


def pair_lines(pairs: list[str], width: int) -> list[str]:
    """Return pairs of name and value on as few lines as hold them, none of them broken in two."""
    lines: list[str] = []
    for pair in pairs:
        if lines and len(lines[-1]) + 3 + len(pair) <= width:
            lines[-1] += f"   {pair}"
        else:
            lines.append(f"  {pair}")
    return lines


def _gpu_line(entry: Mapping[str, Any], *, utf8: bool) -> str:
    names = one_line(", ".join(entry["processes"]), limit=24)
    use = entry.get("use")
    filled = 0 if use is None else round(BAR * max(0.0, min(1.0, use)))
    full, empty = ("█", "░") if utf8 else ("#", ".")
    share = "  ?" if use is None else f"{use:.0%}"
    return (
        f"  GPU {entry['gpu']} {names:<14} {full * filled}{empty * (BAR - filled)} {share:>4}"
        f"{_memory(entry)}"
    )


def _memory(entry: Mapping[str, Any]) -> str:
    used, total = entry.get("memory_gib"), entry.get("memory_total_gib")
    if used is None:
        return ""
    return f"  {used:.1f} GiB" if total is None else f"  {used:.1f} of {total:.1f} GiB"


def _process_words(entry: Mapping[str, Any]) -> str:
    cpu = "" if entry.get("cpu") is None else f" {entry['cpu']:.1f} cores,"
    return f"{one_line(entry['name'], limit=24)}:{cpu} {entry['memory_gib']:.2f} GiB"
