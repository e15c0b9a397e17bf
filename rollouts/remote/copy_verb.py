"""`deploy cp RUN:PATH… DEST`: files of a run to any place here; from its host, or what was pulled of them where that
cannot give them any more. `deploy cp RUN:PATH` lists them.
"""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.host.read_answer import checked, read_answer
from rollouts.remote.host.sending import sent_program
from rollouts.remote.local_faults import FULL, Interrupted, as_deploy_errors, os_problem
from rollouts.remote.run import registry
from rollouts.remote.run.connection import RunConnection
from rollouts.remote.run.copy_files import WantedFiles, bring
from rollouts.remote.run.open_run import open_run
from rollouts.remote.run.other_hosts import on_host
from rollouts.remote.run.run_names import find_known
from rollouts.remote.texts import size_text
from rollouts.view.answer import Answer
from rollouts.view.escape import one_line
from rollouts.view.screen import Screen
from rollouts.view.tables import columns

PROGRAM = "rollouts.worker.look_at_files"
LOOK_TIMEOUT_S = 300.0
FOUND = {
    "name": str,
    "kind": str,
    "real": str,
    "bytes": int,
    "near": str,
    "entries": list[Any],
    "count": int,
}
ENTRY = {"name": str, "bytes": int}
NEAR_MAX = 12  # names that a message lists
SOURCE = re.compile(r"(?P<run>[^@:/]+)(?:@(?P<host>[^:/]+))?:(?P<path>.*)", re.DOTALL)
HOW = "deploy cp RUN:PATH… DEST; PATH is relative to the run's directory"


def option(remote: str | None) -> str:
    """Return what a command is to say of the host that this one was told."""
    return f" --remote {shlex.quote(remote)}" if remote else ""


@dataclass(frozen=True)
class Source:
    """RUN[@HOST]:PATH, taken apart."""

    run: str
    host: str
    path: str  # "." for all

    @property
    def of_run(self) -> str:
        """Return RUN or RUN@HOST."""
        return f"{self.run}@{self.host}" if self.host else self.run

    @property
    def name(self) -> str:
        """Return what it is called in a directory; "" for the whole run."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class FilesFrom:
    """Where files of a run are copied from: its host, or `why` not and so its mirror."""

    connection: RunConnection
    path: str
    why: str = ""


def copy(words: Sequence[str], screen: Screen, *, remote: str | None, force: bool) -> Answer:
    """Copy files of runs here (`deploy cp`); of one word, list what is there. Raises DeployError."""
    with as_deploy_errors():
        sources, to = read_words(words, remote)
        if to is None:
            return _list(sources[0], remote)
        rows = _copy(sources, to, screen, remote, force)
        text = "\n".join(_row_text(row) for row in rows)
        notes = [f"note: {note}" for row in rows for note in row["notes"]]
        return Answer(rows, text, remarks=tuple(dict.fromkeys(notes)))


def read_words(words: Sequence[str], remote: str | None) -> tuple[list[Source], Path | None]:
    """Return the sources, and the place here; None for one source alone. Raises DeployError."""
    *sources, last = words
    if not sources:
        return [_source(last, remote)], None
    if SOURCE.fullmatch(last):
        raise DeployError(
            f"{last!r} is a place in a run, and files are copied from runs to this machine alone.",
            needed=HOW,
            fix=f"a file of such a name here is ./{last}; into a run: deploy ssh RUN -- sh -c 'cat > FILE' < FILE",
        )
    if not last:
        raise DeployError(
            "the place here has an empty name.", fix="`.` is the directory you are in"
        )
    to = Path(last).expanduser()
    if last.endswith("/") and not to.is_dir():
        raise DeployError(f"{last} is not a directory.", fix=f"mkdir -p {shlex.quote(last)}")
    return [_source(word, remote) for word in sources], to


def _source(word: str, remote: str | None) -> Source:
    match = SOURCE.fullmatch(word)
    if match is None:
        raise DeployError(
            f"{word!r} does not say of which run.", needed=HOW, fix="deploy ls shows the runs"
        )
    path = match["path"] or "."
    source = Source(match["run"], match["host"] or "", str(PurePosixPath(path)))
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise DeployError(
            f"{word!r} leads out of the run's directory.",
            needed=HOW,
            fix=f"deploy cp {source.of_run}:{option(remote)} lists what is in it",
        )
    return source


def _places_for(sources: Sequence[Source], to: Path) -> dict[Source, Path]:
    """Return where each source goes; a whole run to its name as it was typed. Raises DeployError."""
    if to.is_dir():
        base = Path(os.path.realpath(to))
        names = [source.name or source.run for source in sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DeployError(
                f"two of the sources would both be {base / twice[0]}.",
                fix="copy them one after another, each with a name of its own",
            )
        return dict(zip(sources, (base / name for name in names), strict=True))
    if len(sources) > 1:
        raise DeployError(
            f"{to} is not a directory.", needed="one that is there, for several sources"
        )
    place = Path(os.path.realpath(to))
    if not place.parent.is_dir():
        parent = place.parent if to.is_symlink() else to.parent
        raise DeployError(
            f"{parent} is not a directory.", fix=f"mkdir -p {shlex.quote(str(parent))}"
        )
    return {sources[0]: place}


def _by_run(sources: Sequence[Source]) -> Iterator[list[Source]]:
    for key in dict.fromkeys((source.run, source.host) for source in sources):
        yield [source for source in sources if (source.run, source.host) == key]


def _copy(
    sources: list[Source], to: Path, screen: Screen, remote: str | None, force: bool
) -> list[dict[str, Any]]:
    """Copy them. Raises DeployError; before anything is copied, for those that are not there."""
    places, into = _places_for(sources, to), to.is_dir()
    with contextlib.ExitStack() as stack:
        found: dict[Source, tuple[FilesFrom, dict[str, Any]]] = {}
        problems: list[Problem] = []
        for group in _by_run(sources):
            there, missing = _find(group, remote, stack)
            found, problems = {**found, **there}, [*problems, *missing]
        if problems:
            raise DeployError.of(problems)
        for source, (place, _) in found.items():
            if into and not source.name:  # `last:` is called after its run
                places[source] = places[source].with_name(place.connection.entry.run_id)
        return [
            _bring(source, place, row, places[source], screen, force=force)
            for source, (place, row) in found.items()
        ]


def _bring(
    source: Source, place: FilesFrom, row: dict[str, Any], to: Path, screen: Screen, *, force: bool
) -> dict[str, Any]:
    root, name = _split(row["root"], row["real"])
    entry = place.connection.entry
    what = f"{entry.run_id}:{source.path}"
    if row["kind"] == "special":
        raise DeployError(f"{what} is neither a file nor a directory.")
    is_here = isinstance(place.connection.transport, LocalTransport)
    if is_here and row["kind"] == "directory" and to.is_relative_to(row["real"]):
        raise DeployError(f"{to} is in {what} itself.", fix="name a place outside of it")
    wanted = WantedFiles(root, name, to, source.path)
    progress = _progress(wanted.label) if sys.stderr.isatty() and not screen.as_json else None
    try:
        brought = bring(wanted, place.connection, force=force, say=screen.say, on_progress=progress)
    except KeyboardInterrupt:
        raise Interrupted("interrupted.", fix=_goes_on(wanted)) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        problem = os_problem(error)
        fix = f"free some space, or name a place on a larger disk; {_goes_on(wanted)}"
        raise DeployError(problem.message, found=problem.found, fix=fix) from None
    finally:
        if progress is not None:
            sys.stderr.write("\r\x1b[K")
    notes = [place.why] if place.why else []
    if brought.left_out:
        listed = ", ".join(map(one_line, brought.left_out[:NEAR_MAX]))
        notes.append(
            f"{source.path}: links and the like are left out, {len(brought.left_out)} of them: {listed}"
        )
    if brought.vanished:
        notes.append(f"{source.path}: some files went away while it was copied")
    return {
        "run_id": entry.run_id,
        "path": source.path,
        "to": str(to),
        "files": brought.files,
        "is_new": brought.is_new,
        "from": entry.local_dir if place.why else entry.target,
        "notes": notes,
    }


def _goes_on(wanted: WantedFiles) -> str:
    return f"what came waits in {wanted.waiting}: the same command goes on with it"


def _split(root: str, real: str) -> tuple[str, str]:
    """Return a directory, and what is copied by its name in there. Only the name may hold any characters."""
    runs = os.path.dirname(root)
    if real.startswith(f"{root}/"):
        return root, real[len(root) + 1 :]
    return (runs, os.path.basename(root)) if real == root else ("/", real.lstrip("/"))


def _find(
    sources: Sequence[Source], remote: str | None, stack: contextlib.ExitStack
) -> tuple[dict[Source, tuple[FilesFrom, dict[str, Any]]], list[Problem]]:
    """Return where each lies and what it is, on the host or else in the mirror; and what is wrong with the others."""
    place = _place(sources[0], remote, stack)
    found: dict[Source, tuple[FilesFrom, dict[str, Any]]] = {}
    problems: list[Problem] = []
    for source, row in zip(sources, _look(place, [s.path for s in sources]), strict=True):
        if row["kind"] == "missing" and not place.why and (pulled := _pulled(source, place)):
            found[source] = pulled
        elif row["kind"] == "missing":
            problems.append(_missing(source, place, row, remote))
        elif row["kind"] == "dangling":
            problems.append(_dangling(source, place))
        else:
            found[source] = (place, row)
    return found, problems


def _place(source: Source, remote: str | None, stack: contextlib.ExitStack) -> FilesFrom:
    """Return the run on its host; where that cannot be had, what was pulled of it. Raises DeployError for neither."""
    try:
        run = stack.enter_context(open_run(source.run, remote, adopt=False, needs_files=True))
        run.progress.reached = "nothing"  # what goes wrong here is of the copy, not of the run
        connection = run.connection
        if source.host:
            connection = on_host(connection, source.host, stack)
        return FilesFrom(connection, connection.entry.run_path)
    except DeployError as error:
        entry = None if source.host else registry.find(source.run) or find_known(source.run)
        if entry is None or not Path(entry.local_dir).is_dir():
            raise
        message = error.problems[0].message.rstrip(".")
        return _mirror(entry, f"{message}: from what was pulled to {entry.local_dir}")


def _mirror(entry: registry.RunEntry, why: str) -> FilesFrom:
    return FilesFrom(RunConnection(entry, sys.executable, LocalTransport()), entry.local_dir, why)


def _pulled(source: Source, place: FilesFrom) -> tuple[FilesFrom, dict[str, Any]] | None:
    """Return what was pulled of a file that its host does not have any more; None for nothing."""
    entry = place.connection.entry
    if not Path(entry.local_dir).is_dir():
        return None
    why = f"{source.path} is not on {entry.target} any more: from what was pulled to {entry.local_dir}"
    mirror = _mirror(entry, why)
    (row,) = _look(mirror, [source.path])
    return None if row["kind"] == "missing" else (mirror, row)


def _look(place: FilesFrom, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return what lies at these paths. Raises DeployError."""
    connection = place.connection
    argv, program = sent_program(connection.python, PROGRAM, place.path, json.dumps(list(paths)))
    done = connection.transport.run(argv, stdin=program, timeout_s=LOOK_TIMEOUT_S)
    fields = {"root": str, "found": list[dict[str, Any]]}
    answer = read_answer(connection.entry.target, f"what lies in {place.path}", done.out, fields)
    rows = [checked(row, FOUND) for row in answer["found"]]
    for row in rows:
        row["entries"] = [checked(entry, ENTRY) for entry in row["entries"]]
        row["root"] = answer["root"]
    return rows


def _missing(source: Source, place: FilesFrom, row: dict[str, Any], remote: str | None) -> Problem:
    names = [entry["name"] for entry in row["entries"]]
    more = f" and {row['count'] - NEAR_MAX} more" if row["count"] > NEAR_MAX else ""
    near = "the run's directory" if row["near"] == "." else row["near"]
    where = place.connection.entry.target
    return Problem(
        f"{place.connection.entry.run_id}:{source.path} is not there.",
        found=f"{place.why or f'on {where}'}\nin {near}: {', '.join(names[:NEAR_MAX])}{more}",
        fix=f"deploy cp {source.of_run}:{option(remote)} lists what is there",
    )


def _dangling(source: Source, place: FilesFrom) -> Problem:
    return Problem(
        f"{place.connection.entry.run_id}:{source.path} is a link to what is not there.",
        found=place.why or f"on {place.connection.entry.target}",
        fix="copy what you meant by its own name",
    )


def _list(source: Source, remote: str | None) -> Answer:
    """List a directory of a run, or a file."""
    with contextlib.ExitStack() as stack:
        found, missing = _find([source], remote, stack)
        if missing:
            raise DeployError.of(missing)
        place, row = found[source]
    entries = row["entries"] if row["kind"] == "directory" else [{**row, "name": source.name}]
    listed = [{"name": entry["name"], "bytes": entry["bytes"]} for entry in entries]
    table = [
        [one_line(entry["name"]), "" if entry["name"].endswith("/") else size_text(entry["bytes"])]
        for entry in listed
    ]
    notes = [f"note: {place.why}"] if place.why else []
    if (left := row["count"] - len(entries)) > 0 and row["kind"] == "directory":
        notes.append(
            f"note: {left} more are there; `deploy ssh {source.of_run}{option(remote)} -- ls` lists all"
        )
    return Answer(listed, columns(table) or "nothing is there", remarks=tuple(notes))


def _row_text(row: dict[str, Any]) -> str:
    what, to = f"{row['run_id']}:{one_line(row['path'])}", one_line(row["to"])
    if not row["files"] and not row["is_new"]:
        return f"{to} is as {what} already"
    files = "1 file" if row["files"] == 1 else f"{row['files']} files"
    return f"{what} is copied to {to}: {files}"


def _progress(label: str) -> Callable[[str], None]:
    """Return what shows rsync's lines of progress on one line of a terminal."""

    def show(line: str) -> None:
        if "%" in line:
            sys.stderr.write(
                f"\r\x1b[K{one_line(label, limit=40)}  {one_line(line.strip(), limit=60)}"
            )
            sys.stderr.flush()

    return show
