"""Check values against the types that the schema declares."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal


class ConfigError(Exception):
    """A config that cannot be read. The message names the file, the line or key, and the fix."""


def type_problems(value: Any, expected: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for each place under `value` whose type is not what the schema says."""
    origin = typing.get_origin(expected)
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, typing.cast(type, expected)):
            yield path, f"{path}={value!r}: needs a {typing.cast(type, expected).__name__}"
            return
        hints = typing.get_type_hints(expected)
        for field in dataclasses.fields(typing.cast(Any, value)):
            yield from type_problems(
                getattr(value, field.name), hints[field.name], f"{path}.{field.name}".lstrip(".")
            )
    elif origin in (typing.Union, types.UnionType):
        yield from _union_problems(value, typing.get_args(expected), path)
    elif origin is list:
        if not isinstance(value, list):
            yield path, f"{path}={value!r}: needs a list"
            return
        for index, item in enumerate(value):
            yield from type_problems(item, typing.get_args(expected)[0], f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict) or not all(
            isinstance(text, str) for pair in value.items() for text in pair
        ):
            yield path, f"{path}={value!r}: needs a dict of str to str"
    elif origin is Literal:
        choices = typing.get_args(expected)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            near = nearest(str(value), [choice for choice in choices if isinstance(choice, str)])
            yield path, f"{path}={value!r}: needs one of {', '.join(map(repr, choices))}{near}"
    else:
        yield from _scalar_problems(value, expected, path)


def _union_problems(value: Any, choices: tuple[Any, ...], path: str) -> Iterator[tuple[str, str]]:
    if value is None and type(None) in choices:
        return
    others = [choice for choice in choices if choice is not type(None)]
    of_its_class = [
        choice for choice in others if dataclasses.is_dataclass(choice) and type(value) is choice
    ]
    if of_its_class or len(others) == 1:
        yield from type_problems(value, (of_its_class or others)[0], path)
        return
    if all(any(True for _ in type_problems(value, choice, path)) for choice in others):
        names = [
            repr(a) for c in others if typing.get_origin(c) is Literal for a in typing.get_args(c)
        ]
        names += [c.__name__ for c in others if isinstance(c, type)]
        names += [str(c) for c in others if typing.get_origin(c) is list]
        near = nearest(str(value).partition("(")[0], [name.strip("'") for name in names])
        yield path, f"{path}={value!r}: needs one of {', '.join(names)}{near}"


def _scalar_problems(value: Any, expected: type, path: str) -> Iterator[tuple[str, str]]:
    accepted = (int, float) if expected is float else (expected,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        yield path, f"{path}={value!r}: needs {expected.__name__}, found {type(value).__name__}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{path}={value!r}: needs a finite number"


def nearest_path(path: str, known: Iterable[str]) -> str:
    """Return as `nearest` the field that was meant: one of that name in the same section, at another depth, first."""
    paths = list(known)
    top, _, name = path.partition(".")
    name = name.rpartition(".")[2]
    inside = [
        other for other in paths if other.startswith(f"{top}.") and other.endswith(f".{name}")
    ]
    if name and len(inside) == 1:
        return f"; did you mean {inside[0]!r}?"
    return nearest(path, paths)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?", or "" if no name is near."""
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)
    return f"; did you mean {folded[near[0]]!r}?" if near and folded[near[0]] != name else ""
