"""Rows as plain data: null, booleans, numbers, text, lists and objects, as JSON holds them. Pure.

Prompts are written as JSON later (samples, checkpoints, evaluations), so values that JSON cannot hold are refused as
rows load.
"""

import datetime
import json
import math
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

DEPTH_MAX = 100  # lists and objects within each other; deeper ones break JSON writers, each at another depth


class NotPlain(ValueError):
    """A value that plain data cannot hold. The message says where in the row it is, what it is, and what is needed."""


def parse_json(text: str) -> Any:
    """Return the value of the JSON text. Raises NotPlain where it is not JSON, or where a reader would have to guess.

    NaN, which Python's and pandas' writers use for a gap, becomes null, as in `to_plain`. Refused beyond the syntax:
    Infinity, a key that an object has twice, integers of more digits than Python converts (4,300), numbers beyond a
    float, half of a surrogate pair, more than DEPTH_MAX levels.
    """
    try:
        value = json.loads(
            text, parse_constant=_constant, parse_float=_parse_float, object_pairs_hook=_object_of
        )
    except json.JSONDecodeError as error:
        raise NotPlain(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise NotPlain(_too_deep()) from None
    except NotPlain:
        raise
    except ValueError as error:  # of integers with too many digits
        raise NotPlain(f"a number that cannot be read: {error}") from None
    may_be_deep = text.count("[") + text.count("{") > DEPTH_MAX
    return to_plain(value) if may_be_deep or "\\ud" in text.lower() else value


def to_plain(value: Any) -> Any:
    """Return `value` as plain data; columns of a row are its keys. Raises NotPlain for a value without a plain form.

    Dates and times become ISO text, durations seconds, Decimal and UUID text, numpy's scalars and arrays Python's; NaN
    becomes null: pandas writes null as NaN. Bytes, images and infinite numbers are refused.
    """
    return _plain(value, (), 0)


def without_padding(value: Any) -> Any:
    """Return `value` without null keys, at any level: Arrow gives every object of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_padding(item) for key, item in value.items() if item is not None}
    return [without_padding(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any, place: tuple[str | int, ...], depth: int) -> Any:
    if value is None or (isinstance(value, bool | int) and type(value) in (bool, int)):
        return value
    if type(value) is float:
        return _finite(value, place)
    if isinstance(value, str):
        return _text(value, place)
    if depth == DEPTH_MAX:
        raise NotPlain(_too_deep())
    if isinstance(value, dict):
        return {
            _text(str(key), place): _plain(item, (*place, str(key)), depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, (*place, index), depth + 1) for index, item in enumerate(value)]
    return _plain_of_other(value, place, depth)


def _plain_of_other(value: Any, place: tuple[str | int, ...], depth: int) -> Any:
    """Return plain data for the kinds of values that JSON lacks."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):  # a whole number as such: an answer 72.00 is "72"
        return format(
            value.to_integral_value() if value == value.to_integral_value() else value, "f"
        )
    if isinstance(value, UUID):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        listed = value.tolist()
        if type(listed) is not type(value):
            return _plain(listed, place, depth)
    kind = (
        f"{len(value)} bytes"
        if isinstance(value, bytes | bytearray | memoryview)
        else type(value).__name__
    )
    raise NotPlain(
        f"{_name(place)} holds {kind}, which has no form as text or number. "
        "Fix: leave the column out, or store it as text"
    )


def _text(value: str, place: tuple[str | int, ...]) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = value[error.start]
            raise NotPlain(
                f"{_name(place)} has half of a surrogate pair, \\u{ord(found):04x}, at character {error.start}, "
                "which is not text. Fix: write the whole pair, or the character itself"
            ) from None
    return str(value)


def _finite(value: float, place: tuple[str | int, ...]) -> float | None:
    if math.isinf(value):
        raise NotPlain(
            f"{_name(place)} is {value}, which JSON cannot hold. Fix: leave it out, or store it as text"
        )
    return None if math.isnan(value) else value


def _name(place: tuple[str | int, ...]) -> str:
    """Return the place as messages name it: `column['key'][3]`."""
    if not place:
        return "the row"
    return f"column {place[0]!r}" + "".join(f"[{part!r}]" for part in place[1:])


def _too_deep() -> str:
    return f"lists and objects within each other at more than {DEPTH_MAX} levels"


def _constant(name: str) -> None:
    if name == "NaN":
        return
    raise NotPlain(f"not JSON: {name} is not a number there. Fix: null, or leave the key out")


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotPlain(f"the number {text[:40]} is too large for a float")
    return value


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise NotPlain(
            f"the key {twice!r} occurs twice in one object, and only one of its values could count"
        )
    return cast(dict[str, Any], found)
