"""Rewards that compare the response with the row's answer: plain functions Sample -> float. Standard library only."""

import re
from collections.abc import Callable

from rollouts.training.rewards.common import answer_of, any_answer
from rollouts.training.types import Sample

GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # nanochat's


@any_answer
def exact_match(sample: Sample) -> float:
    """1.0 when the response is the answer, apart from white space around it; else 0.0."""
    return float(sample.response.strip() == answer_of(sample).strip())


@any_answer
def per_letter(sample: Sample) -> float:
    """Share of positions that hold the answer's letter, 0 to 1, over the longer of the two; the end is a position too.

    Without it, stopping early would cost no more than a wrong last letter, and policies settle on never trying one.
    """
    response, answer = [*sample.response.strip(), None], [*answer_of(sample).strip(), None]
    right = sum(a == b for a, b in zip(response, answer, strict=False))
    return right / max(len(response), len(answer))


def per_letter_and_exact(sample: Sample) -> float:
    """Mean of `per_letter` and `exact_match`: partial credit to start from, a reason to get the last letter right."""
    return (per_letter(sample) + exact_match(sample)) / 2


@any_answer
def gsm8k_answer(sample: Sample) -> float:
    """1.0 when the number after `####` equals the answer's, as text without commas (as nanochat); else 0.0."""
    expected = answer_of(sample)
    return float(gsm8k_number(sample.response) == (gsm8k_number(expected) or expected.strip().replace(",", "")))


def gsm8k_number(text: str) -> str | None:
    """The number after the first `####`, commas stripped; None without one."""
    found = GSM8K_ANSWER.search(text)
    return found[1].replace(",", "") if found else None


@any_answer
def choice_letter(sample: Sample) -> float:
    """1.0 when the response is the letter of the right choice: alone, or with a bracket or full stop; else 0.0."""
    return float(sample.response.strip().strip("().") == answer_of(sample).strip())


def is_correct(sample: Sample) -> float:
    """What evaluation counts, by the row's format: `gsm8k_answer`, `choice_letter`, else `exact_match`.

    As `rl.reward_fn` it judges a mixture of tasks, each by its own rule.
    """
    format = sample.prompt.get("format") if isinstance(sample.prompt, dict) else None
    return _JUDGES.get(str(format), exact_match)(sample)


def regex_answer(pattern: str, *, flags: int = re.DOTALL) -> Callable[[Sample], float]:
    """A reward: 1.0 when the last match of `pattern` in the response holds the answer in its first group; else 0.0.

    White space around it is passed over. Put it into a module of your own and name that in `rl.reward_fn`:
    `tagged = regex_answer(r"<answer>(.*?)</answer>")`. Raises ValueError for a pattern without a group.
    """
    compiled = re.compile(pattern, flags)
    if compiled.groups < 1:
        raise ValueError(f"regex_answer({pattern!r}): needs a group, (...), around the answer")

    @any_answer
    def reward(sample: Sample) -> float:
        expected = answer_of(sample).strip()
        found = [match[1] for match in compiled.finditer(sample.response)]
        return float(bool(found) and found[-1] is not None and found[-1].strip() == expected)

    return reward


def regex_format(pattern: str, *, flags: int = re.DOTALL) -> Callable[[Sample], float]:
    """A reward: 1.0 when the whole response, white space around it apart, matches `pattern`; else 0.0."""
    compiled = re.compile(pattern, flags)

    def reward(sample: Sample) -> float:
        return float(compiled.fullmatch(sample.response.strip()) is not None)

    return reward


_JUDGES: dict[str, Callable[[Sample], float]] = {
    "gsm8k": gsm8k_answer,
    "gsm8k_calculator": gsm8k_answer,
    "spelling_bee": gsm8k_answer,
    "multiple_choice": choice_letter,
}
