"""What one look at a machine's rollouts home shows: its runs, environments, disk, ports. Standard library only.

Used here for this machine, and sent as source to a host (facts.py), which need not have any of our code: there
`main` prints the answer to the questions in its argument. It changes nothing, but for secrets and the like that a run
left which died without its own end.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rollouts.machine.free_ports import free_ports, port_is_free
from rollouts.plain_files import read_plain
from rollouts.run_dir import (
    RunDir,
    clean_up,
    is_elsewhere,
    last_step,
    observe,
    other_host,
    read_launch_id,
)
from rollouts.slurm.settle import settle

LOCKS_PYTHON = (3, 11)  # every lock of ours is made for it, so that no other need be looked for
PYTHON_NAMES = "python3.11", "python3.12", "python3.13", "python3.14", "python3"
PYTHON_TIMEOUT_S = 10.0
ASK_PYTHON = """
import sys, sysconfig
from importlib.machinery import PathFinder
if not (PathFinder.find_spec("ensurepip") and PathFinder.find_spec("venv")): sys.exit(1)
print("%d.%d.%d" % sys.version_info[:3], sysconfig.get_path("include"))
"""


def run_row(run: RunDir) -> dict[str, Any] | None:
    """Return one run as `deploy ls` shows it; None when nothing was launched there.

    {run_id, experiment_name, state, stage, step, started_at, updated_at, exit_code, message, live (supervised, or about
    to be), launched (a supervisor held the lock once), launch_id (of the deploy that started it; None: not known),
    ports (of a live run's engines on this machine, now or later), host (the name of the machine that it was started on,
    where that is another one that shares the home)}: what run_dir.observe sees, and the last step of its stage.
    """
    try:
        settle(run)
        seen = observe(run)
    except OSError:  # another user's
        return None
    if seen.status is None:
        return None
    return {
        "run_id": run.run_id,
        "experiment_name": seen.status.experiment_name,
        "state": seen.state,
        "stage": seen.status.stage,
        "step": last_step(run, seen.status.stage),
        "started_at": seen.status.started_at,
        "updated_at": seen.status.updated_at,
        "exit_code": seen.exit_code,
        "message": seen.status.message,
        "live": seen.live,
        "launched": run.lock.exists(),
        "launch_id": read_launch_id(run),
        "ports": _ports(run) if seen.live and not is_elsewhere(run) else [],
        "host": other_host(run),
    }


def _ports(run: RunDir) -> list[int]:
    """Return where the engines and the router of the run's plan listen, now or later."""
    try:
        plan = json.loads(read_plain(run.plan))
        urls = [engine["ready_url"] for stage in plan["stages"] for engine in stage["engines"]]
        return sorted({port for url in urls if url and (port := urlsplit(url).port)})
    except (OSError, ValueError, KeyError, TypeError):
        # of another version, or damaged: no reason to hide the run
        return []


def run_rows(home: Path) -> list[dict[str, Any]]:
    """Return every run under `home`, oldest first."""
    try:
        names = sorted(entry.name for entry in os.scandir(home / "runs") if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows = [row for name in names if (row := run_row(RunDir(home / "runs" / name)))]
    return sorted(rows, key=lambda row: row["started_at"])


def _disk_free_bytes(home: Path) -> int:
    while not home.exists():
        home = home.parent
    return shutil.disk_usage(home).free


def _can_make_environments() -> bool:
    """Return whether this Python has what environments are made with: Debian ships ensurepip apart, as python3-venv."""
    return all(PathFinder.find_spec(name) for name in ("ensurepip", "venv"))


def _pythons() -> list[tuple[str, str, bool]]:
    """Return (path, version, has Python.h) of the interpreters on PATH that can make environments, each once.

    They are asked all at once; none where this one fits all that we make, since names on PATH may be slow scripts.
    """
    if sys.version_info[:2] == LOCKS_PYTHON and _can_make_environments():
        return []
    asked: dict[str, tuple[str, subprocess.Popen[str]]] = {}
    for name in PYTHON_NAMES:
        path = shutil.which(name)
        if path is None or os.path.realpath(path) in asked:
            continue
        argv = [path, "-ISc", ASK_PYTHON]
        with contextlib.suppress(OSError):
            process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            asked[os.path.realpath(path)] = path, process
    return [found for path, process in asked.values() if (found := _answer_of(path, process))]


def _answer_of(path: str, process: "subprocess.Popen[str]") -> tuple[str, str, bool] | None:
    with process:
        try:
            out, _ = process.communicate(timeout=PYTHON_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return None
    version, _, include = out.strip().partition(" ")
    return (path, version, _has_headers(include)) if process.returncode == 0 else None


def _has_headers(include: str) -> bool:
    return os.path.exists(os.path.join(include, "Python.h"))


def probe(
    home: Path, ports: list[int], paths: list[str], run_id: str | None, free_ports_wanted: int = 0
) -> dict[str, Any]:
    """Answer what needs Python: facts.HostFacts says what each field means."""
    clean_up(home)
    pythons = _pythons()
    runs = run_rows(home)
    taken = {*ports, *(port for row in runs for port in row["ports"])}
    own_headers = _has_headers(sysconfig.get_paths()["include"])
    return {
        "python": sys.executable,
        "python_version": platform.python_version(),
        "platform": sysconfig.get_platform(),
        "has_venv": _can_make_environments(),
        "pythons": [(path, version) for path, version, _ in pythons],
        "python_headers": [
            path for path, _, headers in [(sys.executable, "", own_headers), *pythons] if headers
        ],
        "disk_free_bytes": _disk_free_bytes(home),
        "ports_in_use": [port for port in ports if not port_is_free(port)],
        "paths": {path: os.path.isdir(path) for path in paths if os.path.exists(path)},
        "environments": sorted(marker.parent.name for marker in home.glob("envs/*/.complete")),
        "run_exists": run_id is not None and (home / "runs" / run_id).exists(),
        "runs": runs,
        "free_port": free_ports(free_ports_wanted, taken) if free_ports_wanted else None,
    }


def main(argument: str) -> None:
    question = json.loads(argument)
    home = Path(question.pop("home"))
    # On its own line, even after output without a line's end
    print("\nprobe=" + json.dumps(probe(home, **question)))
