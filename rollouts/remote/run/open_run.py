"""Finding a run by its name, and what is known of it: here, on its host, both, or neither.

A run that is not on its host is not one that is yet to come: what lies here tells "never launched" from "gone".
"""

import contextlib
import dataclasses
import json
import math
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError
from rollouts.remote.host.facts import HostFacts, gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.transport import LOCAL_TARGET, Transport
from rollouts.remote.local_faults import Standing, standing
from rollouts.remote.repository import find_repository
from rollouts.remote.run import registry
from rollouts.remote.run.mirror_files import make_mirror, replace, size_of
from rollouts.remote.run.registry import Entry
from rollouts.run_dir import EXPERIMENT_NAME_PATTERN, FINAL_STATES, RunDir, valid_run_id

LAST = "last"  # names the run that this machine knows of most recently
ADOPTED_DIR = "runs"  # where mirrors of runs that were started elsewhere lie, under the working directory
CONFIG_BYTES_MAX = 1 << 20
NOTE = "mirror.json"
Trace = Literal["on its host", "being launched", "unreadable", "gone", "never launched"]


@dataclass(frozen=True)
class OpenRun:
    """A run, its host as it is now, and what was found there."""

    entry: Entry
    facts: HostFacts
    transport: Transport
    row: dict[str, Any] | None  # host_probe.run_row
    trace: Trace
    now: Standing

    @property
    def python(self) -> str:
        """The host's interpreter. Raises DeployError where it has none any more."""
        if self.facts.python is None:
            raise DeployError(
                "the host has no Python 3.10 or newer any more.",
                found=", ".join(self.facts.pythons_seen),
                started=True,
            )
        return self.facts.python

    def missing(self) -> DeployError:
        """What there is to say of a run without files on its host."""
        entry = self.entry
        if self.trace == "gone":
            config = shlex.quote(f"{entry.local_dir}/config.json")
            again = f"to train again: deploy {config}"
            if entry.adopted:  # that config came from the host
                again = f"to train again: read {config}, and deploy a copy of it"
            return DeployError(
                f"{entry.run_id} was launched once, and its directory is gone from {entry.target}.",
                found=f"nothing at {entry.run_path}; what was pulled is in {entry.local_dir}",
                fix=f"{again} (--remote …); `deploy forget {entry.run_id}` drops the entry",
            )
        return DeployError(
            f"{entry.run_id} was never launched on {entry.target}.",
            found=entry.reason,
            fix=f"deploy attach {entry.run_id} launches it; `deploy forget {entry.run_id}` drops it",
        )


@contextlib.contextmanager
def open_run(
    name: str, remote: str | None, *, adopt: bool = True, needs_files: bool = False, accept_new_host_key: bool = False
) -> Iterator[OpenRun]:
    """A run by name, and its host: from the registry, or, started elsewhere, from the host that --remote names.

    `adopt`: register one that was started elsewhere. `needs_files`: raise DeployError for one without files there.
    """
    with standing() as now:
        entry = registry.find(name) or (None if remote else _known(name))
        target = remote or (entry.target if entry else LOCAL_TARGET)
        if entry is not None:
            now.run_id, now.target = entry.run_id, target
        with contextlib.closing(open_transport(target, accept_new_host_key=accept_new_host_key)) as transport:
            facts = gather_facts(transport, run_id=entry.run_id if entry else name)
            if entry is None:
                run_id = _on_host(name, facts, target)
                entry = registry.find(run_id)
            run_id = entry.run_id if entry else run_id
            row = facts.run(run_id)
            if entry is None or (entry.target != target and row is None):
                entry = _adopt(run_id, target, facts, transport, keep=adopt)  # started elsewhere
            entry = dataclasses.replace(entry, target=target)  # one host may have several names
            _check_ours(entry, row)
            trace = _trace(entry, facts, transport, row)
            now.run_id, now.target = run_id, target
            if row is not None and trace == "on its host":
                now.reached = "ended" if row["state"] in FINAL_STATES else "launched"
            opened = OpenRun(entry, facts, transport, row, trace, now)
            if needs_files and trace in ("gone", "never launched"):
                raise opened.missing()
            yield opened


def _check_ours(entry: Entry, row: dict[str, Any] | None) -> None:
    """Raise DeployError for another deploy's run of the same name: no verb of this one's may act on it."""
    theirs = row.get("launch_id") if row else None
    if entry.adopted or not entry.launch_id or theirs in (None, entry.launch_id):
        return
    raise DeployError(
        f"the run {entry.run_id} on {entry.target} is not the one of this machine: another deploy had the name first.",
        found=f"{entry.run_path}, started by another deploy",
        fix=f"deploy forget {entry.run_id}; then deploy again with another --run-id, or `deploy attach {entry.run_id}"
        f" --remote {shlex.quote(entry.target)}` follows the other one",
    )


def _trace(entry: Entry, facts: HostFacts, transport: Transport, row: dict[str, Any] | None) -> Trace:
    if row is not None:
        under_way = not row["launched"] and row["state"] not in FINAL_STATES
        return "being launched" if under_way and not entry.was_launched else "on its host"
    if facts.run_exists:
        listed = transport.run(["ls", "-a", entry.run_path], timeout_s=30)
        marks = {"status.json", "supervisor.lock", "events.jsonl", "metrics.jsonl", "exit", "checkpoints"}
        if listed.returncode != 0 or marks & set(listed.out.splitlines()):
            return "unreadable"
    return "gone" if was_launched(entry) else "never launched"


def was_launched(entry: Entry) -> bool:
    """Does anything here show that the run was alive once?"""
    streamed = ("status.json", "events.jsonl", "metrics.jsonl", "eval.jsonl")
    here = entry.mirror.path
    return entry.adopted or entry.was_launched or (here.is_dir() and any(size_of(here, name) for name in streamed))


# --- names ----------------------------------------------------------------------------------------------------------


def known(name: str) -> Entry:
    """The run of the registry that `name` means. Raises DeployError."""
    entry = registry.find(name) or _known(name)
    if entry is None:
        raise _no_run(name, "this machine", [entry.run_id for entry in registry.entries()])
    return entry


def _known(name: str) -> Entry | None:
    """`last`, or the one run that begins with `name`, among those that this machine knows."""
    entries = registry.entries()
    if name == LAST:
        return entries[-1] if entries else None
    run_id = _by_prefix(name, [entry.run_id for entry in entries])
    return next((entry for entry in entries if entry.run_id == run_id), None)


def _on_host(name: str, facts: HostFacts, target: str) -> str:
    """The same among the host's runs. Raises DeployError for none."""
    names = [row["run_id"] for row in facts.runs if valid_run_id(str(row["run_id"]))]
    if name in names:
        return name
    if name == LAST and names:
        return str(names[-1])
    found = _by_prefix(name, names)
    if found is None:
        raise _no_run(name, target, [*(entry.run_id for entry in registry.entries()), *names])
    return found


def _by_prefix(name: str, run_ids: list[str]) -> str | None:
    """Raises DeployError where several begin so."""
    found = [run_id for run_id in run_ids if name and run_id.startswith(name)]
    if len(found) > 1 and name not in found:
        raise DeployError(
            f"{name!r} begins the names of {len(found)} runs.",
            found="\n".join(found[-8:]),
            fix="write more of the name, or `last` for the newest",
        )
    return name if name in found else found[0] if found else None


def _no_run(name: str, target: str, known: list[str]) -> DeployError:
    return DeployError(
        f"there is no run {name!r} on {target}.",
        found=f"runs: {', '.join(sorted(set(known))[-8:]) or 'none'}",
        fix="deploy ls shows the runs started here, deploy ls --remote T those of a host",
    )


# --- runs that were started elsewhere -------------------------------------------------------------------------------


def _adopt(run_id: str, target: str, facts: HostFacts, transport: Transport, *, keep: bool) -> Entry:
    """An entry for a run that another machine started; registered, with a mirror, if it is to be kept.

    Only its name and its experiment's come from the host, checked; where the mirror lies is decided here.
    """
    row = facts.run(run_id)
    if row is None:
        raise _no_run(run_id, target, [*(e.run_id for e in registry.entries()), *(r["run_id"] for r in facts.runs)])
    experiment = str(row["experiment_name"])
    if not valid_run_id(run_id) or not re.fullmatch(EXPERIMENT_NAME_PATTERN, experiment):
        raise DeployError(
            f"{target} names a run {run_id[:100]!r} of an experiment {experiment[:100]!r}.",
            needed="names of letters, digits, '-' and '_'",
            fix="a run that `deploy` started has such names; look at that host",
        )
    root = _here()
    started_at = row.get("started_at")
    entry = Entry(
        run_id=run_id,
        experiment_name=experiment,
        target=target,
        home=facts.home,
        run_path=f"{facts.home}/runs/{run_id}",
        local_dir=str(root / ADOPTED_DIR / experiment / run_id),
        repository=str(root),
        created_at=float(started_at) if isinstance(started_at, int | float) and math.isfinite(started_at) else 0.0,
        adopted=True,
    )
    if keep:
        write_note(entry, now=time.time(), followed_by=None)  # before anything of the host's is there
        _copy_descriptions(entry, transport)
        registry.save(entry)
    return entry


def _here() -> Path:
    try:
        return find_repository(Path.cwd())
    except DeployError:
        return Path.cwd()


def _copy_descriptions(entry: Entry, transport: Transport) -> None:
    """The host's config.json and plan.json, to be read by people: nothing is launched from them."""
    for name in ("config.json", "plan.json"):
        file = f"{entry.run_path}/{name}"
        done = transport.run(["head", "-c", str(CONFIG_BYTES_MAX + 1), file], timeout_s=30)
        if done.returncode != 0 or len(done.stdout) > CONFIG_BYTES_MAX:
            continue
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(done.stdout)
            replace(entry.mirror.path, name, json.dumps(data, indent=1).encode() + b"\n")


# --- the note in a mirror -------------------------------------------------------------------------------------------


def write_note(entry: Entry, *, now: float, followed_by: int | None, complete: bool = False) -> None:
    """`mirror.json`: is what lies here followed, whole, or as old as when somebody last looked?"""
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
    """The note of a mirror; {} where there is none."""
    try:
        note = json.loads(read_plain(run.path / NOTE))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
