"""A config out of JSON, and the line of each key in the text."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from rollouts.config.field_types import nearest


def field_types(schema: Any) -> dict[str, Any]:
    """Return the fields of a dataclass with their types, without class variables."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def from_json(expected: Any, data: Any, path: str, errors: list[tuple[str, str]]) -> Any:
    """Build `expected` out of JSON. Missing and unknown keys go to `errors`; leaf types are left to `problems()`."""
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return _one_of(typing.get_args(expected), data, path, errors)
    if typing.get_origin(expected) is list and isinstance(data, list):
        item = typing.get_args(expected)[0]
        return [
            from_json(item, value, f"{path}[{index}]", errors) for index, value in enumerate(data)
        ]
    if not dataclasses.is_dataclass(expected):
        return data
    name = typing.cast(type, expected).__name__
    if not isinstance(data, dict):
        errors.append(
            (path, f"needs an object with the fields of {name}, found {type(data).__name__}")
        )
        return None
    hints = field_types(expected)
    missing = [key for key in hints if key not in data]
    unknown = [key for key in data if key not in hints]
    errors += [(f"{path}.{key}", f"missing; {name} has no defaults") for key in missing]
    errors += [
        (f"{path}.{key}", f"unknown; {name} has {', '.join(hints)}{nearest(key, missing or hints)}")
        for key in unknown
    ]
    values = {
        key: from_json(hint, data[key], f"{path}.{key}", errors)
        for key, hint in hints.items()
        if key in data
    }
    return None if missing or unknown else typing.cast(Any, expected)(**values)


def _one_of(choices: tuple[Any, ...], data: Any, path: str, errors: list[tuple[str, str]]) -> Any:
    """Build the dataclass among `choices` out of an object: of several the one that "kind" names. Others are leaves."""
    classes = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    plain = len(classes) < len([choice for choice in choices if choice is not type(None)])
    if data is None or not classes or (plain and not isinstance(data, dict)):
        return data
    if len(classes) == 1:
        return from_json(classes[0], data, path, errors)
    kinds = {typing.cast(Any, choice).kind: choice for choice in classes}
    known = ", ".join(map(repr, kinds))
    if not isinstance(data, dict):
        errors.append(
            (path, f'needs an object with "kind" (one of {known}) and its fields, found {data!r}')
        )
        return None
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        found = f"{kind!r}: " if "kind" in data else "missing; "
        near = nearest(kind, kinds) if isinstance(kind, str) else ""
        errors.append((f"{path}.kind", f"{found}needs one of {known}{near}"))
        return None
    return from_json(
        kinds[kind], {key: value for key, value in data.items() if key != "kind"}, path, errors
    )


def to_json(value: Any, expected: Any) -> Any:
    """Invert `from_json`: if `expected` allows several dataclasses, "kind" says which one `value` is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            name: to_json(getattr(value, name), hint)
            for name, hint in field_types(type(value)).items()
        }
        choices = [
            choice for choice in typing.get_args(expected) if dataclasses.is_dataclass(choice)
        ]
        return {"kind": typing.cast(Any, value).kind, **fields} if len(choices) > 1 else fields
    if isinstance(value, list):
        item = typing.get_args(expected)[0] if typing.get_origin(expected) is list else None
        return [to_json(each, item) for each in value]
    return dict(value) if isinstance(value, dict) else value


def json_lines(text: str) -> tuple[dict[str, int], list[str]]:
    """Return the line of each key of a valid JSON text, by path ("config.rl.loss"), and the keys given twice."""
    lines: dict[str, int] = {"config": 1}
    twice: list[str] = []
    # {"path", "key" (None: one comes next), "index" (None: an object)}
    levels: list[dict[str, Any]] = []
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[{}\[\],]', text):
        top = levels[-1] if levels else None
        if token[0] in "{[":
            path = "config"
            if top is not None:
                path = (
                    f"{top['path']}[{top['index']}]"
                    if top["key"] is None
                    else f"{top['path']}.{top['key']}"
                )
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
    """Return the line of a key, or of what it is missing in."""
    while path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["))]
    return lines[path]
