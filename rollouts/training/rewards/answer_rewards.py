"""Rewards that compare the response with the row's answer: plain functions Sample -> float. Standard library only."""

import re
from collections.abc import Callable

from rollouts.data_formats import FORMATS
from rollouts.data_formats.gsm8k import gsm8k_number, plain_number
from rollouts.training.rewards.row_answer import answer_of, any_answer
from rollouts.training.types import Sample

_SAID = re.compile(r"####[ \t]*\**[ \t]*(-?\$?-?[0-9.,]*[0-9][0-9.,]*)")  # how models do


@any_answer
def exact_match(sample: Sample) -> float:
    """Return 1.0 when the response is the answer, apart from white space around it; else 0.0."""
    return float(sample.response.strip() == answer_of(sample).strip())


@any_answer
def per_letter(sample: Sample) -> float:
    """Return the share of positions with the answer's letter, over the longer of the two; the end is a position too.

    Without it, stopping early would cost no more than a wrong last letter, and policies learn never to try one.
    """
    response, answer = [*sample.response.strip(), None], [*answer_of(sample).strip(), None]
    right = sum(a == b for a, b in zip(response, answer, strict=False))
    return right / max(len(response), len(answer))


def per_letter_and_exact(sample: Sample) -> float:
    """Return the mean of `per_letter` and `exact_match`: partial credit, and a reason to get the last letter right."""
    return (per_letter(sample) + exact_match(sample)) / 2


@any_answer
def gsm8k_answer(sample: Sample) -> float:
    """Return 1.0 when the number after `####` equals the answer's, as text without commas; else 0.0.

    As in lm-evaluation-harness a dollar sign and a full stop at the end are ignored; the space may be missing.
    """
    expected, said = answer_of(sample), _SAID.search(sample.response)
    right = gsm8k_number(expected) or plain_number(expected)
    return float(said is not None and plain_number(said[1]) == right)


@any_answer
def choice_letter(sample: Sample) -> float:
    """Return 1.0 when the response is the right choice's letter, alone or with a bracket or full stop; else 0.0."""
    return float(sample.response.strip().strip("().") == answer_of(sample).strip())


def is_correct(sample: Sample) -> float:
    """Score as evaluation does, by the row's format: `gsm8k_answer`, `choice_letter`, else `exact_match`.

    As `rl.reward.fn` it judges a mixture of tasks, each by its own rule.
    """
    format = sample.prompt.get("format") if isinstance(sample.prompt, dict) else None
    return _JUDGES.get(str(format), exact_match)(sample)


def regex_answer(pattern: str, *, flags: int = re.DOTALL) -> Callable[[Sample], float]:
    """Return a reward: 1.0 when the last match of `pattern` has the answer in its first group; else 0.0.

    White space around it is ignored, and so is an opening tag that is only mentioned before it. Put it into your own
    module and name that in `rl.reward.fn`:
    `tagged = regex_answer(r"<answer>(.*?)</answer>")`. Raises ValueError for a pattern without a group.
    """
    compiled = re.compile(pattern, flags)
    if compiled.groups < 1:
        raise ValueError(f"regex_answer({pattern!r}): needs a group, (...), around the answer")

    @any_answer
    def reward(sample: Sample) -> float:
        expected = answer_of(sample).strip()
        found = _last_group(compiled, sample.response)
        return float(found is not None and found.strip() == expected)

    return reward


def _last_group(compiled: re.Pattern[str], text: str) -> str | None:
    """Return the first group of the last match; if its opener occurs twice, the text after the second.

    "I answer in <answer> tags: <answer>42</answer>" means 42, though a search from the left finds more.
    """
    match = next(reversed(list(compiled.finditer(text))), None)
    while match is not None and match[1] is not None:
        opener = text[match.start() : match.start(1)]
        again = match[1].rfind(opener) if opener.strip() else -1
        later = compiled.match(text, match.start(1) + again) if again >= 0 else None
        if later is None or later[1] is None:
            return match[1]
        match = later
    return None


def regex_format(pattern: str, *, flags: int = re.DOTALL) -> Callable[[Sample], float]:
    """Return a reward: 1.0 when the whole response, white space around it apart, matches `pattern`; else 0.0."""
    compiled = re.compile(pattern, flags)

    def reward(sample: Sample) -> float:
        return float(compiled.fullmatch(sample.response.strip()) is not None)

    return reward


_BY_NAME = {judge.__name__: judge for judge in (exact_match, gsm8k_answer, choice_letter)}
_JUDGES = {declared.name: _BY_NAME[declared.judge] for declared in FORMATS}
