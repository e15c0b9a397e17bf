"""Names that a user gives to runs: one file beside the registry, {tag: run id}. A tag means one run."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from rollouts.plain_files import open_plain, read_plain
from rollouts.remote.errors import DeployError
from rollouts.run_dir import home_dir, valid_run_id, write_json_atomic

RESERVED = ("last",)


def tags() -> dict[str, str]:
    """Return {tag: run id}; {} where there are none, or the file is damaged: `damaged_tags` names it."""
    return _read() or {}


def damaged_tags() -> list[Path]:
    """Return the file of the tags if it cannot be read."""
    return [_file()] if _read() is None else []


def _read() -> dict[str, str] | None:
    """Return {tag: run id}; None for a file that is damaged."""
    try:
        found = json.loads(read_plain(_file()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return {str(tag): str(run) for tag, run in found.items()} if isinstance(found, dict) else None


def _to_change() -> dict[str, str]:
    """Return {tag: run id}. Raises DeployError for a damaged file: it is not written over."""
    found = _read()
    if found is None:
        raise DeployError(
            f"the tags of this machine cannot be read: {_file()}",
            needed='a JSON object {"TAG": "RUN"}',
            fix="mend that file; or move it away, and give the tags again",
        )
    return found


def tag_run(run_id: str, tag: str, *, run_ids: list[str]) -> None:
    """Give a run a tag. Raises DeployError for one that is not a name, or that means another run."""
    if not valid_run_id(tag) or tag in RESERVED:
        raise DeployError(
            f"{tag!r} is not a tag.",
            needed="1 to 80 letters, digits, '-' or '_', which a letter or digit begins",
        )
    if tag in run_ids:
        raise DeployError(f"{tag!r} is the name of a run.", fix="choose another tag")
    with _alone():
        found = _to_change()
        if found.get(tag, run_id) != run_id:
            raise DeployError(
                f"{tag!r} is a tag of {found[tag]}.",
                fix=f"deploy tag {tag} {tag} --remove takes it away",
            )
        write_json_atomic(_file(), {**found, tag: run_id}, mode=0o600)


def untag_run(run_id: str, tag: str) -> None:
    """Take a tag away. Raises DeployError where the run does not have it."""
    with _alone():
        found = _to_change()
        if found.get(tag) != run_id:
            own = ", ".join(name for name, run in found.items() if run == run_id)
            raise DeployError(f"{run_id} has no tag {tag!r}.", found=f"tags: {own or 'none'}")
        write_json_atomic(
            _file(), {name: run for name, run in found.items() if name != tag}, mode=0o600
        )


def drop_tags(run_id: str) -> None:
    """Take all tags of a run away: it is no longer known here."""
    if run_id in tags().values():
        with _alone():
            write_json_atomic(
                _file(), {name: run for name, run in tags().items() if run != run_id}, mode=0o600
            )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    _file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = open_plain(_file().with_name(".tags.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _file() -> Path:
    return home_dir() / "registry" / ".tags.json"
