"""`deploy ls`: the runs that this machine knows, or those of a host; which of them, and in which order.

It reads the registry and the mirrors, and imports little: 1,000 runs are listed at once (benchmarks/deploy_ls.py).
"""

import contextlib
import fnmatch
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rollouts.remote.errors import DeployError
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.machine_end import alarm
from rollouts.remote.run import registry
from rollouts.remote.run.last_seen import last_seen, list_row, with_host
from rollouts.remote.run.run_names import known_run
from rollouts.remote.run.tags import damaged_tags, tag_run, tags, untag_run
from rollouts.run_dir import State
from rollouts.view.answer import Answer
from rollouts.view.screen import terminal_width
from rollouts.view.tables import runs_text

STATES = (*get_args(State), "not launched", "interrupted", "unknown")
SORTS = {
    "started": None,  # as they come
    "run": "run_id",
    "experiment": "experiment_name",
    "state": "state",
    "target": "target",
    "stage": "stage",
    "step": "step",
}
UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


@dataclass(frozen=True)
class Wanted:
    """Which runs `ls` shows, and in which order. Made by `read_wanted`, which checks the words."""

    states: tuple[str, ...] = ()  # empty: all
    experiment: str = "*"  # a shell's pattern
    since: float = 0.0  # seconds since the epoch
    sort: str = "started"
    tag: str | None = None  # a shell's pattern; None: tagged or not

    def may_fit(self, experiment: str, begun_at: float) -> bool:
        """Return whether a run of that experiment and age is asked for, before its files are read."""
        return fnmatch.fnmatchcase(experiment, self.experiment) and begun_at >= self.since

    def chosen(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows in a state that is asked for, in order; equal ones as they come."""
        found = [row for row in rows if not self.states or row["state"] in self.states]
        field = SORTS[self.sort]
        if field is None:
            return found
        return sorted(
            found, key=lambda row: (row[field] is not None, 0 if row[field] is None else row[field])
        )


def read_wanted(
    *,
    states: Sequence[str],
    experiment: str | None,
    since: str | None,
    sort: str,
    now: float,
    tag: str | None = None,
) -> Wanted:
    """Return what the options of `ls` ask for. Raises DeployError with every mistake."""
    named = [part.strip().replace("-", " ") for state in states for part in state.split(",")]
    if unknown := [state for state in named if state not in STATES]:
        raise DeployError(
            f"--state {unknown[0]!r}: there is no such state.",
            needed=f"one of {', '.join(STATES)}; or several: failed,died",
        )
    if sort not in SORTS:
        raise DeployError(
            f"--sort {sort!r}: runs cannot be sorted by that.", needed=f"one of {', '.join(SORTS)}"
        )
    begin = 0.0 if since is None else read_moment(since, now=now)
    return Wanted(tuple(named), experiment or "*", begin, sort, tag)


def read_moment(text: str, *, now: float, option: str = "--since") -> float:
    """Return the moment that `2d` ago was, or that a date such as 2026-11-01 began here. Raises DeployError."""
    if ago := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([mhdw])", text):
        return now - float(ago[1]) * UNITS_S[ago[2]]
    with contextlib.suppress(ValueError, OverflowError):
        return time.mktime(time.strptime(text, "%Y-%m-%d"))
    raise DeployError(
        f"{option} {text!r} is not a time.",
        needed="30m, 12h, 2d or 1w: so long ago; or a date such as 2026-11-01",
    )


def list_runs(*, remote: str | None, wanted: Wanted) -> Answer:
    """List the runs known here, as last seen (`deploy ls`); with --remote all runs on that host, as they are."""
    with as_deploy_errors():
        rows, damaged = rows_here(wanted) if remote is None else (rows_there(remote, wanted), [])
        notes = (f"note: {file} cannot be read, and is left out" for file in damaged)
        text = runs_text(rows, width=terminal_width())
        return Answer(rows, text, remarks=tuple(notes), alarm=alarm())


def rows_here(wanted: Wanted) -> tuple[list[dict[str, Any]], list[Path]]:
    """Return the runs of the registry with their `tags`, and the files of entries or tags that cannot be read."""
    entries, damaged = registry.all_entries()
    asked = [entry for entry in entries if wanted.may_fit(entry.experiment_name, entry.created_at)]
    rows = _tagged([last_seen(entry) for entry in asked], wanted)
    return wanted.chosen(rows), [*damaged, *damaged_tags()]


def row_here(run_id: str) -> dict[str, Any] | None:
    """Return one run of the registry as `rows_here` does; None where it has no entry. Raises DeployError."""
    entry = registry.find(run_id)
    return None if entry is None else _tagged([last_seen(entry)], Wanted())[0]


def _tagged(rows: Sequence[dict[str, Any]], wanted: Wanted) -> list[dict[str, Any]]:
    """Return the rows with their `tags`; those alone whose tag is asked for, where one is."""
    named: dict[str, list[str]] = {}
    for tag, run_id in sorted(tags().items()):
        named.setdefault(run_id, []).append(tag)
    tagged = [row | {"tags": named.get(row["run_id"], [])} for row in rows]
    if wanted.tag is None:
        return tagged
    return [
        row for row in tagged if any(fnmatch.fnmatchcase(tag, wanted.tag) for tag in row["tags"])
    ]


def rows_there(remote: str, wanted: Wanted) -> list[dict[str, Any]]:
    from rollouts.remote.host.facts import gather_facts
    from rollouts.remote.host.open import open_transport

    with contextlib.closing(open_transport(remote)) as transport:
        found = gather_facts(transport).runs
    asked = [row for row in found if wanted.may_fit(row["experiment_name"], row["started_at"])]
    return wanted.chosen(_tagged([host_row(remote, row) for row in asked], wanted))


def host_row(target: str, row: dict[str, Any]) -> dict[str, Any]:
    return list_row(
        target, row["experiment_name"], row["run_id"], row | {"message": with_host(row)}
    )


def tag(name: str, tag: str, *, remove: bool) -> Answer:
    """Give a run a name of the user's, or take it away (`deploy tag RUN NAME`). Raises DeployError."""
    with as_deploy_errors():
        run_id = known_run(name).run_id
        if remove:
            untag_run(run_id, tag)
        else:
            tag_run(run_id, tag, run_ids=[entry.run_id for entry in registry.entries()])
        own = [own for own, run in sorted(tags().items()) if run == run_id]
        return Answer({"run_id": run_id, "tags": own}, f"{run_id}: {', '.join(own) or 'no tag'}")
