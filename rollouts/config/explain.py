"""The schema as documentation: every field with its type, its meaning and its choices, read from the schema's source.

`deploy explain` and docs/reference/config.md are made from it. Standard library only.
"""

import ast
import dataclasses
import functools
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rollouts.config.field_types import ConfigError, nearest_path
from rollouts.config.job import Config
from rollouts.config.json_form import field_types
from rollouts.python_source import class_source, parsed

_ITEM = re.compile(r"\[\d+\]|\.\d+(?=\.|$)")  # the place of an item in a list


@dataclass(frozen=True)
class FieldDoc:
    """One field of the config."""

    path: str  # "rl.matrix_lr", "rl.loss[PPO].clip_low" of one class among several, "data.sft_mixture[].name" of a list
    type: str  # as one writes it: "float", '"none" | "group_std"', "KLConfig | None"
    meaning: str  # the comment in the schema; of a section its docstring
    section: str  # the class that has it

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2].rstrip("[]")


@functools.cache
def all_fields() -> tuple[FieldDoc, ...]:
    """Return every field of a config, sections before their parts, in the order of the schema."""
    return tuple(_fields_of(Config, ""))


def explain(path: str) -> tuple[FieldDoc, ...]:
    """Return the field at `path` with all below it; a name alone ("matrix_lr") finds it in every section.

    A path may leave out the class in brackets ("rl.loss.clip_low"), and name an item of a list
    ("data.sft_mixture[0].name", as `--set` and messages write it). Raises ConfigError with the nearest path.
    """
    fields = all_fields()
    path = _ITEM.sub("", path)
    written = str if "[" in path else _plain  # as it stands, or without the classes of all paths
    found = [field for field in fields if f"{written(field.path)}.".startswith(f"{path}.")]
    found = found or [field for field in fields if path in (field.name, field.section)]
    if not found:
        known = [
            *(_plain(field.path) for field in fields),
            *dict.fromkeys(field.name for field in fields),
        ]
        raise ConfigError(f"explain: a config has no field {path!r}{nearest_path(path, known)}")
    return tuple(found)


def section_docs() -> dict[str, str]:
    """Return the docstring of every class of the schema that a config is made of, in order; "" where it has none."""
    sections = dict.fromkeys(field.section for field in all_fields())
    classes = {item.__name__: item for item in _classes(Config)}
    return {name: _docstring(classes[name]) for name in sections}


def _fields_of(schema: type, prefix: str) -> Iterator[FieldDoc]:
    comments = field_comments(schema)
    for name, expected in field_types(schema).items():
        path = f"{prefix}{name}"
        parts = list(_dataclasses(expected))
        meaning = comments.get(name) or (_docstring(parts[0]) if len(parts) == 1 else "")
        yield FieldDoc(path, type_text(expected), meaning, schema.__name__)
        is_list = typing.get_origin(expected) is list
        for part in parts:
            inner = (
                f"{path}[{part.__name__}]."
                if len(parts) > 1
                else f"{path}[]."
                if is_list
                else f"{path}."
            )
            yield from _fields_of(part, inner)


def type_text(expected: Any) -> str:
    """Return a type as a person writes the value: choices in quotes, classes by name."""
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_text(choice) for choice in typing.get_args(expected))
    if origin is Literal:
        return " | ".join(
            f'"{choice}"' if isinstance(choice, str) else repr(choice)
            for choice in expected.__args__
        )
    if origin is not None:
        return (
            f"{origin.__name__}[{', '.join(type_text(item) for item in typing.get_args(expected))}]"
        )
    return "None" if expected is type(None) else str(expected.__name__)


def _dataclasses(expected: Any) -> Iterator[type]:
    """Return the dataclasses that a value of this type may be, or hold."""
    if dataclasses.is_dataclass(expected):
        yield typing.cast(type, expected)
    for part in typing.get_args(expected):
        yield from _dataclasses(part)


def _classes(schema: type) -> Iterator[type]:
    yield schema
    for expected in field_types(schema).values():
        for part in _dataclasses(expected):
            yield from _classes(part)


def _docstring(schema: type) -> str:
    doc = schema.__doc__ or ""
    # dataclass writes a signature
    return "" if doc.startswith(f"{schema.__name__}(") else inspect.cleandoc(doc)


@functools.cache
def field_comments(schema: type) -> dict[str, str]:
    """Return {field: the comments on its lines, and right above} of a class of the schema and of those that it inherits
    from."""
    found: dict[str, str] = {}
    for item in reversed(schema.__mro__):
        if dataclasses.is_dataclass(item):
            found |= _own_comments(item)
    return found


def _own_comments(schema: type) -> dict[str, str]:
    source = class_source(schema)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    alone = [line.lstrip().startswith("#") for line in source.splitlines()]
    body = typing.cast(ast.ClassDef, parsed(source).body[0]).body
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in comments and alone[first - 2]:
                first -= 1
            last = node.end_lineno or node.lineno
            said = [comments[line] for line in range(first, last + 1) if line in comments]
            found[node.target.id] = " ".join(said)
    return found


def _plain(path: str) -> str:
    """Return a path without its brackets: "rl.loss[PPO].clip_low" → "rl.loss.clip_low"."""
    kept, depth = [], 0
    for letter in path:
        depth += letter == "["
        if not depth:
            kept.append(letter)
        depth -= letter == "]"
    return "".join(kept)
