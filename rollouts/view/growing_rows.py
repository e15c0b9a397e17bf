"""Rows of files that grow: what was read stays, and what came after it is read. A file that was cut is read anew."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollouts.run_dir import NewRows

Row = dict[str, Any]


@dataclass
class _File:
    """What was read of one file so far."""

    new: NewRows
    rows: list[Row] = field(default_factory=list)
    lost: int = 0  # lines that are not rows, or not usable ones


class GrowingRows:
    """The rows of one run's files, kept from one look to the next."""

    def __init__(self) -> None:
        self._files: dict[Path, _File] = {}

    def read(self, path: Path, usable: Callable[[Row], bool]) -> tuple[list[Row], int]:
        """Return (usable rows, complete lines that are none). Of a missing file there are none. Raises OSError."""
        known = self._files.setdefault(path, _File(NewRows(path)))
        more = True
        while more:
            rows, lost, anew, more = known.new.look()
            if anew:
                known.rows, known.lost = [], 0
            found = [row for row in rows if usable(row)]
            known.rows += found
            known.lost += lost + len(rows) - len(found)
        return [*known.rows], known.lost
