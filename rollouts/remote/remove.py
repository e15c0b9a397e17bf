"""`deploy rm`: a run's directory on its host, its results here, and this machine's record of it.

All runs are looked at first; nothing is removed unless all may be. The host's part goes before the results here, and
the record last, so that a removal that was cut off can be done again.
"""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.read_answer import read_answer
from rollouts.remote.host.sending import sent_program
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.run import registry
from rollouts.remote.run.mirror_files import own_files, remove_tree
from rollouts.remote.run.mirror_note import NOTE, follower
from rollouts.remote.run.open_run import OpenRun, open_run
from rollouts.remote.run.other_hosts import remove_others
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.texts import size_text
from rollouts.run_dir.results import copies_in, only_in
from rollouts.view.answer import Answer
from rollouts.view.escape import one_line

PROGRAM = "rollouts.worker.remove_run"
LOOK_TIMEOUT_S, REMOVE_TIMEOUT_S = 300.0, 3600.0
MIRROR_MARKS = (NOTE, "config.json", "plan.json")
NAMED_MAX = 6  # results that a message lists
Confirm = Callable[[str], bool]


@dataclass(frozen=True)
class Condemned:
    """A run that may be removed, and which of its results lie where."""

    run: OpenRun
    is_registered: bool
    there: dict[str, str]
    here: dict[str, str]
    own: tuple[str, ...]  # what the user put into the mirror

    @property
    def entry(self) -> RunEntry:
        return self.run.entry

    def loss(self, *, keep_results: bool) -> str:
        """Return which results would be gone for good; "" for none."""
        entry = self.entry
        only_there = only_in(self.there, self.here)
        lost = [f"only on {entry.target}: {_names(only_there)}"] if only_there else []
        if not keep_results and self.is_registered and (self.here or self.own):
            only_here = only_in(self.here, self.there)
            lost += [f"only in {entry.local_dir}: {_names(only_here)}"] if only_here else []
            lost += [f"of your own in {entry.local_dir}: {_names(self.own)}"] if self.own else []
            both = [name for name in self.here if name not in (*only_here, *only_there)]
            lost += [f"on {entry.target} and in {entry.local_dir}: {_names(both)}"] if both else []
        return f"{entry.run_id}: {'; '.join(lost)}" if lost else ""


def remove_runs(
    names: Sequence[str],
    *,
    remote: str | None,
    keep_results: bool,
    yes: bool,
    confirm: Confirm | None,
) -> Answer:
    """Remove runs (`deploy rm RUN…`). Raises DeployError, with every reason, where one of them may not go."""
    with as_deploy_errors(), contextlib.ExitStack() as opened:
        runs, problems = {}, []
        for name in names:
            try:
                run = opened.enter_context(open_run(name, remote, adopt=False))
                runs[run.entry.run_id] = _look(run, keep_results=keep_results)
            except DeployError as error:
                problems += [*error.problems]
        if problems:
            raise DeployError.of([*problems, *_nothing_removed(len(names))])
        lost = [text for run in runs.values() if (text := run.loss(keep_results=keep_results))]
        _agree(lost, yes=yes, confirm=confirm)
        rows = [_remove(run, keep_results=keep_results) for run in runs.values()]
        return Answer(rows, "\n".join(map(_row_text, rows)))


def _nothing_removed(count: int) -> list[Problem]:
    return (
        [Problem("so none of these runs was removed.", fix="leave out those that may not go")]
        if count > 1
        else []
    )


def _agree(lost: Sequence[str], *, yes: bool, confirm: Confirm | None) -> None:
    """Raise DeployError unless the user wants results to be gone for good."""
    if not lost or yes:
        return
    if confirm is not None:
        if confirm(
            "files that would be gone for good:\n"
            + "\n".join(map(one_line, lost))
            + "\nRemove them?"
        ):
            return
        raise DeployError("nothing was removed.")
    raise DeployError(
        "files would be gone for good.",
        found="\n".join(lost),
        fix="--yes removes them; `deploy pull RUN`, then --keep-results leaves what lies here",
    )


def _look(run: OpenRun, *, keep_results: bool) -> Condemned:
    """Return what a run holds. Raises DeployError where it may not be removed."""
    entry = run.entry
    run.progress.reached = (
        "nothing"  # errors of this verb are of a removal: they say all themselves
    )
    is_registered = registry.find(entry.run_id) is not None
    row = run.row
    if row is not None and (row["live"] or row["state"] == "silent"):
        raise DeployError(
            f"{entry.run_id} is {row['state']} on {entry.target}, and stays.",
            fix=f"deploy stop {entry.run_id}, then remove it",
        )
    if pid := follower(entry.mirror):
        raise DeployError(
            f"{entry.run_id} is followed by process {pid} of this machine.",
            fix="let it end, or end it with Ctrl-C",
        )
    if is_registered and not keep_results and (reason := why_not_a_mirror(entry)):
        raise DeployError(
            f"{entry.local_dir} is not removed: {reason}.",
            needed=f"the results of {entry.run_id}, as deploy puts them there",
            fix=f"--keep-results leaves that directory; `deploy forget {entry.run_id}` drops the record alone",
        )
    there = {}
    if run.facts.run_exists:
        argv, program = sent_program(run.python, PROGRAM, "look", entry.run_path)
        done = run.transport.run(argv, stdin=program, timeout_s=LOOK_TIMEOUT_S)
        answer = read_answer(
            entry.target, f"what {entry.run_path} holds", done.out, {"results": dict[str, str]}
        )
        there = dict(answer["results"])
    here = copies_in(entry.mirror) if is_registered else {}
    own = own_files(entry.mirror.path) if is_registered else ()
    return Condemned(run, is_registered, there, here, own)


def why_not_a_mirror(entry: RunEntry) -> str:
    """Return why a registered run's directory here is not removed; "" where it may be, or is gone."""
    path = Path(entry.local_dir)
    if not os.path.lexists(path):
        return ""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return "it is a link, or another user's"
    if (path.name, path.parent.name) != (entry.run_id, entry.experiment_name):
        return "it does not have the run's name"
    if (path / ".git").exists() or not any((path / name).is_file() for name in MIRROR_MARKS):
        return f"it has none of {', '.join(MIRROR_MARKS)}, or is a repository"
    real = os.path.realpath(path)
    for other in registry.entries():
        for place in (other.local_dir, other.run_path if other.target == LOCAL_TARGET else ""):
            is_other = other.run_id != entry.run_id or place == other.run_path
            if place and is_other and Path(os.path.realpath(place)).is_relative_to(real):
                return f"files of the run {other.run_id} lie in it"
    return ""


def _remove(condemned: Condemned, *, keep_results: bool) -> dict[str, Any]:
    """Remove one run. Raises DeployError where its host refuses: then nothing of it is removed here."""
    run, entry = condemned.run, condemned.entry
    size, note = 0, ""
    if run.facts.run_exists:
        places = [entry.local_dir] if entry.target == LOCAL_TARGET and not keep_results else []
        argv, program = sent_program(
            run.python, PROGRAM, "remove", entry.run_path, json.dumps(places)
        )
        done = run.transport.run(argv, stdin=program, timeout_s=REMOVE_TIMEOUT_S)
        fields = {"removed": bool, "reason": str, "bytes": int}
        answer = read_answer(entry.target, f"the removal of {entry.run_path}", done.out, fields)
        size, note = answer["bytes"], answer["reason"]
        if not answer["removed"]:
            raise DeployError(f"{entry.run_id} on {entry.target} was not removed: {note}.")
    note = "; ".join(filter(None, (note, *remove_others(entry))))
    removed_here = False
    if condemned.is_registered:
        path = Path(entry.local_dir)
        if not keep_results and os.path.lexists(path):
            aside = path.with_name(f".{path.name}.removed-{secrets.token_hex(4)}")
            path.rename(aside)
            remove_tree(aside)
            removed_here = True
        registry.forget(entry)
    return {
        "run_id": entry.run_id,
        "target": entry.target,
        "bytes": size,
        "removed_here": removed_here,
        "local_dir": entry.local_dir,
        "note": note,
    }


def _row_text(row: dict[str, Any]) -> str:
    here = (
        "its results here and its record"
        if row["removed_here"]
        else f"its record; {row['local_dir']} stays"
    )
    if not row["removed_here"] and not os.path.lexists(row["local_dir"]):
        here = "its record"
    note = f"\n  note: {one_line(row['note'])}" if row["note"] else ""
    return f"{row['run_id']} is removed: {size_text(row['bytes'])} on {one_line(row['target'])}, {here}{note}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return f"{', '.join(names[:NAMED_MAX])}{more}"
