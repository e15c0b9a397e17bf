"""A config out of JSON, and the line of each key in the text."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from rollouts.config.types import nearest


def from_json(expected: Any, data: Any, path: str, errors: list[tuple[str, str]]) -> Any:
    """Build `expected` out of JSON. Missing and unknown keys go to `errors`; leaf types are left to `problems()`."""
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        nested = [choice for choice in typing.get_args(expected) if dataclasses.is_dataclass(choice)]
        return data if data is None or not nested else from_json(nested[0], data, path, errors)
    if typing.get_origin(expected) is list and isinstance(data, list):
        item = typing.get_args(expected)[0]
        return [from_json(item, value, f"{path}[{index}]", errors) for index, value in enumerate(data)]
    if not dataclasses.is_dataclass(expected):
        return data
    name = typing.cast(type, expected).__name__
    if not isinstance(data, dict):
        errors.append((path, f"needs an object with the fields of {name}, found {type(data).__name__}"))
        return None
    hints = typing.get_type_hints(expected)
    missing = [key for key in hints if key not in data]
    unknown = [key for key in data if key not in hints]
    errors += [(f"{path}.{key}", f"missing; {name} has no defaults") for key in missing]
    errors += [
        (f"{path}.{key}", f"unknown; {name} has {', '.join(hints)}{nearest(key, missing or hints)}") for key in unknown
    ]
    values = {key: from_json(hint, data[key], f"{path}.{key}", errors) for key, hint in hints.items() if key in data}
    return None if missing or unknown else typing.cast(Any, expected)(**values)


def json_lines(text: str) -> tuple[dict[str, int], list[str]]:
    """The line of each key of a JSON text that parses, by path ("config.rl.seed"), and the keys that stand twice."""
    lines: dict[str, int] = {"config": 1}
    twice: list[str] = []
    levels: list[dict[str, Any]] = []  # {"path", "key" (None: one comes next), "index" (None: an object)}
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[{}\[\],]', text):
        top = levels[-1] if levels else None
        if token[0] in "{[":
            path = "config"
            if top is not None:
                path = f"{top['path']}[{top['index']}]" if top["key"] is None else f"{top['path']}.{top['key']}"
            levels.append({"path": path, "key": None, "index": 0 if token[0] == "[" else None})
        elif token[0] in "}]":
            levels.pop()
        elif top is not None and token[0] == ",":
            top["key"] = None
            top["index"] = None if top["index"] is None else top["index"] + 1
        elif top is not None and top["index"] is None and top["key"] is None:
            top["key"] = json.loads(token[0])
            path = f"{top['path']}.{top['key']}"
            twice += [path] if path in lines else []
            lines[path] = text.count("\n", 0, token.start()) + 1
    return lines, twice


def line_of(path: str, lines: Mapping[str, int]) -> int:
    """Of a key, or of what it is missing in."""
    while path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["))]
    return lines[path]
