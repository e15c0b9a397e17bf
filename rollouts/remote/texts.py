"""What the verbs print, as text for people. Pure, but for the local time zone and the mirror's logs."""

import shlex
from collections.abc import Iterator, Sequence

from rollouts.machine.nvidia_smi import describe_gpu
from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.plan import Plan
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.watch import RunResult
from rollouts.run_dir import FINAL_STATES, Status, read_status, tail_lines
from rollouts.view.answer import Answer
from rollouts.view.escape import escaped, one_line
from rollouts.view.fold import evaluation_table
from rollouts.view.tables import cause, columns, cut_text

LOG_TAIL_LINES = 50
LINE_CHARS_MAX = 1000


def size_text(size: float) -> str:
    """Return bytes for people: `1.5 GiB`."""
    for unit, limit in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size:.0f} bytes"


def plan_text(plan: Plan) -> str:
    lines = [f"plan for {plan.run_id} on {plan.target} (nothing is touched)"]
    for number, step in enumerate(plan.steps, 1):
        lines += [f"{number:>3}. {step.what}", f"     because: {step.why}"]
    lines += [*plan.summary, *plan.memory, *(f"warning: {warning}" for warning in plan.warnings)]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def facts_text(target: str, facts: HostFacts, lacking: Sequence[str]) -> str:
    rows = [
        *fact_rows(facts),
        ("disk", f"{facts.disk_free_bytes / 2**30:.0f} GiB free"),
        ("ready", _readiness(facts, lacking)),
        *(("note", note) for note in facts.way_notes),
    ]
    return "\n".join([target, *(f"  {name:<7} {value}" for name, value in rows)])


def fact_rows(facts: HostFacts) -> Iterator[tuple[str, str]]:
    """Return what a host is and has, name by name."""
    yield "host", f"{facts.user}@{facts.host}, {facts.system}"
    yield "home", facts.home
    yield "python", f"{facts.python} {facts.python_version}" if facts.python else "none >= 3.10"
    for tool in ("tmux", "rsync", "uv"):  # git is not needed there
        yield tool, facts.versions.get(tool) or "missing"
    yield "gpus", "; ".join(map(describe_gpu, facts.gpus)) or facts.gpu_problem or "none"
    if facts.driver:
        yield "driver", facts.driver
    if facts.gpus:
        yield from _cuda_rows(facts)


def _cuda_rows(facts: HostFacts) -> Iterator[tuple[str, str]]:
    """Return what GPU programs need of the host beside its cards."""
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


def how_to_go_on(entry: RunEntry) -> str:
    """Say what a run does that is not followed any more, and how to get back to it."""
    verbs = "\n".join(
        f"  {verb:<7} deploy {verb} {entry.run_id}" for verb in ("attach", "stop", "pull")
    )
    target = one_line(entry.target)
    doing = f"goes on, on {target}."
    status = _seen_status(entry)
    if status is not None and status.state == "queued":
        doing = f"stays queued on {target}: {one_line(status.message)}."
    elif status is None and _is_queued(entry):
        doing = f"is in the queue of {target}, and starts when its turn comes."
    return f"{entry.run_id} {doing}\n{verbs}"


def _seen_status(entry: RunEntry) -> Status | None:
    try:
        return read_status(entry.mirror)
    except (ValueError, TypeError, OSError):
        return None


def _is_queued(entry: RunEntry) -> bool:
    """Return whether it was launched from here to wait for its turn, or for Slurm's."""
    try:
        launch = entry.launch
        return launch.queue is not None or launch.slurm is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def forgotten_text(entry: RunEntry, state: str) -> str:
    """Say what is left of a run that this machine has no record of any more, and how to find one that goes on."""
    lines = [
        f"{entry.run_id} is forgotten here.",
        f"kept: {entry.run_path} on {one_line(entry.target)}, {entry.local_dir} here",
    ]
    if state not in (*FINAL_STATES, "not launched", "unknown"):
        remote = "" if entry.target == LOCAL_TARGET else f" --remote {shlex.quote(entry.target)}"
        verbs = " or ".join(
            f"`deploy {verb} {entry.run_id}{remote}`" for verb in ("attach", "stop")
        )
        lines.append(f"warning: it was {one_line(state)} when last seen, and goes on: {verbs}")
    return "\n".join(lines)


def stopped_without_host(entry: RunEntry, entries: Sequence[RunEntry]) -> Answer:
    """Return what a stop says of a run whose rented machine is gone, and of the runs that went on in its place."""
    goes_on = [
        f"deploy stop {other.run_id}"
        for other in entries
        if (other.resumed_from or {}).get("run_id") == entry.run_id
    ]
    document = {
        "run_id": entry.run_id,
        "state": "interrupted",
        "exit_code": None,
        "checkpoint": None,
    }
    text = f"{entry.run_id}: interrupted, its machine is gone; it does not go on by itself"
    text += "".join(f"\na run went on from it   {command}" for command in goes_on)
    return Answer(document, text)


def end_answer(
    entry: RunEntry, result: RunResult, pull_error: DeployError | None, notes: Sequence[str]
) -> Answer:
    """Return the end of a followed run, with the job's exit code; 1 where its results could not be pulled."""
    code = result.exit_code if result.exit_code is not None else 1
    if pull_error is not None and code == 0:
        code = 1
    document = {
        "type": "result",
        "run_id": entry.run_id,
        "state": result.state,
        "exit_code": code,
        "message": failure_message(entry, result) or None,
        "local_dir": entry.local_dir,
        "evaluations": list(result.view.evals),
        "error": result.view.error,
        "warnings": list(result.view.warnings),
        "notes": list(notes),
        "pull_error": str(pull_error) if pull_error else None,
    }
    return Answer(document, result_text(entry, result, code, pull_error, notes), exit_code=code)


def result_text(
    entry: RunEntry,
    result: RunResult,
    code: int,
    pull_error: DeployError | None,
    notes: Sequence[str],
) -> str:
    """Return the end of a followed run: before and after, where everything lies, and last of all what failed."""
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


def failure_message(entry: RunEntry, result: RunResult) -> str:
    """Return why the run did not succeed; "" if it did."""
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
    status = _seen_status(entry)
    return str(status.message) if status else result.state


def _log_text(entry: RunEntry, result: RunResult) -> str:
    """Return the last lines of the window that failed."""
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
