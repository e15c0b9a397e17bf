"""The directories that a run writes into: room, rights, locks, and how fast a file gets onto the disk."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

WRITE_BYTES = 128 << 20  # at most, and no more than a share of what is free
WRITE_SHARE = 8
WRITE_S = 1.0
PIECE_BYTES = 4 << 20
OTHER_FILE_SYSTEM = "unknown"


def disk_rows(places: Mapping[str, str]) -> list[dict[str, Any]]:
    """Look at each directory, by its name: `home`, `tmp`, `shm`. One that is yet to be made is its nearest parent."""
    return [disk_row(name, existing(Path(path))) for name, path in places.items()]


def existing(path: Path) -> Path:
    """Return the nearest directory at or above `path` that is there."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def disk_row(name: str, path: Path) -> dict[str, Any]:
    """Look at one directory. `problem` says why nothing can be written there; then there is no rate."""
    usage, found = shutil.disk_usage(path), os.statvfs(path)
    row: dict[str, Any] = {
        "name": name,
        "path": str(path),
        "file_system": file_system(path),
        "total_mib": usage.total >> 20,
        "free_mib": usage.free >> 20,
        "free_files": found.f_favail
        if found.f_files
        else None,  # a file system without a table of them tells none
        "runs_programs": not found.f_flag & getattr(os, "ST_NOEXEC", 0),
        "locks": True,
        "write_mib_s": None,
        "problem": "",
    }
    try:
        # without a name: a kill leaves nothing either
        with tempfile.TemporaryFile(dir=path) as file:
            row["locks"] = _locks(file)
            row["write_mib_s"] = _write_rate(file, min(WRITE_BYTES, usage.free // WRITE_SHARE))
    except OSError as error:
        row["problem"] = error.strerror or type(error).__name__
    return row


def _locks(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a network file system without a lock service
        return False
    return True


def _write_rate(file: IO[bytes], bytes_max: int) -> float | None:
    """Return the MiB that reach the disk in a second; None where there is too little room to tell."""
    piece = os.urandom(PIECE_BYTES)  # no file system stores this in less
    written, began = 0, time.monotonic()
    while written + PIECE_BYTES <= bytes_max and time.monotonic() - began < WRITE_S:
        file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        written += PIECE_BYTES
    return round((written >> 20) / max(time.monotonic() - began, 1e-6), 1) if written else None


def file_system(path: Path) -> str:
    """Return the kind of file system that a directory is on, such as ext4, nfs4, tmpfs."""
    try:
        mounts = Path("/proc/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return OTHER_FILE_SYSTEM
    real, best = os.path.realpath(path), ("", OTHER_FILE_SYSTEM)
    for line in mounts:
        words = line.split(" ")
        where = words[1].replace("\\040", " ") if len(words) > 2 else ""
        inside = where in ("/", real) or real.startswith(f"{where}/")
        # the last mount at a place is the one that is seen
        if where and inside and len(where) >= len(best[0]):
            best = (where, words[2])
    return best[1]
