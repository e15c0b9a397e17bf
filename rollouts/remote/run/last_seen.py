"""A run as this machine saw it last, from the registry and the mirror alone: quick, for thousands of runs."""

import contextlib
import json
from pathlib import Path
from typing import Any

from rollouts.plain_files import read_plain
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.run.mirror_files import size_of
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import (
    FINAL_STATES,
    RunDir,
    Status,
    iter_jsonl,
    last_step,
    read_status,
    write_json_atomic,
)
from rollouts.view.escape import one_line
from rollouts.view.tables import cause

DAMAGED = (ValueError, TypeError, AttributeError, OSError, RecursionError)
ERROR_EVENT = b'"error"'  # in each line of events.jsonl that is an error


def list_row(
    target: str, experiment_name: str, run_id: str, row: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a run as `ls` and `status` show it, from a host_probe.run_row; `state` is "unknown" without one."""
    names = ("state", "stage", "step", "started_at", "exit_code", "message", "host")
    values = {name: row.get(name) if row else None for name in names}
    values["state"] = values["state"] or "unknown"
    return {"run_id": run_id, "experiment_name": experiment_name, "target": target, **values}


def hosts_of(entry: RunEntry) -> dict[str, Any]:
    """Return the targets of all hosts of a run on several, as `hosts`; {} for a run on one."""
    others = [str(other["target"]) for other in entry.others]
    return {"hosts": [entry.target, *others]} if others else {}


def last_seen(entry: RunEntry) -> dict[str, Any]:
    """Return a run from what lies on this machine; with a `message` where it failed, or was not launched."""
    row = _row_here(entry)
    shown = list_row(entry.target, entry.experiment_name, entry.run_id, row) | hosts_of(entry)
    if shown["state"] not in FINAL_STATES and (why := entry.interrupted):
        return shown | {"state": "interrupted", "message": f"its machine is gone: {one_line(why)}"}
    shown |= {"message": with_host(row)} if row else {}
    if row is None and not was_launched(entry):
        reason = one_line(entry.reason) or "deploy was interrupted, or is sending it"
        return shown | {"state": "not launched", "message": reason}
    if shown["state"] in ("failed", "died"):
        return shown | {"message": last_error(entry.mirror, str(row["message"]) if row else "")}
    return shown


def _row_here(entry: RunEntry) -> dict[str, Any] | None:
    """Return what the run's own files tell, or its mirror's. None where they are missing or damaged."""
    is_here = entry.target == LOCAL_TARGET
    run = RunDir(Path(entry.run_path)) if is_here else entry.mirror
    try:
        status = read_status(run)
        # alive? a mirror has no lock to tell
        if is_here and (status is None or status.state not in FINAL_STATES):
            from rollouts.remote.host.host_probe import run_row

            return run_row(run)
        if (
            not is_here
            and (status is None or status.state not in FINAL_STATES)
            and (told := _told(entry, since=status.updated_at if status else 0.0))
        ):
            return told
        return None if status is None else _row_of(run, status)
    except DAMAGED:  # the run is shown all the same
        return None


def _row_of(run: RunDir, status: Status) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "state": status.state,
        "stage": status.stage,
        "step": last_step(run, status.stage),
        "started_at": status.started_at,
        "updated_at": status.updated_at,
        "exit_code": status.exit_code,
        "message": status.message,
        "live": False,
        "host": None,
    }


def _told(entry: RunEntry, *, since: float) -> dict[str, Any] | None:
    """Return the row that the host told last, unless the mirror is newer; None where it was not asked."""
    try:
        row = json.loads(read_plain(entry.seen))
        return dict(row) if row["updated_at"] >= since and isinstance(row["state"], str) else None
    except (KeyError, *DAMAGED):
        return None


def note_seen(entry: RunEntry, row: dict[str, Any]) -> None:
    """Write down what the host just told of a registered run, a host_probe.run_row, for `ls` to know it."""
    with contextlib.suppress(OSError):  # what was asked is answered all the same
        write_json_atomic(entry.seen, row, mode=0o600)


def note_died(entry: RunEntry) -> None:
    """Write down that a run died, which its own status cannot say: its supervisor is gone."""
    with contextlib.suppress(*DAMAGED):
        if (status := read_status(entry.mirror)) is not None:
            note_seen(entry, _row_of(entry.mirror, status) | {"state": "died"})


def was_launched(entry: RunEntry) -> bool:
    """Return whether anything here shows that the run was alive once."""
    streamed = ("status.json", "events.jsonl", "metrics.jsonl", "eval.jsonl")
    here = entry.mirror.path
    return (
        entry.adopted
        or entry.was_launched
        or (here.is_dir() and any(size_of(here, name) for name in streamed))
    )


def with_host(row: dict[str, Any]) -> str:
    """Return a run's message, with the machine that it runs on if that only shares its files with the host."""
    message, host = str(row["message"]), row["host"]
    if not host or row["state"] in FINAL_STATES:
        return message
    if row["live"]:
        return f"runs on {host}, which shares this home: {message}"
    ask = f"whether it lives is known there: `deploy status {row['run_id']} --remote {host}`"
    return f"ran on {host}, which shares this home, and nothing was heard of it for minutes; {ask}"


def last_error(mirror: RunDir, message: str) -> str:
    """Return the last error that the pulled events tell, else `message`."""
    try:
        errors = [
            row
            for row in iter_jsonl(mirror.events, having=ERROR_EVENT)
            if row.get("kind") == "error"
        ]
    except DAMAGED:
        return message
    return cause(errors[-1]) if errors else message
