"""Read what a host answers: find it among other output, and check its fields and their types.

A host's answer is data: nothing in it is trusted beyond what was asked. A malformed answer, or one with a field of
another type, is an error that names the host, shows what it said and tells what to do; never a traceback. Pure.
"""

import json
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin

from rollouts.remote.errors import DeployError

SAID_CHARS_MAX = 500
RUN_AGAIN = (
    "run the same command again; if it stays so, see what the host's shell or its Python prints"
)
Fields = Mapping[str, Any]  # name: a type, a union of types, list[...] or dict[str, ...]


class MalformedError(ValueError):
    """A value that is not what was asked for. The message says which, and what it should be."""


def read_answer(
    target: str,
    question: str,
    out: str,
    fields: Fields,
    *,
    prefix: str = "",
    started: bool = False,
) -> dict[str, Any]:
    """Return the last JSON object of `out` that has all of `fields`, each on its own line after `prefix`.

    What Python's own start and end print around it is passed over. Raises DeployError for none: `question` says what
    the host was asked, `started` whether something may run there now.
    """
    problem = "no line of it is a JSON object" + (f" after {prefix!r}" if prefix else "")
    problems: list[str] = []
    for line in reversed(out.splitlines()):
        if not line.startswith(prefix):
            continue
        try:
            answer = json.loads(line.removeprefix(prefix))
        except (ValueError, RecursionError):
            continue
        if isinstance(answer, dict):
            try:
                return checked(answer, fields)
            except MalformedError as error:
                problems.append(str(error))
    raise malformed(target, question, problems[0] if problems else problem, out, started=started)


def checked(value: object, fields: Fields, *, where: str = "") -> dict[str, Any]:
    """Return `value` if it is an object with `fields` of the right types; others may be there too.

    Raises MalformedError.
    """
    if not isinstance(value, dict):
        raise MalformedError(f"{where or 'it'} is {_shown(value)}, not an object")
    for name, kind in fields.items():
        place = f"{where}.{name}" if where else name
        if name not in value:
            raise MalformedError(f"{place} is missing")
        if not fits(value[name], kind):
            raise MalformedError(f"{place} is {_shown(value[name])}, not {_words(kind)}")
    return value


def fits(value: object, kind: Any) -> bool:
    """Return whether a JSON value is of this type. A number is finite; true and false are not numbers."""
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, parts[1]) for item in value.values())
    if kind in (int, float):
        numbers = (int, float) if kind is float else (int,)
        return isinstance(value, numbers) and not isinstance(value, bool) and _is_finite(value)
    return kind is Any or isinstance(value, kind or type(None))


def malformed(
    target: str, question: str, problem: str, said: str, *, started: bool = False
) -> DeployError:
    """Return the error for an answer that cannot be used."""
    shown = said if len(said) <= SAID_CHARS_MAX else "…" + said[-SAID_CHARS_MAX:]
    return DeployError(
        f"{target}: the host's answer to {question} cannot be read.",
        found=f"{problem}. It said: {shown.strip() or '(nothing)'}",
        fix=RUN_AGAIN,
        started=started,
    )


def read_count(target: str, question: str, out: str) -> int:
    """Return the one whole number, 0 or more, that `out` is. Raises DeployError."""
    text = out.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 25):
        raise malformed(target, question, "it is not a whole number", out)
    return int(text)


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _words(kind: Any) -> str:
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    if isinstance(kind, UnionType):
        return " or ".join(_words(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"an object of {_words(get_args(kind)[1])}"
    return words.get(kind, "an object")
