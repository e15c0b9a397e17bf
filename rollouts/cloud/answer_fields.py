"""Fields of a provider's JSON, read as what they should be: a provider's types differ from its own reference."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def row(value: object) -> Row:
    """Return an object; {} for anything else."""
    return value if isinstance(value, dict) else {}


def rows(value: object) -> list[Row]:
    """Return the objects of a list; [] for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text(value: object) -> str:
    """Return a string or a number as a string, stripped; of a list its first such item; "" for anything else."""
    if isinstance(value, list):
        return next(filter(None, map(text, value)), "")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return str(value).strip()


def number(value: object) -> float | None:
    """Return a finite number, one in a string too; None for anything else."""
    try:
        found = float(text(value))
    except ValueError:
        return None
    return found if abs(found) < float("inf") else None


def whole(value: object) -> int | None:
    """Return a number as an integer; None for anything else."""
    found = number(value)
    return None if found is None else int(found)
