"""The answer of a prompt row, and its other columns, as rewards read them."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from rollouts.training.rewards.reward_fn import RewardError
from rollouts.training.types import Sample


def answer_of(sample: Sample) -> str:
    """Return the row's "answer" as text: 72.0 is "72". Raises RewardError for none or several: never a silent 0."""
    texts = answers_of(sample)
    if len(texts) > 1:
        raise RewardError(
            f"prompt {str(sample.prompt)[:120]!r} has {len(texts)} answers; this reward compares one"
        )
    return texts[0]


def answers_of(sample: Sample) -> list[str]:
    """Return every right text: those of a list, else the one answer. Raises RewardError where there is none."""
    value = column_of(sample, "answer")
    texts = [_text_of(one) for one in (value if isinstance(value, list | tuple) else [value])]
    if not texts or None in texts:
        raise RewardError(
            f"answer={str(value)[:120]!r} ({type(value).__name__}): needs a string, a number, or a list of such"
        )
    return [text for text in texts if text is not None]


def _text_of(value: Any) -> str | None:
    """Return an answer as a response would write it; None for other values. A whole number loses pandas' ".0"."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def any_answer(reward: Callable[[Sample], float]) -> Callable[[Sample], float]:
    """Let a reward that compares with one answer accept rows with several: return the best of their scores."""

    @functools.wraps(reward)
    def best(sample: Sample) -> float:
        accepted = answers_of(sample)
        if len(accepted) == 1:
            return reward(sample)
        rows = [{**cast(dict[str, Any], sample.prompt), "answer": text} for text in accepted]
        return max(reward(replace(sample, prompt=row)) for row in rows)

    return best


def column_of(sample: Sample, column: str) -> Any:
    """Return the row's `column`. Raises RewardError if it is empty or the prompt is not a row."""
    value = sample.prompt.get(column) if isinstance(sample.prompt, dict) else None
    if value is None:
        raise RewardError(
            f"prompt {str(sample.prompt)[:120]!r} has no {column!r}, which this reward needs"
        )
    return value
