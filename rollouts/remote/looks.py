"""The verbs of `deploy` that only look: at one run, at all runs, at a host. They start nothing and register nothing."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.host_probe import run_row
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan.gpu_problems import host_advice
from rollouts.remote.run import registry
from rollouts.remote.run.mirror_note import read_note
from rollouts.remote.run.open_run import OpenRun, open_run, was_launched
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.texts import facts_text
from rollouts.run_dir import FINAL_STATES, RunDir, iter_jsonl, read_status
from rollouts.view.answer import Answer
from rollouts.view.escape import one_line
from rollouts.view.screen import terminal_width
from rollouts.view.tables import cause, run_text, runs_text


def status(run_id: str, *, remote: str | None) -> Answer:
    """Look at the host once (`deploy status RUN`)."""
    with open_run(run_id, remote, adopt=False) as run:
        entry = run.entry
        shown = list_row(entry.target, entry.experiment_name, entry.run_id, run.row)
        shown |= {"message": _message(run), "run_path": entry.run_path, "local_dir": entry.local_dir}
        shown["here"] = what_lies_here(entry)
        if run.row is None:
            shown["state"] = {"gone": "gone", "never launched": "not launched"}.get(run.trace, "unreadable")
    return Answer(shown, run_text(shown))


def what_lies_here(entry: RunEntry) -> str:
    """Return the mirror's note. That a process follows counts only while one with its number exists."""
    note = read_note(entry.mirror)
    pid = note.get("followed_by")
    if isinstance(pid, int) and not _is_alive(pid):
        return f"not followed any more: `deploy attach {entry.run_id}` follows, `deploy pull {entry.run_id}` brings all"
    return str(note.get("message", "nothing was pulled"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _message(run: OpenRun) -> str:
    entry = run.entry
    if run.row is not None:
        message = _with_host(run.row)
        return message if run.row["state"] != "failed" else _cause(entry.mirror, message)
    if run.trace == "unreadable":
        return f"its status on {entry.target} cannot be read: `deploy pull {entry.run_id}` brings what can"
    if run.trace == "gone":
        return str(run.missing().problems[0].text()).replace("\n", ";")
    reason = f"; last try: {one_line(entry.reason)}" if entry.reason else ""
    return f"not launched yet: `deploy attach {entry.run_id}` goes on with it{reason}"


def list_runs(*, remote: str | None) -> Answer:
    """List the runs known here, as last seen (`deploy ls`); with --remote all runs on that host, as they are."""
    with as_deploy_errors():
        if remote is not None:
            with contextlib.closing(open_transport(remote)) as transport:
                found = gather_facts(transport).runs
            rows = [_host_row(remote, row) for row in found]
        else:
            rows = [last_seen(entry) for entry in registry.entries()]
        damaged = (f"note: {file} cannot be read, and is left out" for file in registry.damaged_entries())
        return Answer(rows, runs_text(rows, width=terminal_width()), remarks=tuple(damaged))


def check_host(remote: str | None, *, accept_new_host_key: bool) -> Answer:
    """Check what a host has and lacks, and list its runs (`deploy --remote T`). Exit code 2: it cannot run a job."""
    with as_deploy_errors():
        with contextlib.closing(open_transport(remote, accept_new_host_key=accept_new_host_key)) as transport:
            facts = gather_facts(transport, check_way=True)
        target = remote or LOCAL_TARGET
        lacking = [tool for tool in ("tmux", "rsync") if tool not in facts.tools]
        lacking += ["python3 >= 3.10"] if facts.python is None else []
        advice = [*host_advice(facts, target)]
        found = {"lacking": lacking, "advice": list(map(dataclasses.asdict, advice))}
        runs = runs_text([_host_row(target, row) for row in facts.runs], width=terminal_width())
        text = f"{facts_text(target, facts, lacking)}\n\n{runs}"
        return Answer(
            {"target": target, **found, "facts": dataclasses.asdict(facts)},
            "".join([text, *(f"\n\nfor GPU runs: {problem.text()}" for problem in advice)]),
            exit_code=2 if lacking or facts.way_problems else 0,
            remarks=tuple(f"error: {problem.text()}" for problem in facts.way_problems),
        )


def _with_host(row: dict[str, Any]) -> str:
    """Return a run's message, with the machine that it runs on if that only shares its files with the host."""
    message, host = str(row["message"]), row["host"]
    if not host or row["state"] in FINAL_STATES:
        return message
    if row["live"]:
        return f"runs on {host}, which shares this home: {message}"
    ask = f"whether it lives is known there: `deploy status {row['run_id']} --remote {host}`"
    return f"ran on {host}, which shares this home, and nothing was heard of it for minutes; {ask}"


# --- rows -----------------------------------------------------------------------------------------------------------


def list_row(target: str, experiment_name: str, run_id: str, row: dict[str, Any] | None) -> dict[str, Any]:
    """Return a run as `ls` and `status` show it, from a host_probe.run_row; `state` is "unknown" without one."""
    names = ("state", "stage", "step", "started_at", "exit_code", "message", "host")
    values = {name: row.get(name) if row else None for name in names}
    values["state"] = values["state"] or "unknown"
    return {"run_id": run_id, "experiment_name": experiment_name, "target": target, **values}


def _host_row(target: str, row: dict[str, Any]) -> dict[str, Any]:
    return list_row(target, row["experiment_name"], row["run_id"], row | {"message": _with_host(row)})


def last_seen(entry: RunEntry) -> dict[str, Any]:
    """Return a run from what lies on this machine; with a `message` where it failed, or was not launched."""
    row = _row_here(entry)
    shown = list_row(entry.target, entry.experiment_name, entry.run_id, row)
    shown |= {"message": _with_host(row)} if row else {}
    if row is None and not was_launched(entry):
        reason = one_line(entry.reason) or "deploy was interrupted, or is sending it"
        return shown | {"state": "not launched", "message": reason}
    if shown["state"] in ("failed", "died"):
        return shown | {"message": _cause(entry.mirror, str(row["message"]) if row else "")}
    return shown


def _row_here(entry: RunEntry) -> dict[str, Any] | None:
    try:
        if entry.target == LOCAL_TARGET:
            return run_row(RunDir(Path(entry.run_path)))
        row, seen = run_row(entry.mirror), read_status(entry.mirror)
    except (ValueError, TypeError, OSError, RecursionError):  # a damaged file: the run is shown all the same
        return None
    if row and seen:
        row["state"] = seen.state  # a mirror has no lock that tells the living from the dead
    return row


def _cause(mirror: RunDir, message: str) -> str:
    """Return the last error that the pulled events tell, else `message`."""
    try:
        errors = [row for row in iter_jsonl(mirror.events) if row.get("kind") == "error"]
    except (ValueError, AttributeError, OSError, RecursionError):
        return message
    return cause(errors[-1]) if errors else message
