"""Rewards, and finding them by their dotted path."""

from typing import Any

import pytest

from rollouts.training import rewards
from rollouts.training.types import Sample


def sample(response: str, answer: Any = "cba", **row: Any) -> Sample:
    return Sample(prompt={"messages": [], "answer": answer, **row}, response=response)


@pytest.mark.parametrize(
    ("response", "exact", "letters"),
    [
        ("cba", 1.0, 1.0),
        (" cba\n", 1.0, 1.0),
        ("cbx", 0.0, 3 / 4),
        ("cb", 0.0, 2 / 4),  # stopping early costs more than a wrong letter
        ("cbaaaa", 0.0, 3 / 7),  # and going on does, too
        ("bac", 0.0, 1 / 4),
        ("", 0.0, 0.0),
    ],
)
def test_exact_and_per_letter(response: str, exact: float, letters: float) -> None:
    """Goal: the values by hand. Red when per_letter divided by the answer's length, and when the end did not count."""
    assert rewards.exact_match(sample(response)) == exact
    assert rewards.per_letter(sample(response)) == pytest.approx(letters)
    assert rewards.per_letter_and_exact(sample(response)) == pytest.approx((exact + letters) / 2)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("so #### 1,024", "1024", 1.0),
        ("#### 5\n#### 72", "72", 0.0),  # the first one counts
        ("72", "72", 0.0),
        ("#### 72", "Half is 24. #### 72", 1.0),
        ("", "72", 0.0),
        ("#### 72.0", "72", 0.0),  # equality of text, as nanochat
    ],
)
def test_gsm8k_answer(response: str, answer: str, expected: float) -> None:
    """Goal: nanochat's rule. Red when the last number counted, and when two missing numbers were equal."""
    assert rewards.gsm8k_answer(sample(response, answer)) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [("B", 1.0), (" B\n", 1.0), ("(B)", 1.0), ("B.", 1.0), ("A", 0.0), ("", 0.0), ("AB", 0.0)],
)
def test_choice_letter(response: str, expected: float) -> None:
    """Goal: the right letter, alone. Red when any response that held the letter counted."""
    assert rewards.choice_letter(sample(response, "B")) == expected


@pytest.mark.parametrize(
    ("format", "right", "wrong"),
    [
        ("gsm8k", "well, #### 72", "72"),
        ("gsm8k_calculator", "well, #### 72", "72"),
        ("spelling_bee", "well, #### 72", "72"),
        ("multiple_choice", "(72)", "well, #### 72"),
        ("simple_spelling", "72", "well, #### 72"),
        ("question_answer", "72", "well, #### 72"),
        (None, "72", "well, #### 72"),
    ],
)
def test_evaluation_follows_the_rows_format(format: str | None, right: str, wrong: str) -> None:
    """Goal: each task of a mixture by its own rule. Red when exact_match judged all."""
    row = {} if format is None else {"format": format}
    assert rewards.is_correct(sample(right, "72", **row)) == 1.0
    assert rewards.is_correct(sample(wrong, "72", **row)) == 0.0


@pytest.mark.parametrize("prompt", ["text only", {"messages": []}])
def test_a_prompt_without_an_answer_is_an_error(prompt: Any) -> None:
    """Goal: never a silent 0 that would train on nothing. Red when a missing answer was ""."""
    with pytest.raises(rewards.RewardError, match="has no 'answer'"):
        rewards.exact_match(Sample(prompt=prompt, response="x"))


def test_resolve_finds_a_function() -> None:
    """Goal: the config's dotted path becomes the function. Red when the module came back."""
    assert rewards.resolve("rollouts.training.rewards.per_letter") is rewards.per_letter


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("exact_match", "needs a dotted path"),
        ("no_such_package.f", "no module 'no_such_package'"),
        ("rollouts.training.no_such.f", "no module 'rollouts.training.no_such'"),
        ("rollouts.training.rewards.exact", "has no 'exact'; it has .*exact_match"),
        ("rollouts.training.rewards.__doc__", "is str, needs to be a function"),
    ],
)
def test_resolve_says_what_is_missing(path: str, message: str) -> None:
    """Goal: which part of the path is wrong. Each was red (ImportError, AttributeError, None) without its check."""
    with pytest.raises(rewards.RewardError, match=message):
        rewards.resolve(path)
