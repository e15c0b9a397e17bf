"""A config as the Python file that builds it, every field spelled out."""

import dataclasses
from typing import Any

from rollouts.config.config import Config

_INDENT = 4 * " "


def as_source(config: Config) -> str:
    """A config file that builds `config` and derives from no other one."""
    return f"from base_config import *\n\nconfig = {_source(config, '')}\n"


def _source(value: Any, margin: str) -> str:
    inner = margin + _INDENT
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f"{field.name}={_source(getattr(value, field.name), inner)}" for field in dataclasses.fields(value)]
        return _block(f"{type(value).__name__}(", fields, ")", margin)
    if isinstance(value, list) and any(dataclasses.is_dataclass(item) for item in value):
        return _block("[", [_source(item, inner) for item in value], "]", margin)
    return repr(value)


def _block(begin: str, items: list[str], end: str, margin: str) -> str:
    lines = "".join(f"{margin}{_INDENT}{item},\n" for item in items)
    return f"{begin}\n{lines}{margin}{end}"
