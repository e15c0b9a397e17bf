"""Where two configs differ, field by field. Standard library only."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rollouts.config.job import Config

MISSING = "(has no such field)"
SEEDS = ("seed", "init_seed", "shuffle_seed")
KEPT_WHERE = ("output.save_dir", "output.experiment_name")


@dataclass(frozen=True)
class Difference:
    """One field that two configs have with different values, or that one of them lacks."""

    path: str  # "rl.matrix_lr", "rl.loss.clip_low", "data.sft_mixture.0.name"
    before: Any
    after: Any  # MISSING where the config has no such field


def differences(before: Config, after: Config) -> tuple[Difference, ...]:
    """Return what differs, in the order of the schema; () for equal configs.

    Where one has another class in a field (GRPO, PPO), that field comes first, then the fields of both.
    """
    return tuple(_differences(before, after, ""))


def differ_in_seeds_alone(before: Config, after: Config) -> bool:
    """Return whether two configs describe one experiment: all that differs is seeds, and where results are kept."""
    names = (
        item.path for item in differences(before, after) if not item.path.startswith(KEPT_WHERE)
    )
    return all(name.rpartition(".")[2] in SEEDS for name in names)


def _differences(before: Any, after: Any, path: str) -> Iterator[Difference]:
    if _is_group(before) or _is_group(after):
        if type(before) is not type(after):
            yield Difference(path, _name(before), _name(after))
        first, second = _parts(before), _parts(after)
        for key in dict.fromkeys((*first, *second)):
            inner = f"{path}.{key}" if path else str(key)
            yield from _differences(first.get(key, MISSING), second.get(key, MISSING), inner)
    elif type(before) is not type(after) or before != after:
        yield Difference(path, before, after)


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or (
        isinstance(value, list) and any(map(dataclasses.is_dataclass, value))
    )


def _parts(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {str(at): item for at, item in enumerate(value)} if isinstance(value, list) else {}


def _name(value: Any) -> Any:
    """Return a group by the name of its class; any other value as it is."""
    return type(value).__name__ if dataclasses.is_dataclass(value) else value
