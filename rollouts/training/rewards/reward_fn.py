"""Reward functions in general: found by dotted path, their error, their value as training takes it, their row check."""

import importlib
import math
from collections.abc import Callable
from typing import Any

from rollouts.training.types import Prompt, Sample
from rollouts.training.user_code import USER_ERRORS, describe, hiding_module

ROUNDING = 1e-6


class RewardError(ValueError):
    """A dotted path that does not name a function, a row that lacks what its reward needs, or a reward that failed."""


def set_row_check(reward: Callable[[Sample], float], check: Callable[[Prompt], str | None]) -> None:
    """Give a reward a check of rows before anything is sampled: why it could not score any response to a row."""
    setattr(reward, "row_problem", check)  # noqa: B010  (functions have no such attribute)


def row_check_of(reward: Callable[..., Any]) -> Callable[[Prompt], str | None] | None:
    """Return the reward's `row_problem`: prompt row -> reason to leave it out, or None. None for a reward without."""
    check = getattr(reward, "row_problem", None)
    return check if callable(check) else None


def resolve(dotted_path: str) -> Callable[..., Any]:
    """Return the function that a dotted path names. Raises RewardError for a missing part, or one not callable."""
    module_name, _, attribute = dotted_path.rpartition(".")
    if not module_name:
        raise RewardError(f"{dotted_path!r}: needs a dotted path, package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        _refuse_hidden(dotted_path)
        raise RewardError(
            f"{dotted_path!r}: no module {error.name!r}; it must be importable where the trainer runs"
        ) from None
    except USER_ERRORS as error:
        raise RewardError(
            f"{dotted_path!r}: importing {module_name} raised {describe(error)}"
        ) from error
    if not hasattr(module, attribute):
        _refuse_hidden(dotted_path)
        names = [
            name
            for name in vars(module)
            if not name.startswith("_") and callable(getattr(module, name))
        ]
        raise RewardError(
            f"{dotted_path!r}: module {module_name!r} has no {attribute!r}; it has {', '.join(names)}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise RewardError(f"{dotted_path!r}: is {type(function).__name__}, needs to be a function")
    return function


def _refuse_hidden(dotted_path: str) -> None:
    """Raise RewardError where another module was imported than the one in the user's repository."""
    if file := hiding_module(dotted_path):
        raise RewardError(
            f"{dotted_path!r}: {file} is imported in place of the module in your repository, which has the same name;"
            " rename yours"
        )


def finite_or_none(value: Any, sample: Sample, *, source: str = "reward_fn") -> float | None:
    """Return a reward as training takes it.

    Raises RewardError, naming source, prompt and response, for one that is neither a finite number nor None.
    """
    try:
        if value is None or math.isfinite(value):
            return None if value is None else float(value)
    except (TypeError, OverflowError):  # not a number; an integer beyond every float
        pass
    raise RewardError(
        f"{source} returned {str(value)[:80] if isinstance(value, int) else repr(value)[:80]} for "
        f"{sample.response[:80]!r}; needs a finite number or None (prompt {str(sample.prompt)[:200]})"
    )


def is_full(score: float) -> bool:
    """Return whether a score is 1, up to rounding: parts may add up to 0.9999999999999999."""
    return abs(score - 1.0) <= ROUNDING
