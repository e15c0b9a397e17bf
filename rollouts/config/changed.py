"""A config made from another one by changing some of its fields."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from rollouts.config.field_types import ConfigError, nearest
from rollouts.config.job import Config


def changed(base: Config, fields: Mapping[str, Any]) -> Config:
    """Return `base` with new values at paths such as "rl.sampling.seed" or "data.rl_mixture.0.max_samples".

    Raises ConfigError for every path that leads nowhere, each with the nearest name.
    """
    result: Any = base
    errors: list[str] = []
    for path, value in fields.items():
        try:
            result = _replaced(result, path, path, value)
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    return typing.cast(Config, result)


def _replaced(value: Any, path: str, whole: str, new: Any) -> Any:
    head, _, rest = path.partition(".")
    if isinstance(value, list):
        if not (head.isdecimal() and int(head) < len(value)):
            raise ConfigError(
                f"changed: {whole!r}: {head!r} is not an index of a list of {len(value)}"
            )
        at = int(head)
        return [
            *value[:at],
            _replaced(value[at], rest, whole, new) if rest else new,
            *value[at + 1 :],
        ]
    known = (
        [field.name for field in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else []
    )
    if head not in known:
        what = f"{type(value).__name__} has no field {head!r}{nearest(head, known)}"
        raise ConfigError(f"changed: {whole!r}: {what}")
    inner = _replaced(getattr(value, head), rest, whole, new) if rest else new
    return dataclasses.replace(value, **{head: inner})
