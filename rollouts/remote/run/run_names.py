"""Which run a name means: a whole name, a tag, the beginning of a name, its beginning and end around `…`, or `last`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.run import registry
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.tags import tags
from rollouts.run_dir import valid_run_id
from rollouts.view.tables import ELLIPSIS

if TYPE_CHECKING:  # slow to import
    from rollouts.remote.host.facts import HostFacts

LAST = "last"  # names the run that this machine knows of most recently


def known_run(name: str) -> RunEntry:
    """Return the run of the registry that `name` means. Raises DeployError."""
    entry = registry.find(name) or find_known(name)
    if entry is None:
        raise no_run(name, "this machine", [entry.run_id for entry in registry.entries()])
    return entry


def find_known(name: str) -> RunEntry | None:
    """Return `last`, the run with that tag, or the one that begins with `name`, of those that this machine knows."""
    entries = registry.entries()
    if name == LAST:
        return entries[-1] if entries else None
    run_id = tags().get(name) or find_by_prefix(name, [entry.run_id for entry in entries])
    return next((entry for entry in entries if entry.run_id == run_id), None)


def find_on_host(name: str, facts: "HostFacts", target: str) -> str:
    """Return the id of the host's run that `name` means. Raises DeployError."""
    names = [row["run_id"] for row in facts.runs if valid_run_id(str(row["run_id"]))]
    if name in names:
        return name
    if name == LAST and names:
        return str(names[-1])
    if (tagged := tags().get(name)) in names:
        return str(tagged)
    found = find_by_prefix(name, names)
    if found is None:
        raise no_run(name, target, [*(entry.run_id for entry in registry.entries()), *names])
    return found


def find_by_prefix(name: str, run_ids: list[str]) -> str | None:
    """Return the one run id that begins with `name`, or None. Raises DeployError for several.

    `begin…end` means one that begins and ends so: a narrow `deploy ls` prints long names in this way.
    """
    begin, _, end = name.partition(ELLIPSIS)
    found = [
        run_id for run_id in run_ids if name and run_id.startswith(begin) and run_id.endswith(end)
    ]
    if len(found) > 1 and name not in found:
        raise DeployError(
            f"{name!r} begins the names of {len(found)} runs.",
            found="\n".join(found[-8:]),
            fix="write more of the name, or `last` for the newest",
        )
    return name if name in found else found[0] if found else None


def no_run(name: str, target: str, known: list[str]) -> DeployError:
    """Return the error for a name that means none of the known runs."""
    return DeployError(
        f"there is no run {name!r} on {target}.",
        found=f"runs: {', '.join(sorted(set(known))[-8:]) or 'none'}",
        fix="deploy ls shows the runs started here, deploy ls --remote T those of a host",
    )


def name_problems(run_id: str, local_dir: str | Path) -> list[Problem]:
    """Return why a new run cannot have that name here: it would mean another run, or its results have a place."""
    other = "choose another --run-id, or leave it out"
    if run_id == LAST:
        return [Problem(f"the run id {LAST!r} means the newest run.", fix=other)]
    if tagged := tags().get(run_id):
        drop = f"`deploy tag {tagged} {run_id} --remove` takes it away"
        return [Problem(f"the run id {run_id!r} is a tag of {tagged}.", fix=f"{other}; {drop}")]
    entry = registry.find(run_id)
    if entry is None and not os.path.lexists(local_dir):
        return []
    fix = f"{other}; `deploy attach {run_id}` goes on with that run"
    if entry is None:
        fix = f"{other}; or move that directory away"
    return [Problem(f"the run id {run_id!r} is in use here.", found=str(local_dir), fix=fix)]
