"""How much room files take, and how much of it their removal gives back. Standard library only.

A file with names elsewhere too is not freed when one of them goes: trees of a project's runs share files by hard
links, and so do checkpoints here with their mirrors.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own are


def entries_below(path: Path) -> Iterator[os.stat_result]:
    """Yield the lstat of `path` and of all below it; links are not followed, what vanishes meanwhile is left out."""
    try:
        found = os.lstat(path)
    except OSError:
        return
    yield found
    if stat.S_ISDIR(found.st_mode):
        try:
            with os.scandir(path) as listed:
                names = [entry.path for entry in listed]
        except OSError:  # another user's
            return
        for name in names:
            yield from entries_below(Path(name))


def freed_bytes(paths: Iterable[Path]) -> int:
    """Return what removing all of `paths` together gives back: what has no other name left."""
    names: dict[tuple[int, int], int] = {}
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for path in paths:
        for found in entries_below(path):
            key = (found.st_dev, found.st_ino)
            names[key] = names.get(key, 0) + 1
            links = 1 if stat.S_ISDIR(found.st_mode) else found.st_nlink
            sizes[key] = (links, found.st_blocks * BLOCK_BYTES)
    return sum(size for key, (links, size) in sizes.items() if names[key] >= links)


def changed_at(path: Path) -> float:
    """Return when anything at or below `path` last changed here: by ctime, since copies keep the times of others."""
    return max((found.st_ctime for found in entries_below(path)), default=0.0)
