"""Directories that appear complete or not at all: written beside their place, synced to disk, renamed."""

import os
import shutil
from pathlib import Path


def begin(final: Path) -> Path:
    """Make the directory to write to, and return it; what a killed writer left is cleared."""
    final.parent.mkdir(parents=True, exist_ok=True)
    _recover(final.parent)
    temporary = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    temporary.mkdir()
    return temporary


def _recover(checkpoint_dir: Path) -> None:
    """Remove half-written directories of a killed writer, and bring back one that it was replacing."""
    for path in checkpoint_dir.glob(".tmp-*"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    for path in checkpoint_dir.glob(".old-*"):
        original = checkpoint_dir / path.name.removeprefix(".old-")
        if original.exists():
            shutil.rmtree(path)
        else:
            path.rename(original)


def put_in_place(temporary: Path, final: Path, *, durable: bool = True) -> None:
    """Rename; a directory already at `final` is set aside first and removed after: one of them always exists.

    `durable`: returns when the disk has the new name, which takes milliseconds of waiting.
    """
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    if durable:
        sync(final.parent)


def sync_tree(directory: Path) -> None:
    """Return once all of `directory` is on disk."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
