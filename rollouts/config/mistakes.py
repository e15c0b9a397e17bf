"""What went wrong in a config file, each with its line: an exception, or unknown and missing fields all at once."""

import ast
import contextlib
import dataclasses
import io
import re
import runpy
import sys
import traceback
import typing
from pathlib import Path
from typing import Any

from rollouts.config import schema
from rollouts.config.earlier import MOVED, MOVED_CLASSES
from rollouts.config.field_types import ConfigError, nearest
from rollouts.config.job import Config
from rollouts.python_source import parsed

_SECTIONS = [item for name in schema.__all__ if isinstance(item := getattr(schema, name), type)]
_CLASSES: tuple[type, ...] = (Config, *(item for item in _SECTIONS if item is not schema.Sections))


def describe_exception(file: Path, error: BaseException) -> str:
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file
    ]
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    wanted = re.match(
        r"cannot import name '(\w+)' from '(?:base_config|rollouts\.config)'|name '(\w+)' is not defined",
        str(error),
    )
    if wanted:
        name = wanted[1] or wanted[2]
        moved = MOVED_CLASSES.get(name)
        text += (
            f"; it is {moved} now" if moved else nearest(name, [item.__name__ for item in _CLASSES])
        )
    return f"{file}:{own[-1].lineno}: {text}" if own else f"{file}: {text}"


class _Unset:
    """The value of a field that a config file left out, so that its other mistakes are found too."""


def field_mistakes(file: Path) -> list[str]:
    """Execute a config file that failed once more, and list every unknown and missing field: "file:line: message".

    Meanwhile the schema's classes take what they are given and note what is wrong.
    """
    found: list[tuple[str, int, str]] = []
    originals = {item: item.__dict__["__init__"] for item in _CLASSES}
    try:
        for item in originals:
            setattr(item, "__init__", _noting_init(found))  # noqa: B010  (a type checker refuses the assignment)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            runpy.run_path(str(file))
    finally:
        for item, init in originals.items():
            setattr(item, "__init__", init)  # noqa: B010
    return [f"{name}:{line}: {message}" for name, line, message in sorted(set(found))]


def _noting_init(found: list[tuple[str, int, str]]) -> typing.Callable[..., None]:
    def note(self: Any, *args: Any, **given: Any) -> None:
        name, known = type(self).__name__, [field.name for field in dataclasses.fields(self)]
        file, line, lines = _calling_line(name)
        if args:
            found.append(
                (file, line, f"{name} takes its fields by name: {len(args)} came without one")
            )
        for key in given.keys() - set(known):
            moved = MOVED.get(name, {}).get(key)
            near = (
                f"; it is {moved} now"
                if moved
                else nearest(key, [k for k in known if k not in given] or known)
            )
            message = f"{name} has no field {key!r}{near}"
            found.append((file, lines.get(key, line), message))
        missing = [key for key in known if key not in given]
        if missing and not args:
            found.append(
                (
                    file,
                    line,
                    f"{name} needs {', '.join(map(repr, missing))}: no field has a default",
                )
            )
        for key in known:
            object.__setattr__(self, key, given.get(key, _Unset()))

    return note


def _calling_line(class_name: str) -> tuple[str, int, dict[str, int]]:
    """Return (file, line) of the call that makes an object of the schema, and the line of each field in it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, dataclasses.__file__):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    try:
        calls = [
            node for node in ast.walk(parsed(Path(file).read_text())) if isinstance(node, ast.Call)
        ]
    except (OSError, ValueError, SyntaxError):
        return file, line, {}
    here = [call for call in calls if call.lineno <= line <= (call.end_lineno or call.lineno)]
    own = [
        call
        for call in here
        if ast.unparse(call.func).rpartition(".")[2] in (class_name, "replace")
    ]
    keywords = [word for call in own if call.lineno == line for word in call.keywords if word.arg]
    return file, line, {str(word.arg): word.lineno for word in keywords}
