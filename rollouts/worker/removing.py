"""What may be removed from a rollouts home, and how: under the locks of launches, at once, and following no link.

What goes is first moved to <home>/removed/, in one step, so that nobody ever sees half of it. Standard library only.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from rollouts.plain_files import open_plain, read_plain
from rollouts.run_dir import FINAL_STATES, RunDir, launching, observe, valid_run_id
from rollouts.worker.processes import Scan, marked_processes

REMOVED = "removed"
# What a launch or an upload puts into a run directory: something without any of these is not a run
MARKS = ("status.json", "launch.json", "plan.json", "config.json", "code", "start")


@contextlib.contextmanager
def no_launches(home: Path) -> Iterator[None]:
    """Hold the lock of `home`'s launches: no run becomes live meanwhile."""
    descriptor = open_plain(home / "launch.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_own_directory(path: Path) -> bool:
    """Return whether `path` is a directory of this user's, itself and not by a link."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def why_not_a_run(run: RunDir) -> str:
    """Return why `run` is not a run directory of this user's; "" if it is one."""
    if not valid_run_id(run.run_id) or run.path.parent.name != "runs":
        return f"{run.path} is not <home>/runs/<run id>"
    if not is_own_directory(run.path.parent) or not is_own_directory(run.path):
        return f"{run.path} is a link, or another user's"
    if not any(os.path.lexists(run.path / name) for name in MARKS):
        return f"{run.path} holds nothing that a run has"
    return ""


def why_in_use(run: RunDir, scanned: Scan | None = None) -> str:
    """Return why a run is not over, as far as can be seen from here; "" if it is."""
    seen = observe(run)
    if seen.live or seen.state == "silent":
        return f"it is {seen.state}"
    if seen.status is not None and seen.state not in FINAL_STATES:
        return f"it is {seen.state}"
    left = marked_processes(run, seen=scanned)
    return f"processes of it are still there: {left}" if left else ""


@contextlib.contextmanager
def ended(run: RunDir, scanned: Scan | None = None) -> Iterator[str]:
    """Hold a run's directory, as a launch does. Yields why the run may not be touched; "" if it may."""
    try:
        with launching(run, wait=False) as alone:
            yield why_in_use(run, scanned) if alone else "it is being launched"
    except FileNotFoundError:
        yield "it is gone"


def live_runs(home: Path) -> list[RunDir]:
    """Return the runs of `home` that are live, or may be."""
    found = []
    for path in sorted(home.glob("runs/*")):
        run = RunDir(path)
        with contextlib.suppress(OSError):  # another user's
            seen = observe(run)
            if seen.live or seen.state == "silent":
                found.append(run)
    return found


def why_used(places: list[str], runs: Iterable[RunDir], *, but: str = "") -> str:
    """Return which of some live runs uses a path at or below one of `places`, or may; "" for none.

    Its config and its plan name what it uses: without one of them it may use anything.
    """
    others = [run for run in runs if run.run_id != but]
    texts = [(run, file, text_of(file)) for run in others for file in (run.config, run.plan)]
    for run, _, text in texts:
        if text is not None and names(text, places):
            return f"the live run {run.run_id} uses it"
    for run, file, text in texts:
        if text is None:
            return f"the live run {run.run_id} may use it: its {file.name} cannot be read"
    return ""


def text_of(file: Path) -> str | None:
    """Return what a config or a plan says; None for one that is gone, or cannot be read."""
    try:
        return read_plain(file).decode(errors="replace")
    except OSError:
        return None


def names(text: str, places: Iterable[str]) -> bool:
    """Return whether a config or a plan names a path at or below one of `places`."""
    return any(f"{place}/" in text or f'{place}"' in text for place in places)


def set_aside(path: Path, home: Path) -> Path:
    """Move `path` out of sight, in one step; return where it is."""
    aside = home / REMOVED
    aside.mkdir(mode=0o700, exist_ok=True)
    if not is_own_directory(aside):
        raise PermissionError(f"{aside} is a link, or another user's")
    place = aside / f"{path.name}-{secrets.token_hex(4)}"
    path.rename(place)
    return place


def was_set_aside(path: Path) -> bool:
    """Return whether `set_aside` gave it its name."""
    return re.search(r"-[0-9a-f]{8}$", path.name) is not None


def remove_tree(path: Path) -> str:
    """Remove a directory or a file; no link is followed. Returns what could not be removed; "" for nothing."""
    problems: list[str] = []
    if not path.is_symlink() and path.is_dir():
        shutil.rmtree(path, onerror=lambda _, name, error: problems.append(f"{name}: {error[1]}"))
    else:
        path.unlink(missing_ok=True)
    return "; ".join(problems[:3])
