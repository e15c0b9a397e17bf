"""What the checks of all sections share. A check is (whether it holds, what to say where it does not)."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOTTED_NAME_PATTERN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+"
ENV_NAME_PATTERN = r"[A-Za-z_][A-Za-z0-9_]*"
PACKAGE_PREFIX = "rollouts:"  # of a name: a file that comes with rollouts, "rollouts:requirements/sglang-cuda.txt"
Check = tuple[bool, str]
Checks = Iterable[Check]


def must(ok: bool, path: str, value: Any, need: str) -> Check:
    return ok, f"{path}={value!r}: needs {need}"


def dotted_check(value: str, path: str, last: str = "function", *, more: str = "") -> Check:
    """Check a dotted path, with the one that was probably meant: "my_rewards:score" → my_rewards.score."""
    meant = re.sub(r"[:/]+", ".", value.removeprefix("./").removesuffix("()")).replace(".py.", ".")
    is_meant = meant != value and matches(DOTTED_NAME_PATTERN, meant)
    need = f"a dotted path, package.module.{last}{more}"
    return must(
        matches(DOTTED_NAME_PATTERN, value),
        path,
        value,
        need + (f"; did you mean {meant!r}?" if is_meant else ""),
    )


def at_least_one(group: Any, path: str, *names: str) -> Checks:
    for name in names:
        yield must(getattr(group, name) >= 1, f"{path}.{name}", getattr(group, name), ">= 1")


def one_or_off(group: Any, path: str, **off_means: str) -> Checks:
    for name, meaning in off_means.items():
        value = getattr(group, name)
        yield must(value >= 1 or value == -1, f"{path}.{name}", value, f">= 1, or -1 for {meaning}")


def seed_check(value: int, path: str) -> Check:
    return must(0 <= value < 2**32, path, value, "0 to 2**32 - 1")


def rank_checks(ranks: list[int], path: str) -> Checks:
    yield must(len(ranks) >= 1, path, ranks, "at least one device")
    yield must(len(set(ranks)) == len(ranks), path, ranks, "each device once")
    yield must(all(rank >= 0 for rank in ranks), path, ranks, "device indices, which start at 0")


def is_inside(file: str | None) -> bool:
    """Return whether it is None, or a relative path that stays in the repository."""
    return file is None or (
        bool(file.strip()) and not file.startswith("/") and ".." not in Path(file).parts
    )


def names_file(file: str | None) -> bool:
    """Return whether it can name a file whose text goes along: of the repository, or of the package ("rollouts:…")."""
    return is_inside(None if file is None else file.removeprefix(PACKAGE_PREFIX))


def matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None
