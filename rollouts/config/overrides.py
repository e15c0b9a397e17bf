"""`--set rl.matrix_lr=1e-6,3e-6 --set rl.seed=0,1`: the runs that they ask for, each a whole config. Pure."""

import ast
import dataclasses
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rollouts.config import schema
from rollouts.config.changed import changed
from rollouts.config.field_types import ConfigError, nearest, nearest_path, type_problems
from rollouts.config.job import Config
from rollouts.config.json_form import field_types
from rollouts.python_source import parsed_expression

SETTING_CHARS_MAX = 4000
# by what others write for them
WORDS: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}
GROUPS: dict[str, Any] = {
    name: getattr(schema, name)
    for name in schema.__all__
    if dataclasses.is_dataclass(getattr(schema, name))
}
SHORT_MAX = 40  # letters of a run's name that say what differs


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    config: Config
    label: str  # what differs from the others: "matrix_lr-1e-6_seed-0"; "" where there is one run alone
    values: dict[str, Any]  # by the whole path


def combinations(settings: Sequence[str]) -> int:
    """Return how many runs the settings ask for, without making any."""
    return math.prod(len(_split(setting.partition("=")[2])) for setting in settings)


def variants(base: Config, settings: Sequence[str]) -> list[Variant]:
    """Return the runs that `path=value[,value…]` settings ask for: all combinations, the first setting slowest.

    A value is written as in the config file; one of a text needs no quotes. A value with a comma of its own stands in
    brackets, quotes or parentheses. A field of one name in one section alone may be named without it ("seed").
    Raises ConfigError naming every setting that is wrong.
    """
    problems: list[str] = []
    choices: dict[str, list[Any]] = {}
    for setting in settings:
        try:
            path, values = _setting(base, setting)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if path in choices:
            problems.append(f"--set {setting}: {path} is set twice")
        choices[path] = values
    if problems:
        raise ConfigError("\n".join(problems))
    many = [path for path, values in choices.items() if len(values) > 1]
    found = []
    for combination in itertools.product(*choices.values()):
        fields = dict(zip(choices, combination, strict=True))
        found.append(
            Variant(changed(base, fields), _label({path: fields[path] for path in many}), fields)
        )
    return found


def _setting(base: Config, setting: str) -> tuple[str, list[Any]]:
    if len(setting) > SETTING_CHARS_MAX:
        raise ConfigError(
            f"--set {setting[:60]}…: has {len(setting)} characters; {SETTING_CHARS_MAX} at most"
        )
    path, sign, text = setting.partition("=")
    if not sign or not path:
        raise ConfigError(f"--set {setting}: needs field=value, such as rl.matrix_lr=1e-6")
    path = _whole_path(base, path.strip(), setting)
    expected = _type_at(base, path)
    try:
        values = [_value(part.strip(), expected) for part in _split(text)]
    except ConfigError as error:
        raise ConfigError(f"--set {setting}: {error}") from None
    if len({repr(value) for value in values}) < len(values):
        raise ConfigError(f"--set {setting}: names a value twice")
    for value in values:
        found = [message for _, message in type_problems(value, expected, path)]
        if found:
            swept = "" if len(values) == 1 else "; a comma begins the value of another run"
            raise ConfigError(f"--set {setting}: {found[0]}{_meant(value, expected)}{swept}")
    return path, values


def _meant(value: Any, expected: Any) -> str:
    """Return "; write …" for a value whose type is wrong, where what was meant can be told."""
    if isinstance(value, float) and value.is_integer() and _fits(int(value), expected):
        return f"; write {int(value)}"
    if value == "":
        return "; nothing stands where a value should"
    by_text = _meant_by_text(value, expected) if isinstance(value, str) else ""
    return by_text or _as_call(value, expected)


def _meant_by_text(value: str, expected: Any) -> str:
    if value.lower() in WORDS and _fits(WORDS[value.lower()], expected):
        return f"; write {WORDS[value.lower()]}"
    texts = [part.strip(" '\"") for part in value.strip("[]").split(",")]
    if _fits(texts, expected):
        return f"; texts in a list stand in quotes, and all of it in the shell's: {json.dumps(texts)!r}"
    odd = sorted({letter for letter in value if not letter.isascii()})
    return f"; {' '.join(odd)} is not a sign of numbers" if odd else ""


def _as_call(value: Any, expected: Any) -> str:
    """Return how a group is written, in a list where it stands in one: that which the value names, else the first."""
    is_list = typing.get_origin(expected) is list
    kinds = typing.get_args(expected)[0] if is_list else expected
    groups = [kind for kind in (kinds, *typing.get_args(kinds)) if kind in GROUPS.values()]
    if not groups:
        return ""
    text = str(value).lower()
    named = [group for group in groups if group.__name__.lower() in text] or groups
    call = f"{named[0].__name__}({', '.join(f'{name}=…' for name in field_types(named[0]))})"
    return f"; write {f'[{call}]' if is_list else call}, all of it in the shell's quotes"


def _whole_path(base: Config, path: str, setting: str) -> str:
    """Return the path of a field that this config has. Raises ConfigError with the nearest one."""
    known = list(_paths(base, ""))
    if path in known:
        return path
    same_end = [other for other in known if other.endswith(f".{path}")]
    if len(same_end) == 1:
        return same_end[0]
    if same_end:
        raise ConfigError(f"--set {setting}: {path!r} may be {' or '.join(same_end)}: name one")
    raise ConfigError(
        f"--set {setting}: this config has no field {path!r}{nearest_path(path, known)}"
    )


def _paths(value: Any, prefix: str) -> Iterator[str]:
    """Return the path of every field under a value, those of groups too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield f"{prefix}{field.name}"
            yield from _paths(getattr(value, field.name), f"{prefix}{field.name}.")
    elif isinstance(value, list):
        for at, item in enumerate(value):
            if dataclasses.is_dataclass(item):
                yield f"{prefix}{at}"
                yield from _paths(item, f"{prefix}{at}.")


def _type_at(value: Any, path: str) -> Any:
    """Return the declared type of the field at a path that exists."""
    expected: Any = type(value)
    for name in path.split("."):
        if isinstance(value, list):
            expected, value = typing.get_args(expected)[0], value[int(name)]
        else:
            expected, value = field_types(type(value))[name], getattr(value, name)
    return expected


def _split(text: str) -> list[str]:
    """Return the parts between commas that stand in no brackets or quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _value(text: str, expected: Any) -> Any:
    """Return a value as the config file would have it: groups by their calls, a text with or without quotes."""
    try:
        value = _read(parsed_expression(text))
    except (ValueError, RecursionError, MemoryError):
        return text
    except SyntaxError as error:
        if _takes_text(expected) or not any(f"{name}(" in text for name in GROUPS):
            return text
        raise ConfigError(str(error)) from None
    if _takes_text(expected) and not _fits(value, expected):
        return text  # such as the name 0.5B or 1
    return (
        float(value)
        if isinstance(value, int) and not isinstance(value, bool) and expected is float
        else value
    )


def _read(node: ast.expr) -> Any:
    """Return a plain value or groups. Raises ValueError for another expression, ConfigError for a wrong call."""
    match node:
        case ast.List(elts=items):
            return [_read(item) for item in items]
        case ast.Call(func=ast.Name(id=name)) if name in GROUPS:
            return _called(node, name)
    return ast.literal_eval(node)


def _called(call: ast.Call, name: str) -> Any:
    """Return a group of the schema out of its call with plain values and groups. Raises ConfigError."""
    text = ast.unparse(call)
    if call.args:
        raise ConfigError(f"{text}: {name} takes its fields by name")
    try:
        fields = {str(word.arg): _read(word.value) for word in call.keywords}
    except ValueError:
        raise ConfigError(
            f"{text}: needs plain values: numbers, texts, True, False, None, lists, groups"
        ) from None
    _check_names(name, list(fields))
    return GROUPS[name](**fields)


def _check_names(name: str, given: Sequence[str]) -> None:
    """Raise ConfigError for fields that a group of the schema lacks, or that are left out."""
    known = [field.name for field in dataclasses.fields(GROUPS[name])]
    left = [field for field in known if field not in given]
    if unknown := [field for field in given if field not in known]:
        raise ConfigError(f"{name} has no field {unknown[0]!r}{nearest(unknown[0], left or known)}")
    if left:
        raise ConfigError(f"{name} needs {', '.join(map(repr, left))}: no field has a default")


def _takes_text(expected: Any) -> bool:
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return any(map(_takes_text, typing.get_args(expected)))
    return expected is str or typing.get_origin(expected) is Literal


def _fits(value: Any, expected: Any) -> bool:
    return not any(True for _ in type_problems(value, expected, ""))


def _label(values: dict[str, Any]) -> str:
    """Return what differs, as a part of a run's name."""
    words = [f"{path.rpartition('.')[2]}-{_word(value)}" for path, value in values.items()]
    return "_".join(words)[:SHORT_MAX].strip("-_")


def _word(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9-]+", "-", text).strip("-") or "none"
