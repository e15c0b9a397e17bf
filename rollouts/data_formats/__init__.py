"""Formats of rows, each declared once in formats.py, and read by the config, `deploy` and the trainer alike.

Pure; standard library only.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rollouts.data_formats.declared import DataFormat
from rollouts.data_formats.examples import Example
from rollouts.data_formats.formats import FORMATS
from rollouts.data_formats.row import DataError, Row

_BY_NAME = {declared.name: declared for declared in FORMATS}
FORMAT_NAMES = tuple(_BY_NAME)
if TYPE_CHECKING:
    FormatName: TypeAlias = str
else:
    FormatName = Literal[FORMAT_NAMES]


def format_named(name: str) -> DataFormat:
    """Return the format of this name. Raises DataError naming those that there are."""
    if name not in _BY_NAME:
        raise DataError(f"format={name!r}: needs one of {', '.join(map(repr, FORMAT_NAMES))}")
    return _BY_NAME[name]


def format_shown(rows: Sequence[Any]) -> DataFormat | None:
    """Return the first format that all these rows, as JSON, show themselves to be of; None where there is none."""
    return next(
        (declared for declared in FORMATS if all(declared.is_of(row) for row in rows)), None
    )


def parse_row(row: Row, format: FormatName | None = None) -> Example:
    """Read a row in `format`, or by its columns. Raises DataError naming row, value and need."""
    declared = format_shown([row.values]) if format is None else format_named(format)
    if declared is None:
        *most, last = dict.fromkeys(
            " and ".join(map(repr, known.known_by)) for known in FORMATS if known.known_by
        )
        raise DataError(
            f"{row.where}: columns {sorted(row.values)}; needs {', '.join(most)}, or {last}"
        )
    return declared.read(row)
