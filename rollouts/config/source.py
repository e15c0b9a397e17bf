"""A config as the Python file that builds it, every field spelled out."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from rollouts.config.explain import field_comments
from rollouts.config.job import Config

INDENT = 4 * " "
WIDTH = 120


def as_source(config: Config) -> str:
    """Return a config file that builds `config` and derives from no other one."""
    return f"from rollouts.config import *\n\nconfig = {_call(config, '', {})}\n"


def commented_source(config: Config, heading: str) -> str:
    """Return the same with each field's comment from the schema, importing from `rollouts.config` the names it uses.

    `heading` is the file's docstring.
    """
    classes: set[type] = {type(part) for part in _parts(config)}
    names = sorted((item.__name__ for item in classes), key=lambda name: (not name.isupper(), name))
    imports = "".join(f"{INDENT}{name},\n" for name in names)
    value = _call(config, "", {item.__name__: field_comments(item) for item in classes})
    escaped = heading.replace("\\", "\\\\").replace('"', '\\"')  # a name may hold anything
    return f'"""{escaped}"""\n\nfrom rollouts.config import (\n{imports})\n\nconfig = {value}\n'


def _parts(value: Any) -> Iterator[Any]:
    """Return every dataclass that a config is made of."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, list):
        for item in value:
            yield from _parts(item)


def _call(value: Any, margin: str, comments: dict[str, dict[str, str]]) -> str:
    """Return the expression that builds a value; its first line is not indented, the others by `margin` and more."""
    inner = margin + INDENT
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # of the first of its class: the next ones say no more
        own = comments.pop(type(value).__name__, {})
        lines = [
            _with_comment(
                f"{name}={_call(getattr(value, name), inner, comments)},", own.get(name), inner
            )
            for name in (field.name for field in dataclasses.fields(value))
        ]
        return f"{type(value).__name__}(\n{''.join(lines)}{margin})"
    if isinstance(value, list) and any(dataclasses.is_dataclass(item) for item in value):
        return f"[\n{''.join(f'{inner}{_call(item, inner, comments)},{chr(10)}' for item in value)}{margin}]"
    return literal(value)


def literal(value: Any) -> str:
    """Return a plain value as Python writes it, texts in double quotes where they hold none."""
    if isinstance(value, str) and '"' not in value:
        return f'"{repr(value)[1:-1]}"'  # repr takes double quotes by itself where there are single ones
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(key)}: {literal(item)}' for key, item in value.items())}}}"
    return repr(value)


def _with_comment(text: str, comment: str | None, margin: str) -> str:
    """Return the lines of a field: its comment behind it where that fits and it has one line, else above it."""
    if not comment:
        return f"{margin}{text}\n"
    if "\n" not in text and len(line := f"{margin}{text}  # {comment}") <= WIDTH:
        return f"{line}\n"
    above = textwrap.wrap(comment, WIDTH - len(margin) - 2)
    return "".join(f"{margin}# {part}\n" for part in above) + f"{margin}{text}\n"
