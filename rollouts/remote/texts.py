"""What the verbs print, as text for people. Pure, but for the local time zone and the mirror's logs."""

import time
from collections.abc import Sequence
from typing import Any

from rollouts.remote.errors import DeployError
from rollouts.remote.facts import HostFacts
from rollouts.remote.plan import Plan, describe_gpu
from rollouts.remote.registry import Entry
from rollouts.remote.view import evaluation_table
from rollouts.remote.watch import Result
from rollouts.run_dir import read_status, tail_lines

LOG_TAIL_LINES = 50


def columns(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text, columns of numbers to the right; "" for no rows."""
    if not table:
        return ""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [i > 0 and all(_is_number(row[i]) for row in table[1:]) for i in range(len(widths))]
    lines = []
    for row in table:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(".", "", 1).removeprefix("-").isdigit()


def cell(name: str, value: Any) -> str:
    """A field of a run as shown in tables; times in this machine's zone."""
    if value is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value)) if name.endswith("_at") else str(value)


def runs_text(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "no runs"
    header = ["run_id", "target", "state", "stage", "step", "started_at", "exit_code"]
    heading, *lines = columns([header, *([cell(name, row[name]) for name in header] for row in rows)]).splitlines()
    reasons = [_reason(row) for row in rows]
    return "\n".join([heading, *(f"{line}{reason}" for line, reason in zip(lines, reasons, strict=True))])


def _reason(row: dict[str, Any]) -> str:
    """Why a run failed, as a line under its own; "" for one that did not."""
    message = (row.get("message") or "").partition("\n")[0]
    return f"\n  error: {message}" if row["state"] == "failed" and message else ""


def run_text(row: dict[str, Any]) -> str:
    width = max(map(len, row))
    return "\n".join(f"{name:<{width}}  {cell(name, value)}" for name, value in row.items())


def plan_text(plan: Plan) -> str:
    lines = [f"plan for {plan.run_id} on {plan.target} (nothing is touched)"]
    for number, step in enumerate(plan.steps, 1):
        lines += [f"{number:>3}. {step.what}", f"     because: {step.why}"]
    lines += [*plan.summary, *(f"warning: {warning}" for warning in plan.warnings)]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def facts_text(target: str, facts: HostFacts, lacking: Sequence[str]) -> str:
    rows = [
        ("host", f"{facts.user}@{facts.host}, {facts.system}"),
        ("home", facts.home),
        ("python", f"{facts.python} {facts.python_version}" if facts.python else "none >= 3.11"),
        *((tool, facts.versions.get(tool) or "missing") for tool in ("tmux", "rsync", "uv")),
        ("gpus", "; ".join(map(describe_gpu, facts.gpus)) or facts.gpu_problem or "none"),
        *([("driver", facts.driver)] if facts.driver else []),
        ("disk", f"{facts.disk_free_bytes / 2**30:.0f} GiB free"),
        ("ready", _readiness(facts, lacking)),
        *(("note", note) for note in facts.way_notes),
    ]
    return "\n".join([target, *(f"  {name:<7} {value}" for name, value in rows)])


def _readiness(facts: HostFacts, lacking: Sequence[str]) -> str:
    reasons = [f"{', '.join(lacking)} missing"] if lacking else []
    reasons += ["files do not get through"] if facts.way_problems else []
    return f"no: {'; '.join(reasons)}" if reasons else "yes"


def how_to_go_on(entry: Entry) -> str:
    verbs = "\n".join(f"  {verb:<7} deploy {verb} {entry.run_id}" for verb in ("attach", "stop", "pull"))
    return f"{entry.run_id} goes on, on {entry.target}.\n{verbs}"


def result_text(entry: Entry, result: Result, code: int, pull_error: DeployError | None) -> str:
    """The end of a followed run: before and after, what failed, where everything lies: what matters most stays last."""
    parts = [columns(evaluation_table(result.view.evals)), _failure_text(entry, result)]
    if pull_error is not None:
        parts.append(f"{pull_error.text()}\n  again   deploy pull {entry.run_id}")
    parts.append(f"{entry.run_id}: {result.state}, exit code {code}\nresults   {entry.local_dir}")
    return "\n\n".join(part for part in parts if part)


def _failure_text(entry: Entry, result: Result) -> str:
    """Why the run did not get done; "" when it did."""
    error = result.view.error
    if result.state == "done":
        return ""
    if error is not None:
        window, lines, message = error.get("window"), error.get("log_tail") or [], error["message"]
    elif result.state == "died":
        window, lines = "supervisor", tail_lines(entry.mirror.log("supervisor"), LOG_TAIL_LINES)
        message = "the run died: its supervisor was killed, or the host went down."
    else:
        status = read_status(entry.mirror)
        window, lines, message = None, [], status.message if status else result.state
    heading = [f"last lines of {window}:"] if lines else []
    return "\n".join([*heading, *(f"  | {line}" for line in lines[-LOG_TAIL_LINES:]), f"error: {message}"])
