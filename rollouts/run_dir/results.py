"""What a run directory holds that cannot be made again: which results are on one side alone. Standard library only."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from rollouts.plain_files import is_plain, read_plain
from rollouts.run_dir.layout import STREAMED_FILES, RunDir

HOW_IT_WENT = ("events.jsonl", "gpu.jsonl")  # these tell nothing of what it learned


def results_of(run: RunDir) -> dict[str, str]:
    """Return each result by its name, with what tells one copy from another: `bytes N`, or a manifest's digest.

    Checkpoints that are not whole, by their manifest's names and sizes, are no results.
    """
    found = {name: f"bytes {(run.path / name).stat().st_size}" for name in _files(run)}
    for directory in sorted(run.checkpoints.glob("*/step_*")):
        digest = checkpoint_digest(directory)
        if digest:
            found[f"checkpoints/{directory.parent.name}/{directory.name}"] = digest
    return found


def copies_in(mirror: RunDir) -> dict[str, str]:
    """Return the results that lie in a mirror itself: what it only links to may be the one copy on the host."""
    if mirror.path.is_symlink():
        return {}
    here = os.path.join(os.path.realpath(mirror.path), "")
    return {
        name: mark
        for name, mark in results_of(mirror).items()
        if os.path.realpath(here + name) == here + name
    }


def _files(run: RunDir) -> Iterator[str]:
    for name in STREAMED_FILES:
        if name not in HOW_IT_WENT and is_plain(run.path / name):
            yield name
    for file in sorted([*run.path.glob("wandb/offline-run-*/*.wandb")]):
        if is_plain(file):
            yield file.relative_to(run.path).as_posix()


def checkpoint_digest(directory: Path) -> str:
    """Return the digest of a checkpoint's manifest; "" unless every file that it lists is there, of its size."""
    try:
        manifest = read_plain(directory / "manifest.json")
        files = json.loads(manifest)["files"]
        if directory.is_symlink() or not all(
            os.lstat(directory / name).st_size == file["size"] for name, file in files.items()
        ):
            return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f"sha256 {hashlib.sha256(manifest).hexdigest()}"


def only_in(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Return the results of `one` that `other` lacks, or has less of."""
    return [
        name for name, mark in one.items() if name not in other or not _holds(other[name], mark)
    ]


def _holds(copy: str, mark: str) -> bool:
    if mark.startswith("bytes ") and copy.startswith("bytes "):  # such files only grow
        with contextlib.suppress(ValueError):
            return int(copy[6:]) >= int(mark[6:])
    return copy == mark
