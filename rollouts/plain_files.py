"""Open files that another process may have replaced: plain ones alone, without waiting. Standard library only.

Opening a pipe waits for its other end, a device or a socket has no end or no bytes. So a file in a run directory is
opened here: the open never blocks, and what was opened is looked at before a byte is read or written.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO

READ_BYTES = 1 << 20  # at a time


class NotPlainFileError(OSError, ValueError):
    """There is a pipe, a socket, a device or a directory where a file should be."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(errno.EINVAL, f"{what}, no plain file", os.fspath(path))


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_plain(
    path: str | os.PathLike[str],
    flags: int = os.O_RDONLY,
    mode: int = 0o644,
    *,
    dir_fd: int | None = None,
) -> int:
    """Return a descriptor of a plain file; for writing also of a device, such as /dev/null.

    Raises NotPlainFileError for anything else, and OSError as os.open does.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a pipe without a reader
            raise NotPlainFileError(path, "a pipe or a socket") from None
        if error.errno == errno.EISDIR:
            raise NotPlainFileError(path, "a directory") from None
        raise
    found = os.fstat(descriptor).st_mode
    writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
    if not stat.S_ISREG(found) and not (writes and stat.S_ISCHR(found)):
        os.close(descriptor)
        raise NotPlainFileError(
            path, next((what for is_it, what in _KINDS if is_it(found)), "something else")
        )
    return descriptor


def reading(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a plain file for reading. Raises as `open_plain` does."""
    return os.fdopen(open_plain(path), "rb")


def appending(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a plain file for appending, unbuffered; make it where it is missing. Raises as `open_plain` does."""
    return os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab", buffering=0)


def read_plain(path: str | os.PathLike[str]) -> bytes:
    """Return all bytes of a plain file. Raises as `open_plain` does."""
    descriptor = open_plain(path)  # thousands are read for a list of runs: no stream around it
    try:
        parts = [os.read(descriptor, READ_BYTES)]
        while parts[-1]:
            parts.append(os.read(descriptor, READ_BYTES))
    finally:
        os.close(descriptor)
    return b"".join(parts)


def is_plain(path: Path) -> bool:
    """Return whether there is a plain file, or a link to one."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
