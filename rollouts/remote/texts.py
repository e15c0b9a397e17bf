"""What the verbs print, as text for people. Pure, but for the local time zone and the mirror's logs."""

import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.gpus import describe_gpu
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.plan import Plan
from rollouts.remote.run.registry import Entry
from rollouts.remote.run.watch import Result
from rollouts.run_dir import FINAL_STATES, read_status, tail_lines
from rollouts.view.escape import escaped, one_line
from rollouts.view.fold import evaluation_table

LOG_TAIL_LINES = 50
LINE_CHARS_MAX = 1000
MESSAGE_CHARS_MAX = 1200  # 15 lines of 80 columns


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
    if name.endswith("_at") and isinstance(value, int | float):
        try:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
        except (ValueError, OverflowError, OSError):
            return one_line(value)
    return one_line(value)


def runs_text(rows: Sequence[dict[str, Any]], *, width: int | None = None) -> str:
    """A table, and under it why runs failed or were not launched, or on which other machine they are.

    Where its lines are wider than `width` (None: no matter), a run's name has a line of its own, and the rest follows.
    """
    if not rows:
        return "no runs"
    header = ["run_id", "target", "state", "stage", "step", "started_at", "exit_code"]
    cells = [header, *([cell(name, row[name]) for name in header] for row in rows)]
    heading, *lines = columns(cells).splitlines()
    if width is not None and max(map(len, (heading, *lines))) > width:
        rest = columns([line[1:] for line in cells]).splitlines()
        heading, *lines = [f"{line[0]}\n  {more}" for line, more in zip(cells, rest, strict=True)]
    return "\n".join([heading, *(f"{line}{_reason(row)}" for line, row in zip(lines, rows, strict=True))])


def _reason(row: dict[str, Any]) -> str:
    """Why a run failed or was not launched, or where it is, as a line under its own; "" for any other."""
    message = row.get("message") or ""
    if row["state"] in ("failed", "died", "not launched") and message:
        return f"\n  error: {one_line(message)}"
    return f"\n  note: {one_line(message)}" if row.get("host") and row["state"] not in FINAL_STATES else ""


def run_text(row: dict[str, Any]) -> str:
    """A line a field, the message last: that is what one looks for."""
    width = max(map(len, row))
    names = sorted(row, key=lambda name: name == "message")
    return "\n".join(f"{name:<{width}}  {cell(name, row[name])}" for name in names)


def plan_text(plan: Plan) -> str:
    lines = [f"plan for {plan.run_id} on {plan.target} (nothing is touched)"]
    for number, step in enumerate(plan.steps, 1):
        lines += [f"{number:>3}. {step.what}", f"     because: {step.why}"]
    lines += [*plan.summary, *plan.memory, *(f"warning: {warning}" for warning in plan.warnings)]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def facts_text(target: str, facts: HostFacts, lacking: Sequence[str]) -> str:
    rows = [
        ("host", f"{facts.user}@{facts.host}, {facts.system}"),
        ("home", facts.home),
        ("python", f"{facts.python} {facts.python_version}" if facts.python else "none >= 3.10"),
        *((tool, facts.versions.get(tool) or "missing") for tool in ("tmux", "rsync", "uv")),
        ("gpus", "; ".join(map(describe_gpu, facts.gpus)) or facts.gpu_problem or "none"),
        *([("driver", facts.driver)] if facts.driver else []),
        *(_cuda_rows(facts) if facts.gpus else ()),
        ("disk", f"{facts.disk_free_bytes / 2**30:.0f} GiB free"),
        ("ready", _readiness(facts, lacking)),
        *(("note", note) for note in facts.way_notes),
    ]
    return "\n".join([target, *(f"  {name:<7} {value}" for name, value in rows)])


def _cuda_rows(facts: HostFacts) -> Iterator[tuple[str, str]]:
    """What GPU programs need of the host beside its cards."""
    cuda, headers = facts.cuda, facts.python_headers
    yield "libc", f"{cuda.libc or 'not known'}, {cuda.machine}"
    if cuda.shm_total_mib is not None:
        yield "shm", f"/dev/shm: {cuda.shm_free_mib} of {cuda.shm_total_mib} MiB free"
    if cuda.compilers is not None:
        yield "compile", ", ".join(cuda.compilers) or "no C++ compiler"
    if headers is not None:
        yield "headers", f"Python.h beside {', '.join(headers)}" if headers else "no Python.h"
    if cuda.visible_devices is not None:
        yield "visible", f"CUDA_VISIBLE_DEVICES={cuda.visible_devices!r} is set there"
    for name, value in cuda.allocator:
        yield "memory", f"{name}={value!r} is set there"
    if cuda.mps:
        yield "mps", "an MPS server shares the cards"


def _readiness(facts: HostFacts, lacking: Sequence[str]) -> str:
    reasons = [f"{', '.join(lacking)} missing"] if lacking else []
    reasons += ["files do not get through"] if facts.way_problems else []
    return f"no: {'; '.join(reasons)}" if reasons else "yes"


def how_to_go_on(entry: Entry) -> str:
    verbs = "\n".join(f"  {verb:<7} deploy {verb} {entry.run_id}" for verb in ("attach", "stop", "pull"))
    return f"{entry.run_id} goes on, on {one_line(entry.target)}.\n{verbs}"


def forgotten_text(entry: Entry, state: str) -> str:
    """What is left of a run that this machine has no record of any more; how to find one that goes on."""
    lines = [
        f"{entry.run_id} is forgotten here.",
        f"kept: {entry.run_path} on {one_line(entry.target)}, {entry.local_dir} here",
    ]
    if state not in (*FINAL_STATES, "not launched", "unknown"):
        remote = "" if entry.target == LOCAL_TARGET else f" --remote {shlex.quote(entry.target)}"
        verbs = " or ".join(f"`deploy {verb} {entry.run_id}{remote}`" for verb in ("attach", "stop"))
        lines.append(f"warning: it was {one_line(state)} when last seen, and goes on: {verbs}")
    return "\n".join(lines)


def result_text(entry: Entry, result: Result, code: int, pull_error: DeployError | None, notes: Sequence[str]) -> str:
    """The end of a followed run: before and after, where everything lies, and last of all what failed."""
    parts = [
        _log_text(entry, result),
        columns(evaluation_table(result.view.evals)),
        "\n".join(f"note: {escaped(note)}" for note in notes),
        "\n".join(f"warning: {one_line(text)}" for text in result.view.warnings),
    ]
    if pull_error is not None:
        parts.append(f"{pull_error.text(launching=False)}\n  again   deploy pull {entry.run_id}")
    end = f"{entry.run_id}: {one_line(result.state)}, exit code {code}\nresults   {entry.local_dir}"
    failure = failure_message(entry, result)
    parts.append("\n".join(filter(None, (end, failure and f"error: {cut_text(failure)}"))))
    return "\n\n".join(part for part in parts if part)


def failure_message(entry: Entry, result: Result) -> str:
    """Why the run did not get done; "" when it did."""
    if result.state == "done":
        return ""
    if result.view.error is not None:
        return cause(result.view.error)
    if result.state == "died":
        return "the run died: its supervisor was killed, or the host went down."
    if result.state == "silent":
        return (
            f"the run is on another machine with {entry.target}'s files, and nothing was heard of it for minutes."
            f" Whether it lives is known there alone: `deploy status {entry.run_id} --remote {entry.target}` names it."
        )
    try:
        status = read_status(entry.mirror)
    except (ValueError, TypeError, OSError):
        status = None
    return str(status.message) if status else result.state


def cause(error: dict[str, Any]) -> str:
    """An error event's message; with the process's own `error:` line where the message lacks it."""
    message, lines = str(error.get("message")), error.get("log_tail")
    said = [str(line) for line in lines if str(line).startswith("error: ")] if isinstance(lines, list) else []
    own = said[-1].removeprefix("error: ").strip() if said else ""
    return message if not own or own in message else f"{message}: {own}"


def cut_text(text: str) -> str:
    """Escaped, and no more of it than a small screen holds."""
    shown = escaped(text).strip()
    return shown if len(shown) <= MESSAGE_CHARS_MAX else f"{shown[:MESSAGE_CHARS_MAX]}… (all of it: events.jsonl)"


def _log_text(entry: Entry, result: Result) -> str:
    """The last lines of the window that failed."""
    error = result.view.error
    window: object = None
    lines: object = []
    if result.state == "done":
        return ""
    if error is not None:
        window, lines = error.get("window"), error.get("log_tail")
    elif result.state == "died":
        window, lines = "supervisor", tail_lines(entry.mirror.log("supervisor"), LOG_TAIL_LINES)
    if not isinstance(lines, list) or not lines:
        return ""
    shown = [f"  | {one_line(line, limit=LINE_CHARS_MAX)}" for line in lines[-LOG_TAIL_LINES:]]
    return "\n".join([f"last lines of {one_line(window)}:", *shown])
