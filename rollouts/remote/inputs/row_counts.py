"""Rows of files here, by what each format says of itself: lines of .jsonl, footers of parquet. Standard library."""

import re
import struct
from collections.abc import Sequence
from pathlib import Path

from rollouts.plain_files import reading

READ_BYTES_MAX = 512 * 2**20  # of one .jsonl file; rows of a larger one are not counted
FOOTER_BYTES_MAX = 64 * 2**20
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_NUM_ROWS = 3  # the field of parquet's FileMetaData
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (
    (1, 2),
    3,
    (4, 5, 6),
    7,
    8,
    (9, 10),
    12,
)


def rows_of_file(file: Path) -> int | None:
    """Return how many rows a .jsonl or parquet file has; None for another, a damaged or a very large one."""
    try:
        if file.suffix == ".jsonl" and file.stat().st_size <= READ_BYTES_MAX:
            with reading(file) as lines:
                return sum(1 for line in lines if line.strip())
        return _parquet_rows(file) if file.suffix == ".parquet" else None
    except (OSError, ValueError, IndexError, struct.error, RecursionError):
        return None


def files_of_split(files: Sequence[str], split: str) -> list[str]:
    """Return the data files of one split, as `datasets` would find them; [] where their names leave a doubt.

    Told are folders of one format, each of whose files is named by one split ("data/train-00000-of-00002.parquet").
    """
    split_of = {file: _named_splits(file) for file in files}
    if len({Path(file).suffix for file in files}) != 1 or any(
        len(named) != 1 for named in split_of.values()
    ):
        return []
    return [file for file in files if split in split_of[file]]


def _named_splits(file: str) -> set[str]:
    words = set(re.split(r"[^a-zA-Z]+", Path(file).stem))
    return {split for split, names in _SPLITS.items() if words & names}


def _parquet_rows(file: Path) -> int | None:
    with reading(file) as stream:
        end = stream.seek(-8, 2)
        (size,) = struct.unpack("<I", stream.read(4))
        if stream.read(4) != b"PAR1" or size > min(FOOTER_BYTES_MAX, end):
            return None
        stream.seek(end - size)
        return _Thrift(stream.read(size)).integer_field(_NUM_ROWS)


class _Thrift:
    """Reads Thrift's compact protocol, as far as a parquet footer's first fields need it."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def integer_field(self, wanted: int) -> int | None:
        """Return an integer field of the outer struct; None without it."""
        field = 0
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._integer()
            if field == wanted and kind & 15 in _INTEGERS:
                return self._integer()
            self._skip(kind & 15)
        return None

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, kind: int) -> None:
        if kind in _INTEGERS:
            self._varint()
        elif kind == _BYTE:
            self._byte()
        elif kind == _DOUBLE:
            self._at += 8
        elif kind == _BINARY:
            size = self._varint()
            self._at += size
        elif kind in _LISTS:
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._skip_element(head & 15)
        elif kind == _STRUCT:
            while head := self._byte():
                if not head >> 4:
                    self._integer()
                self._skip(head & 15)
        elif kind not in _BOOLEANS:
            raise ValueError(f"a field of kind {kind}")

    def _skip_element(self, kind: int) -> None:
        if kind in _BOOLEANS:
            self._byte()  # in a list they take a byte each
        else:
            self._skip(kind)
