"""The rows of a file that grows: each look reads only what is new. Standard library only."""

from pathlib import Path
from typing import Any, NamedTuple

from rollouts.plain_files import reading
from rollouts.run_dir.files import parse_row

READ_BYTES_MAX = 1 << 22  # in one look
LINE_BYTES_MAX = 1 << 26  # of a line that is longer than that: more than any of ours
TAIL_BYTES = 1024  # before the place where one goes on: others mean that the file was written anew


class Look(NamedTuple):
    """What one look found."""

    rows: list[dict[str, Any]]
    lost: int  # complete lines that are no rows
    anew: bool  # the file was cut or written anew: what was found before does not count, all comes again
    more: bool  # there may be more to read at once


class NewRows:
    """Follows one file of rows. A last line that is still being written waits until it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = 0  # of what was read
        self._tail = b""  # the bytes before it

    def look(self) -> Look:
        """Return what is new. A missing file has no rows. Raises OSError."""
        try:
            with reading(self._path) as stream:
                stream.seek(self._end - len(self._tail))
                anew = stream.read(len(self._tail)) != self._tail
                if anew:
                    self._end, self._tail = stream.seek(0), b""
                data = stream.read(READ_BYTES_MAX)
                full = len(data) == READ_BYTES_MAX
                if full and b"\n" not in data:
                    data += stream.readline(LINE_BYTES_MAX)
        except FileNotFoundError:
            anew, self._end, self._tail = self._end > 0, 0, b""
            return Look([], 0, anew, more=False)
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) > LINE_BYTES_MAX:
            whole = len(data)  # its parts are lost
        self._end += whole
        self._tail = (self._tail + data[max(0, whole - TAIL_BYTES) : whole])[-TAIL_BYTES:]
        lines = data[:whole].removesuffix(b"\n").split(b"\n") if whole else []
        rows = [row for row in map(parse_row, lines) if row is not None]
        return Look(rows, len(lines) - len(rows), anew, more=full and whole > 0)
