"""The verbs of `deploy` that only look: at one run, at all runs, at a host. They start nothing and register nothing."""

import contextlib
import dataclasses

from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.list_runs import host_row
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.plan.gpu_problems import host_advice
from rollouts.remote.run.last_seen import hosts_of, last_error, list_row, with_host
from rollouts.remote.run.mirror_note import follower, read_note
from rollouts.remote.run.open_run import OpenRun, open_run
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.texts import facts_text
from rollouts.view.answer import Answer
from rollouts.view.escape import one_line
from rollouts.view.screen import terminal_width
from rollouts.view.tables import run_text, runs_text


def status(run_id: str, *, remote: str | None) -> Answer:
    """Look at the host once (`deploy status RUN`)."""
    with open_run(run_id, remote, adopt=False) as run:
        entry = run.entry
        shown = list_row(entry.target, entry.experiment_name, entry.run_id, run.row)
        shown |= hosts_of(entry) | {
            "message": _message(run),
            "run_path": entry.run_path,
            "local_dir": entry.local_dir,
        }
        shown["here"] = what_lies_here(entry)
        if run.row is None:
            shown["state"] = {"gone": "gone", "never launched": "not launched"}.get(
                run.trace, "unreadable"
            )
    return Answer(shown, run_text(shown))


def what_lies_here(entry: RunEntry) -> str:
    """Return the mirror's note. That a process follows counts only while one with its number exists."""
    note = read_note(entry.mirror)
    if isinstance(note.get("followed_by"), int) and follower(entry.mirror) is None:
        return f"not followed any more: `deploy attach {entry.run_id}` follows, `deploy pull {entry.run_id}` brings all"
    return str(note.get("message", "nothing was pulled"))


def _message(run: OpenRun) -> str:
    entry = run.entry
    if run.row is not None:
        message = with_host(run.row)
        return message if run.row["state"] != "failed" else last_error(entry.mirror, message)
    if run.trace == "unreadable":
        return f"its status on {entry.target} cannot be read: `deploy pull {entry.run_id}` brings what can"
    if run.trace == "gone":
        return str(run.missing().problems[0].text()).replace("\n", ";")
    reason = f"; last try: {one_line(entry.reason)}" if entry.reason else ""
    return f"not launched yet: `deploy attach {entry.run_id}` goes on with it{reason}"


def check_host(remote: str | None, *, accept_new_host_key: bool) -> Answer:
    """Check what a host has and lacks, and list its runs (`deploy --remote T`). Exit code 2: it cannot run a job."""
    with as_deploy_errors():
        with contextlib.closing(
            open_transport(remote, accept_new_host_key=accept_new_host_key)
        ) as transport:
            facts = gather_facts(transport, check_way=True)
        target = remote or LOCAL_TARGET
        lacking = [tool for tool in ("tmux", "rsync") if tool not in facts.tools]
        lacking += ["python3 >= 3.10"] if facts.python is None else []
        advice = [*host_advice(facts, target)]
        found = {"lacking": lacking, "advice": list(map(dataclasses.asdict, advice))}
        runs = runs_text([host_row(target, row) for row in facts.runs], width=terminal_width())
        text = f"{facts_text(target, facts, lacking)}\n\n{runs}"
        return Answer(
            {"target": target, **found, "facts": dataclasses.asdict(facts)},
            "".join([text, *(f"\n\nfor GPU runs: {problem.text()}" for problem in advice)]),
            exit_code=2 if lacking or facts.way_problems else 0,
            remarks=tuple(f"error: {problem.text()}" for problem in facts.way_problems),
        )
