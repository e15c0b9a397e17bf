"""An index of rollouts.jsonl: where each sample's line stands, and the numbers that one filters by.

It lies in a cache directory of this machine, a file a column, and is read while it is still being made. A head that is
missing, of another version, or does not fit its file or its columns means: make it anew. Needs numpy.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from rollouts.plain_files import open_plain, read_plain, reading
from rollouts.run_dir import home_dir, parse_row, write_json_atomic
from rollouts.view.rollout_samples import RolloutSample, sample_of

VERSION = 1
# columns with their types in numpy's words: a record of each sample
COLUMNS = {
    "offset": "<i8",  # of its line, in bytes
    "bytes": "<i4",
    "step": "<i4",
    "group": "<i4",
    "length": "<i4",  # tokens of the response
    "reward": "<f8",
    "advantage": "<f8",  # not a number: none was recorded
    "prompt": "<u8",  # `prompt_key`
    "finish": "|u1",  # a place in Head.finish
}
LINE_BYTES_MAX = 64 << 20
BLOCK_RECORDS = 20_000
BLOCK_S = 0.5  # what was read is to be seen so soon
TAIL_BYTES = 4096
FINISH_MAX = 255
# A line's lists of numbers, most of its bytes, of which the index holds nothing. Within a text of JSON each quote has
# a backslash before it, so that no text of a model looks like one of these keys.
_NUMBERS = re.compile(
    rb'"(?:tokens|loss_mask|rollout_log_probs|trainer_log_probs)":\s*\[[^\["\]]*\]'
)
INT_MAX = 2**31 - 1


@dataclass
class Head:
    """How far an index has come. `finish`: the finish reasons, by the number in their column."""

    version: int = VERSION
    records: int = 0
    bytes: int = 0  # of the file that are in the index
    damaged: int = 0  # lines that are not samples
    finish: list[str] = field(default_factory=list)
    sums: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(COLUMNS, 0)
    )  # CRC-32 of each column
    tail: str = ""  # digest of the last bytes that are in the index


def cache_of(file: Path) -> Path:
    """Return where the index of a file is kept."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(file))).hexdigest()[:24]
    return home_dir() / "cache" / "samples" / name


def prompt_key(prompt_id: str, prompt: Any = None) -> int:
    """Return a number of 64 bits that means one prompt, by its id, or of a run that has no ids by the prompt itself."""
    text = prompt_id or json.dumps(prompt, sort_keys=True)
    return int.from_bytes(
        hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little"
    )


def read_head(cache: Path, file: Path) -> Head | None:
    """Return the head of an index; None where it is missing or damaged, or is not of this file."""
    try:
        found = json.loads(read_plain(cache / "head.json"))
        head = Head(**found)
        if head.version != VERSION or set(head.sums) != set(COLUMNS):
            return None
        with reading(file) as stream:
            if stream.seek(0, os.SEEK_END) < head.bytes or _tail(stream, head.bytes) != head.tail:
                return None
        return head
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def read_columns(cache: Path, head: Head) -> dict[str, Any] | None:
    """Return {column: array of head.records}; None where a column is too short or does not have its sum."""
    import numpy

    columns = {}
    try:
        for name, kind in COLUMNS.items():
            with reading(cache / name) as stream:
                column = numpy.fromfile(stream, dtype=kind, count=head.records)
            whole = len(column) == head.records
            if not whole or zlib.crc32(column.data) != head.sums[name]:
                return None
            columns[name] = column
    except OSError:
        return None
    return columns


def _tail(stream: IO[bytes], end: int) -> str:
    begin = max(0, end - TAIL_BYTES)
    stream.seek(begin)
    return hashlib.sha256(stream.read(end - begin)).hexdigest()


def update(file: Path, cache: Path, *, seconds: float = math.inf) -> None:
    """Bring the index of a file up to what the file holds now, or as far as it comes in so many seconds.

    Where another process does so, return at once.
    """
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = open_plain(cache / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        head = read_head(cache, file)
        if head is None or read_columns(cache, head) is None:
            head = Head()
        _extend(file, cache, head, until=time.monotonic() + seconds)
    finally:
        os.close(lock)


def _extend(file: Path, cache: Path, head: Head, *, until: float) -> None:
    """Add the lines after `head.bytes`; the head is written after the columns, so that it never says too much."""
    block = _Block()
    with contextlib.ExitStack() as opened, reading(file) as stream:
        columns = {
            name: opened.enter_context(_column(cache / name, kind, head.records))
            for name, kind in COLUMNS.items()
        }
        stream.seek(head.bytes)
        written_at = time.monotonic()
        for offset, line, size in _lines(stream):
            sample = sample_of(parse_row(_NUMBERS.sub(b'"":0', line))) if line is not None else None
            if sample is None or not block.add(sample, offset, size, head.finish):
                head.damaged += bool(line is None or line.strip())
            head.bytes = offset + size
            if block.count >= BLOCK_RECORDS or time.monotonic() - written_at > BLOCK_S:
                _write(block, columns, cache, head, file)
                block, written_at = _Block(), time.monotonic()
            if time.monotonic() > until:
                break
        _write(block, columns, cache, head, file)


def _column(path: Path, kind: str, records: int) -> IO[bytes]:
    """Open a column behind its first `records`: what a killed process wrote after them goes."""
    stream = os.fdopen(open_plain(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    stream.truncate(records * int(kind[-1]))
    stream.seek(0, os.SEEK_END)
    return stream


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (offset, line, bytes) of the complete lines; None in place of one that is too long to read."""
    offset = stream.tell()
    while line := stream.readline(LINE_BYTES_MAX):
        size = len(line)
        kept: bytes | None = line
        while not line.endswith(b"\n"):
            kept = None
            if not (line := stream.readline(LINE_BYTES_MAX)):
                return  # the last line, which is still being written
            size += len(line)
        yield offset, kept, size
        offset += size


class _Block:
    """Records that are not written yet."""

    def __init__(self) -> None:
        self.count = 0
        self.values: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, sample: RolloutSample, offset: int, size: int, finish: list[str]) -> bool:
        """Add a sample; False for one whose numbers no column can hold."""
        if not all(0 <= number <= INT_MAX for number in (sample.step, sample.group, sample.length)):
            return False
        reason = sample.finish_reason[:60]
        if reason not in finish and len(finish) < FINISH_MAX:
            finish.append(reason)
        record = {
            "offset": offset,
            "bytes": size,
            "step": sample.step,
            "group": sample.group,
            "length": sample.length,
            "reward": sample.reward,
            "advantage": float("nan") if sample.advantage is None else sample.advantage,
            "prompt": prompt_key(sample.prompt_id, sample.prompt),
            "finish": finish.index(reason) if reason in finish else FINISH_MAX,
        }
        for name, value in record.items():
            self.values[name].append(value)
        self.count += 1
        return True


def _write(
    block: _Block, columns: dict[str, IO[bytes]], cache: Path, head: Head, file: Path
) -> None:
    import numpy

    for name, kind in COLUMNS.items():
        data = numpy.array(block.values[name], dtype=kind).tobytes()
        columns[name].write(data)
        columns[name].flush()
        head.sums[name] = zlib.crc32(data, head.sums[name])
    head.records += block.count
    with reading(file) as stream:
        head.tail = _tail(stream, head.bytes)
    write_json_atomic(cache / "head.json", asdict(head), mode=0o600)


def main() -> None:
    """Bring an index up to date: `python -m rollouts.view.ui.sample_index FILE`, a process beside the server."""
    import sys

    file = Path(sys.argv[1])
    os.nice(5)
    with contextlib.suppress(FileNotFoundError):  # the run was removed meanwhile
        update(file, cache_of(file))


if __name__ == "__main__":
    main()
