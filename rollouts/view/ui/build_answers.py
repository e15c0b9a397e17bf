"""What the config builder's page sends and is told: checked here, answered by the `ConfigBuilder`."""

from collections.abc import Callable, Mapping
from typing import Any

from rollouts.view.json_numbers import is_number
from rollouts.view.ui.desk import Desk
from rollouts.view.ui.run_source import PageError


def start(desk: Desk) -> dict[str, Any]:
    """Return what the page begins with."""
    return {"bases": desk.builder.bases(), "target": desk.builder.target}


def _text(asked: Mapping[str, Any], name: str) -> str:
    value = asked.get(name, "")
    if not isinstance(value, str):
        raise PageError(f"{name} needs to be a text", status=400)
    return value


def _settings(asked: Mapping[str, Any]) -> list[str]:
    values = asked.get("settings", [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise PageError("settings need to be a list of texts", status=400)
    return values


def _check(desk: Desk, asked: Mapping[str, Any]) -> dict[str, Any]:
    memory = asked.get("gpu_memory_gib", 80)
    if not is_number(memory) or not 0 < memory <= 4096:
        raise PageError(f"gpu_memory_gib={memory!r}: needs a number up to 4096", status=400)
    return desk.builder.checked(
        _text(asked, "base"), _settings(asked), gpu_memory_gib=memory, other=_text(asked, "other")
    )


POSTED: dict[str, Callable[[Desk, Mapping[str, Any]], dict[str, Any]]] = {
    "check": _check,
    "write": lambda desk, asked: desk.builder.write(
        _text(asked, "base"), _settings(asked), _text(asked, "file")
    ),
    "plan": lambda desk, asked: desk.builder.run(_text(asked, "file"), start=False),
    "start": lambda desk, asked: desk.builder.run(_text(asked, "file"), start=True),
}
