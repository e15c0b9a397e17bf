"""Writing files whole and lines one at a time, reading what may be torn, and a full disk."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rollouts.plain_files import NotPlainFileError, open_plain, reading
from rollouts.run_dir.layout import RunDir


def write_text_atomic(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a whole file: readers see the old one or the new one, after a crash too. An error leaves nothing behind."""
    write_bytes_atomic(path, text.encode(), mode=mode)


def write_bytes_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a whole file, as `write_text_atomic` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json_atomic(path: Path, value: Any, *, mode: int = 0o644) -> None:
    data = (
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
    )
    write_text_atomic(path, json.dumps(data, indent=1) + "\n", mode=mode)


def append_jsonl(path: Path, *rows: dict[str, Any]) -> None:
    """Append whole lines, one writer at a time. Raises OSError; nothing of a line that did not fit stays then.

    What another writer tore, killed in the middle of a line, stays on its own line, which readers leave out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(_line(row) for row in rows)
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        begin = os.fstat(descriptor).st_size
        torn = begin > 0 and os.pread(descriptor, 1, begin - 1) != b"\n"
        _write_lines(descriptor, begin, (b"\n" if torn else b"") + text.encode())
    finally:
        os.close(descriptor)


def _line(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"
    except ValueError:  # NaN or an infinity, for which JSON has no word: null
        return json.dumps(_without_nan(row), separators=(",", ":")) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_lines(descriptor: int, begin: int, data: bytes) -> None:
    written = 0
    try:
        while written < len(data):  # a regular file takes it in one call unless the disk is full
            written += os.write(descriptor, data[written:])
    except OSError:
        with contextlib.suppress(OSError):  # no regular file: the first error is the one to tell
            os.ftruncate(descriptor, begin + data.rfind(b"\n", 0, written) + 1)
        raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; [] if it is missing."""
    return list(iter_jsonl(path))


def iter_jsonl(path: Path, *, having: bytes = b"") -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; of lines without `having` none, unread."""
    for line in _complete_lines(path):
        if having in line and (row := parse_row(line)) is not None:
            yield row


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return a line's JSON object; None if it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _complete_lines(path: Path) -> Iterator[bytes]:
    """Return the complete lines. A torn last line (a crash, a pull under way) is left out."""
    try:
        stream = reading(path)
    except FileNotFoundError:
        return
    with stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield line


LAST_ROW_BYTES = (1 << 13, 1 << 16)  # looked through from the end, before the whole file is read


def last_jsonl_row(path: Path) -> dict[str, Any] | None:
    """Return the last row, found from the file's end; None for an empty or missing file."""
    try:
        with reading(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            for limit in (*LAST_ROW_BYTES, size):
                block = min(size, limit)
                stream.seek(size - block)
                lines = stream.read(block).split(b"\n")[:-1]
                whole = lines if block == size else lines[1:]  # the first began before the block
                found = next(
                    (row for row in map(parse_row, reversed(whole)) if row is not None), None
                )
                if found is not None or block == size:
                    return found
    except FileNotFoundError:
        pass
    return None


def tail_lines(path: Path, count: int, *, start: int = 0) -> list[str]:
    """Return the last `count` lines of a log from byte `start` on, without their ends; [] for no file."""
    try:
        with reading(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(start, size - (count * 400 + 4096)))
            return stream.read().decode(errors="replace").splitlines()[-count:]
    except (FileNotFoundError, NotPlainFileError):
        return []


RESERVE_BYTES = 1 << 17
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def make_reserve(run: RunDir) -> None:
    with run.reserve.open("wb") as stream:
        stream.write(os.urandom(RESERVE_BYTES))  # file systems that compress keep all of it
        os.fsync(stream.fileno())


def write_on_full_disk(run: RunDir, write: Callable[[], None]) -> None:
    """Do `write`; where the disk is full give up the run's reserve and do it again. Raises OSError."""
    try:
        write()
    except OSError as error:
        if error.errno not in FULL_DISK or not run.reserve.exists():
            raise
        run.reserve.unlink(missing_ok=True)
        write()
