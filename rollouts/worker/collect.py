"""What takes room in this host's rollouts home, and its removal. Sent from the laptop by `deploy gc`.

    python3 collect.py < question.json

The question is {"home", "older_than_s", "have": {run id: {result: mark}}, "remove": [paths] or null}; `have` is what
lies on the laptop too. Prints {"items": [{kind, path, run_id, bytes, idle_s, keep}], "bytes": what the items without
`keep` free together, "removed": [paths], "problems": [text]}. Standard library only.
"""

import contextlib
import fcntl
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollouts.plain_files import open_plain
from rollouts.run_dir import RunDir, observe
from rollouts.run_dir.results import checkpoint_digest
from rollouts.worker import removing
from rollouts.worker.disk_use import changed_at, entries_below, freed_bytes
from rollouts.worker.processes import Scan, scan

UPLOAD_IDLE_S = (
    3600.0  # an upload in which nothing changed for so long has ended, whatever --older-than says
)
MARKER_FILE = ".complete"  # of an environment
PREVIEWS = "previews"  # where `deploy data --remote` puts its code
# What an upload leaves: a directory in runs/ with none of these may be another program's, where the home is shared
UPLOADED = (
    "launch.json",
    "code/tree",
    "code/package",
    "code/.tree-*",
    "code/.package-*",
    "start/.*.part",
)
Have = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Item:
    """Something that takes room. `keep`: why it stays; "" for what may go."""

    kind: str  # "run", "code", "weights", "checkpoint", "upload", "environment", "removed"
    path: str
    run_id: str
    bytes: int  # what its removal alone gives back
    idle_s: float  # since it was used
    keep: str


class Home:
    """One look at a rollouts home."""

    def __init__(self, home: Path, *, older_than_s: float, have: Have, now: float) -> None:
        self.home, self._older_than_s, self._have, self._now = home, older_than_s, have, now
        self._live = removing.live_runs(home)
        self._last_trees = {
            os.path.realpath(link) for link in (home / "code").glob("*") if link.is_symlink()
        }

    def items(self) -> list[Item]:
        """Return all that takes room, but for what is not ours. Nothing is changed."""
        scanned = scan()
        found: list[Item] = []
        for run in self._runs():
            found += self._of_run(run, scanned)
        found += [
            self._environment(path)
            for path in _own(self.home / "envs", "[!.]*")
            if _is_environment(path)
        ]
        aside = [
            path for path in _own(self.home / removing.REMOVED, "*") if removing.was_set_aside(path)
        ]
        found += [self._item("removed", path, "", 0.0, "") for path in aside]
        previews = _own(self.home / PREVIEWS, "*")
        return [*found, *(self._upload(path, "") for path in previews if _is_preview(path))]

    def _runs(self) -> Iterator[RunDir]:
        for path in _own(self.home / "runs", "*"):
            if not removing.why_not_a_run(RunDir(path)):
                yield RunDir(path)

    def _of_run(self, run: RunDir, scanned: Scan) -> Iterator[Item]:
        with removing.ended(run, scanned) as in_use:
            seen = observe(run)
        never = not run.status.exists() and not run.lock.exists()
        used_at = seen.status.updated_at if seen.status is not None else changed_at(run.path)
        if in_use or (seen.status is None and not never):
            yield self._item(
                "run",
                run.path,
                run.run_id,
                self._now - used_at,
                in_use or "its status cannot be read",
            )
            return
        if never:
            if any(next(run.path.glob(name), None) for name in UPLOADED):
                yield self._upload(run.path, run.run_id)
            return
        idle_s = self._now - used_at
        for path in (run.code_tree, run.code_package):
            if removing.is_own_directory(path):
                last = (
                    "the next upload of its project goes on from it"
                    if str(path) in self._last_trees
                    else ""
                )
                yield self._item("code", path, run.run_id, idle_s, last)
        if removing.is_own_directory(run.weights):
            yield self._item("weights", run.weights, run.run_id, idle_s, "")
        for path in [
            *_own(run.code, ".tree-*"),
            *_own(run.code, ".package-*"),
            *_own(run.path / "start", ".*.part"),
        ]:
            yield self._upload(path, run.run_id)
        for stage in _own(run.checkpoints, "*"):
            for path in _own(stage, "step_*"):
                yield self._checkpoint(path, run.run_id, idle_s)

    def _checkpoint(self, path: Path, run_id: str, idle_s: float) -> Item:
        name = f"checkpoints/{path.parent.name}/{path.name}"
        digest = checkpoint_digest(path)
        is_copied = digest != "" and self._have.get(run_id, {}).get(name) == digest
        keep = "" if is_copied else "the only copy: `deploy pull RUN` first"
        if is_copied and all(
            found.st_nlink > 1 for found in entries_below(path) if stat.S_ISREG(found.st_mode)
        ):
            keep = "the results here are the same files"
        return self._item("checkpoint", path, run_id, idle_s, keep)

    def _upload(self, path: Path, run_id: str) -> Item:
        idle_s = self._now - changed_at(path)
        keep = "an upload may be under way" if idle_s < UPLOAD_IDLE_S else ""
        return self._item("upload", path, run_id, idle_s, keep)

    def _environment(self, path: Path) -> Item:
        marker = path / MARKER_FILE
        used_at = [marker.stat().st_mtime] if marker.is_file() else [changed_at(path)]
        for run in self._runs():
            if removing.names(removing.text_of(run.plan) or "", [str(path)]):
                status = observe(run).status
                used_at += [status.updated_at] if status is not None else []
        with _environment_lock(path) as free:
            keep = "" if free else "it is being made"
        return self._item("environment", path, "", self._now - max(used_at), keep)

    def _item(self, kind: str, path: Path, run_id: str, idle_s: float, keep: str) -> Item:
        if not keep and kind != "removed" and idle_s < self._older_than_s:
            keep = "used lately"
        keep = keep or _why_used(kind, path, self._live, run_id)
        return Item(kind, str(path), run_id, freed_bytes([path]), max(0.0, idle_s), keep)


def remove(home: Path, chosen: list[Item]) -> dict[str, Any]:
    """Remove those of `chosen` that still may go; return {"removed", "bytes", "problems"}.

    Each is looked at again while no launch can begin, and set aside in one step.
    """
    aside, removed, problems = [], [], []
    for item in chosen:
        path = Path(item.path)
        with removing.no_launches(home), _free(item, home) as in_use:
            reason = in_use or _why_used(item.kind, path, removing.live_runs(home), item.run_id)
            if reason:
                problems.append(f"{item.path} stays: {reason}")
            elif item.kind == "removed":
                aside.append(path)
            else:
                aside.append(removing.set_aside(path, home))
            removed += [] if reason else [item.path]
    size = freed_bytes(aside)
    problems += [left for path in aside if (left := removing.remove_tree(path))]
    return {"removed": removed, "bytes": size, "problems": problems}


@contextlib.contextmanager
def _free(item: Item, home: Path) -> Iterator[str]:
    """Hold what a run or the making of an environment would hold. Yields why the item may not go."""
    if not removing.is_own_directory(Path(item.path)):
        yield "it is gone, or a link"
    elif item.kind == "environment":
        with _environment_lock(Path(item.path)) as free:
            yield "" if free else "it is being made"
    elif item.run_id:
        with removing.ended(RunDir(home / "runs" / item.run_id)) as in_use:
            yield in_use
    else:
        yield ""


def _is_preview(path: Path) -> bool:
    """Return whether `deploy data --remote` made it."""
    return re.fullmatch(r"[0-9a-f]{8}", path.name) is not None


def _is_environment(path: Path) -> bool:
    """Return whether this program made it, and not a person whose own environments lie in a folder of that name."""
    return (path / MARKER_FILE).is_file() or _lock_file(path).is_file()


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def _environment_lock(path: Path) -> Iterator[bool]:
    """Take the lock of an environment's making. False where another has it."""
    descriptor = open_plain(_lock_file(path), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _why_used(kind: str, path: Path, live: list[RunDir], run_id: str) -> str:
    """Return which live run uses it, or may; "" for none. Nobody uses what was set aside, or half an upload."""
    if kind in ("removed", "upload"):
        return ""
    return removing.why_used([str(path), os.path.realpath(path)], live, but=run_id)


def _own(directory: Path, pattern: str) -> list[Path]:
    """Return this user's directories in a directory of this user's; [] where that one is a link."""
    if not removing.is_own_directory(directory):
        return []
    return sorted(path for path in directory.glob(pattern) if removing.is_own_directory(path))


def main() -> None:
    question = json.load(sys.stdin)
    home = Path(question["home"])
    look = Home(home, older_than_s=question["older_than_s"], have=question["have"], now=time.time())
    items = look.items()
    free = [item for item in items if not item.keep]
    answer = {
        "items": [asdict(item) for item in items],
        "bytes": freed_bytes([Path(item.path) for item in free]),
        "removed": [],
        "problems": [],
    }
    if (wanted := question["remove"]) is not None:
        kept = [f"{i.path} stays: {i.keep}" for i in items if i.keep and i.path in wanted]
        done = remove(home, [item for item in free if item.path in wanted])
        answer |= done | {"problems": [*kept, *done["problems"]]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
