"""What every reward shares: its error, the answer of a row, and finding a function by its dotted path."""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from rollouts.training.types import Prompt, Sample
from rollouts.training.user_code import USER_ERRORS, describe

ROUNDING = 1e-6


class RewardError(ValueError):
    """A dotted path that names no function, a prompt without what its reward needs, or a reward that failed."""


def answer_of(sample: Sample) -> str:
    """The row's "answer" as text: 72.0 is "72". Raises RewardError for none, and for several: never a silent 0."""
    texts = answers_of(sample)
    if len(texts) > 1:
        raise RewardError(f"prompt {str(sample.prompt)[:120]!r} has {len(texts)} answers; this reward compares one")
    return texts[0]


def answers_of(sample: Sample) -> list[str]:
    """Every text that is right: those of a list, else the one answer. Raises RewardError where there is none."""
    value = column_of(sample, "answer")
    texts = [_text_of(one) for one in (value if isinstance(value, list | tuple) else [value])]
    if not texts or None in texts:
        raise RewardError(
            f"answer={str(value)[:120]!r} ({type(value).__name__}): needs a string, a number, or a list of such"
        )
    return [text for text in texts if text is not None]


def _text_of(value: Any) -> str | None:
    """An answer as a response would have it; None for what is none. A whole number has no ".0": pandas writes that."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def any_answer(reward: Callable[[Sample], float]) -> Callable[[Sample], float]:
    """A reward that compares with one answer, for rows that accept several: the best of what each of them gives."""

    @functools.wraps(reward)
    def best(sample: Sample) -> float:
        accepted = answers_of(sample)
        if len(accepted) == 1:
            return reward(sample)
        rows = [{**cast(dict[str, Any], sample.prompt), "answer": text} for text in accepted]
        return max(reward(replace(sample, prompt=row)) for row in rows)

    return best


def set_row_check(reward: Callable[[Sample], float], check: Callable[[Prompt], str | None]) -> None:
    """Let a reward say of a row, before anything is sampled, why it could score no response to it: `row_check_of`."""
    setattr(reward, "row_problem", check)  # noqa: B010  (a function has no such attribute of its own)


def row_check_of(reward: Callable[..., Any]) -> Callable[[Prompt], str | None] | None:
    """Return the reward's `row_problem`: prompt row -> reason to leave it out, or None. None for a reward without."""
    check = getattr(reward, "row_problem", None)
    return check if callable(check) else None


def column_of(sample: Sample, column: str) -> Any:
    """What the row has under `column`. Raises RewardError where it has nothing, or the prompt is no row."""
    value = sample.prompt.get(column) if isinstance(sample.prompt, dict) else None
    if value is None:
        raise RewardError(f"prompt {str(sample.prompt)[:120]!r} has no {column!r}, which this reward needs")
    return value


def resolve(dotted_path: str) -> Callable[..., Any]:
    """The function a dotted path names. Raises RewardError saying which part of it is missing, or is no function."""
    module_name, _, attribute = dotted_path.rpartition(".")
    if not module_name:
        raise RewardError(f"{dotted_path!r}: needs a dotted path, package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(
            f"{dotted_path!r}: no module {error.name!r}; it must be importable where the trainer runs"
        ) from None
    except USER_ERRORS as error:
        raise RewardError(f"{dotted_path!r}: importing {module_name} raised {describe(error)}") from error
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_") and callable(getattr(module, name))]
        raise RewardError(f"{dotted_path!r}: module {module_name!r} has no {attribute!r}; it has {', '.join(names)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise RewardError(f"{dotted_path!r}: is {type(function).__name__}, needs to be a function")
    return function


def finite_or_none(value: Any, sample: Sample, *, source: str = "reward_fn") -> float | None:
    """A reward as training takes it. Raises RewardError naming source, prompt and response for one that is no finite
    number."""
    try:
        if value is None or math.isfinite(value):
            return None if value is None else float(value)
    except (TypeError, OverflowError):  # no number; an integer beyond every float
        pass
    raise RewardError(
        f"{source} returned {str(value)[:80] if isinstance(value, int) else repr(value)[:80]} for "
        f"{sample.response[:80]!r}; needs a finite number or None (prompt {str(sample.prompt)[:200]})"
    )


def is_full(score: float) -> bool:
    """Whether a score is 1: parts that add up to 0.9999999999999999 do."""
    return abs(score - 1.0) <= ROUNDING
