"""`mirror.json`: whether what lies in a mirror is followed, whole, or as old as its last update."""

import json
import os
from typing import Any

from rollouts.plain_files import read_plain
from rollouts.remote.run.mirror_files import make_mirror, replace
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import RunDir

NOTE = "mirror.json"


def write_note(
    entry: RunEntry, *, now: float, followed_by: int | None, complete: bool = False
) -> None:
    """Write `mirror.json`: whether what lies here is followed, whole, or as old as `now`."""
    run = entry.run_id
    if complete:
        message = "complete: the run ended, and all of it was pulled and verified"
    elif followed_by is not None:
        message = f"followed by process {followed_by} of this machine, if that still runs"
    else:
        message = f"not followed: as old as updated_at. `deploy attach {run}` follows, `deploy pull {run}` brings all"
    note = {
        "run_id": run,
        "target": entry.target,
        "run_path": entry.run_path,
        "started_here": not entry.adopted,
        "followed": followed_by is not None,
        "followed_by": followed_by,
        "complete": complete,
        "updated_at": now,
        "message": message,
    }
    make_mirror(entry.mirror.path)
    replace(entry.mirror.path, NOTE, json.dumps(note, indent=1).encode() + b"\n")


def read_note(run: RunDir) -> dict[str, Any]:
    """Return the note of a mirror, or {} where there is none."""
    try:
        note = json.loads(read_plain(run.path / NOTE))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def follower(run: RunDir) -> int | None:
    """Return the process of this machine that follows the run, as its mirror says; None if it is gone, or none does."""
    pid = read_note(run).get("followed_by")
    return pid if isinstance(pid, int) and _is_alive(pid) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
