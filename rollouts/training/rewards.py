"""Rewards: plain functions Sample -> float over the response text and `sample.prompt["answer"]`. Standard library only.

A config names one by its dotted path, `rollouts.training.rewards.exact_match`; `resolve` finds it.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any

from rollouts.training.types import Sample

GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # nanochat's


class RewardError(ValueError):
    """A dotted path that names no function, or a prompt without what its reward needs."""


def exact_match(sample: Sample) -> float:
    """1.0 when the response is the answer, apart from white space around it; else 0.0."""
    return float(sample.response.strip() == _answer(sample).strip())


def per_letter(sample: Sample) -> float:
    """Share of positions that hold the answer's letter, 0 to 1, over the longer of the two; the end is a position too.

    Without it, stopping early would cost no more than a wrong last letter, and policies settle on never trying one.
    """
    response, answer = [*sample.response.strip(), None], [*_answer(sample).strip(), None]
    right = sum(a == b for a, b in zip(response, answer, strict=False))
    return right / max(len(response), len(answer))


def per_letter_and_exact(sample: Sample) -> float:
    """Mean of `per_letter` and `exact_match`: partial credit to start from, a reason to get the last letter right."""
    return (per_letter(sample) + exact_match(sample)) / 2


def gsm8k_answer(sample: Sample) -> float:
    """1.0 when the number after `####` equals the answer's, as text without commas (as nanochat); else 0.0."""
    expected = _answer(sample)
    return float(gsm8k_number(sample.response) == (gsm8k_number(expected) or expected.strip().replace(",", "")))


def gsm8k_number(text: str) -> str | None:
    """The number after the first `####`, commas stripped; None without one."""
    found = GSM8K_ANSWER.search(text)
    return found[1].replace(",", "") if found else None


def choice_letter(sample: Sample) -> float:
    """1.0 when the response is the letter of the right choice: alone, or with a bracket or full stop; else 0.0."""
    return float(sample.response.strip().strip("().") == _answer(sample).strip())


def is_correct(sample: Sample) -> float:
    """What evaluation counts, by the row's format: `gsm8k_answer`, `choice_letter`, else `exact_match`.

    As `rl.reward_fn` it judges a mixture of tasks, each by its own rule.
    """
    format = sample.prompt.get("format") if isinstance(sample.prompt, dict) else None
    return _JUDGES.get(str(format), exact_match)(sample)


_JUDGES: dict[str, Callable[[Sample], float]] = {
    "gsm8k": gsm8k_answer,
    "gsm8k_calculator": gsm8k_answer,
    "spelling_bee": gsm8k_answer,
    "multiple_choice": choice_letter,
}


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
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_") and callable(getattr(module, name))]
        raise RewardError(f"{dotted_path!r}: module {module_name!r} has no {attribute!r}; it has {', '.join(names)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise RewardError(f"{dotted_path!r}: is {type(function).__name__}, needs to be a function")
    return function


def _answer(sample: Sample) -> str:
    answer = sample.prompt.get("answer") if isinstance(sample.prompt, dict) else None
    if answer is None:
        raise RewardError(f"prompt {str(sample.prompt)[:120]!r} has no 'answer', which this reward needs")
    return str(answer)
