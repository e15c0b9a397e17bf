"""Commands out of functions: a parameter's annotation says how it is written on the command line. Over click alone.

def logs(run: Annotated[str, Argument(metavar="RUN")], as_json: Annotated[bool, Option("--json")] = False): ...
"""

import inspect
import pathlib
import types
import typing
from collections.abc import Callable
from typing import Any

import click

Presence = dict[str, Any]  # {"required": True}, or a default


class Option:
    """An option: its names, else the parameter's. A bool is a flag, which without names has a --no-… too."""

    def __init__(
        self,
        *names: str,
        metavar: str | None = None,
        help: str = "",
        min: float | None = None,
        max: float | None = None,
    ) -> None:
        self.names, self.metavar, self.help, self.min, self.max = names, metavar, help, min, max

    def param(self, name: str, kind: type, presence: Presence) -> click.Parameter:
        flag = "--" + name.replace("_", "-")
        names = list(self.names) or [flag]
        if kind is bool:
            names = names if self.names else [f"{flag}/--no-{flag.removeprefix('--')}"]
            return click.Option([*names, name], is_flag=True, help=self.help, **presence)
        return click.Option(
            [*names, name],
            type=_click_type(kind, self.min, self.max),
            metavar=self.metavar,
            help=self.help,
            show_default=presence.get("default") is not None,
            **presence,
        )


class Argument:
    """A word without a name."""

    def __init__(self, *, metavar: str, help: str = "") -> None:
        self.metavar, self.help = metavar, help

    def param(self, name: str, kind: type, presence: Presence) -> click.Parameter:
        kind_of = _click_type(kind)
        return click.Argument([name], type=kind_of, metavar=self.metavar, help=self.help, **presence)


def params_of(function: Callable[..., Any]) -> list[click.Parameter]:
    """Return the parameters of a command that calls `function` by keyword."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, how = typing.get_args(hints[name])
        assert isinstance(how, Option | Argument), f"{function.__name__}: {name} lacks an Option or Argument"
        is_required = parameter.default is inspect.Parameter.empty  # click takes a default of None for a value
        presence: Presence = {"required": True} if is_required else {"default": parameter.default, "required": False}
        found.append(how.param(name, _without_none(kind), presence))
    return found


def _without_none(kind: Any) -> type:
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    assert isinstance(kind, type), kind
    return kind


def _click_type(kind: type, least: float | None = None, most: float | None = None) -> Any:
    if kind is pathlib.Path:
        return click.Path(path_type=pathlib.Path)
    if least is None and most is None:
        return kind
    bounded: Any = click.IntRange if kind is int else click.FloatRange
    return bounded(least, most)
