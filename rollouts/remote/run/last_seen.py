"""A run as this machine saw it last, from the registry and the mirror alone: quick, for thousands of runs."""

from pathlib import Path
from typing import Any

from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.run.mirror_files import size_of
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import FINAL_STATES, RunDir, iter_jsonl, last_jsonl_row, read_status
from rollouts.view.escape import one_line
from rollouts.view.tables import cause

DAMAGED = (ValueError, TypeError, AttributeError, OSError, RecursionError)
ERROR_EVENT = b'"error"'  # in each line of events.jsonl that is an error


def list_row(target: str, experiment_name: str, run_id: str, row: dict[str, Any] | None) -> dict[str, Any]:
    """Return a run as `ls` and `status` show it, from a host_probe.run_row; `state` is "unknown" without one."""
    names = ("state", "stage", "step", "started_at", "exit_code", "message", "host")
    values = {name: row.get(name) if row else None for name in names}
    values["state"] = values["state"] or "unknown"
    return {"run_id": run_id, "experiment_name": experiment_name, "target": target, **values}


def last_seen(entry: RunEntry) -> dict[str, Any]:
    """Return a run from what lies on this machine; with a `message` where it failed, or was not launched."""
    row = _row_here(entry)
    shown = list_row(entry.target, entry.experiment_name, entry.run_id, row)
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
        if is_here and (status is None or status.state not in FINAL_STATES):  # alive? a mirror has no lock to tell
            from rollouts.remote.host.host_probe import run_row

            return run_row(run)
        if status is None:
            return None
        step = (last_jsonl_row(run.metrics) or {}).get("step")
    except DAMAGED:  # the run is shown all the same
        return None
    return {
        "state": status.state,
        "stage": status.stage,
        "step": step if isinstance(step, int) else None,
        "started_at": status.started_at,
        "exit_code": status.exit_code,
        "message": status.message,
        "host": None,
    }


def was_launched(entry: RunEntry) -> bool:
    """Return whether anything here shows that the run was alive once."""
    streamed = ("status.json", "events.jsonl", "metrics.jsonl", "eval.jsonl")
    here = entry.mirror.path
    return entry.adopted or entry.was_launched or (here.is_dir() and any(size_of(here, name) for name in streamed))


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
        errors = [row for row in iter_jsonl(mirror.events, having=ERROR_EVENT) if row.get("kind") == "error"]
    except DAMAGED:
        return message
    return cause(errors[-1]) if errors else message
