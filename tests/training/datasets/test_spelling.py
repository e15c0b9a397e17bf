"""The synthetic spelling tasks: each row a function of its index, right, and the splits apart."""

import re

import pytest

from rollouts.data_formats import parse_row
from rollouts.data_formats.row import DataError
from rollouts.training.calculator import calculate
from rollouts.training.datasets.selection import Selection
from rollouts.training.datasets.spelling import spelling_rows
from rollouts.training.datasets.word_list import WORDS
from rollouts.training.rewards import gsm8k_number


def test_the_word_list_is_what_rows_are_drawn_from() -> None:
    """Goal: lower-case words, each once. Red with a doubled word."""
    assert len(set(WORDS)) == len(WORDS) > 900
    assert all(re.fullmatch("[a-z]{4,}", word) for word in WORDS)


def test_counting_is_right_by_hand_by_calculator_and_in_the_answer() -> None:
    """Goal: question, count by hand, call, result, answer agree. Red when the count was of the letter's positions."""
    absent = 0
    for row in spelling_rows("spelling_bee", split="train", selection=Selection(max_samples=300)):
        example = parse_row(row, "spelling_bee")
        user, call, tool, final = example.messages
        expression = call["tool_calls"][0]["function"]["arguments"]["expression"]
        word, letter = re.findall(r"'(\w+)'", expression)
        assert word in user["content"] and letter in user["content"].replace(word, "")
        assert (
            calculate(expression)
            == tool["content"]
            == gsm8k_number(final["content"])
            == example.prompt["answer"]
        )
        assert tool["content"] == str(word.count(letter))
        assert (
            f"{word}:{','.join(word)}\n" in call["content"]
            and f"That gives {word.count(letter)}." in call["content"]
        )
        assert len(
            re.findall(rf"^\d+:{letter} found", call["content"], re.MULTILINE)
        ) == word.count(letter)
        assert example.prompt["messages"] == [user] and example.prompt["tools"]
        absent += letter not in word
    assert 5 <= absent <= 60


def test_spelling() -> None:
    """Goal: the word, a colon, its letters. Red with the letters sorted."""
    (row,) = spelling_rows(
        "simple_spelling", split="train", selection=Selection(start=3, max_samples=1)
    )
    example = parse_row(row, "simple_spelling")
    word = example.messages[0]["content"].removeprefix("Spell the word: ")
    assert example.messages[1]["content"] == example.prompt["answer"] == f"{word}:{','.join(word)}"
    assert row.where == "simple_spelling[train] row 3"


@pytest.mark.parametrize("task", ["spelling_bee", "simple_spelling"])
def test_a_row_is_a_function_of_its_index(task: str) -> None:
    """Goal: slices and repeats of a set agree, whatever was drawn before. Red with one generator for all rows."""
    rows = spelling_rows(task, split="train", selection=Selection(max_samples=20))  # type: ignore[arg-type]
    some = spelling_rows(task, split="train", selection=Selection(start=4, stop=19, step=5))  # type: ignore[arg-type]
    assert some == rows[4:19:5]


@pytest.mark.parametrize("task", ["spelling_bee", "simple_spelling"])
def test_the_splits_share_no_row_and_no_word(task: str) -> None:
    """Goal: held out is held out. Red when both splits drew from the whole list."""
    words = {}
    for split in ("train", "test"):
        rows = spelling_rows(task, split=split, selection=Selection(max_samples=200))  # type: ignore[arg-type]
        texts = [row.values["messages"][1]["content"] for row in rows]
        words[split] = {re.search(r"(\w+):\w,", text)[1] for text in texts}  # type: ignore[index]
    assert not words["train"] & words["test"] and len(words["test"]) > 50


def test_the_sign_of_a_seed_counts() -> None:
    """Goal: the test split's negative seeds are seeds of their own. Red with `random.Random(-(index + 1))`, which
    ignores the sign: most test rows were the next train row but for its word."""
    words = ["strawberry"] * 30
    train, test = (
        spelling_rows("spelling_bee", split=split, selection=Selection(max_samples=21), words=words)
        for split in ("train", "test")
    )
    same = [test[index].values == train[index + 1].values for index in range(20)]
    assert sum(same) < 3


@pytest.mark.parametrize(
    ("split", "selection", "message"),
    [
        ("dev", Selection(max_samples=1), "split='dev', needs 'train' or 'test'"),
        ("train", Selection(), "are endless; needs max_samples or stop"),
        (
            "train",
            Selection(shuffle_seed=1, stop=3),
            "shuffle_seed=1, but the rows are random already",
        ),
        ("train", Selection(step=0), "step=0, needs >= 1"),
    ],
)
def test_what_has_no_meaning_is_refused(split: str, selection: Selection, message: str) -> None:
    """Goal: nothing is ignored, nothing hangs. Red for each without its check."""
    with pytest.raises(DataError, match=message):
        spelling_rows("spelling_bee", split=split, selection=selection)
