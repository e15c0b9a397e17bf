"""Synthetic rows: count a letter in a word, and spell a word. Pure: a row is a function of its split and index.

Row i of "train" is drawn from the seed i, row i of "test" from -(i + 1). The seed goes into the generator as text, for
the sign to count: `random.Random(-1)` and `random.Random(1)` draw the same numbers. The splits share no word.
"""

import random
import string
from collections.abc import Sequence

from rollouts.data_formats.calculator_turns import calculator_turns
from rollouts.data_formats.row import DataError, Row
from rollouts.training.datasets.selection import Selection
from rollouts.training.datasets.word_list import WORDS

SPLITS = ("train", "test")
TEST_EVERY = 10  # each tenth word of the list is kept for "test"
ABSENT_LETTER_SHARE = 0.1  # of questions for a random letter, not one of the word's
QUESTIONS = (
    "How many times does {letter} occur in {word}",
    "How many {letter} are there in the word {word}",
    "How many {letter}s does {word} have",
    "Count the letter {letter} in {word}",
    "What is the number of {letter} in {word}",
    "In {word}, how often do you find {letter}",
    "Tell me how many {letter} the word {word} contains",
    "How often does the letter {letter} come up in {word}",
    "{word}: how many {letter}",
    "Number of occurrences of {letter} in {word}",
)
QUOTES = ("", "'", '"')


def spelling_rows(
    task: str,
    *,
    split: str,
    selection: Selection,
    words: Sequence[str] = WORDS,
) -> list[Row]:
    """Return the selected rows of an endless data set: `selection` ends it, and must not shuffle.

    Raises DataError for another split than "train" and "test", and for a selection without an end.
    """
    if problem := selection.problem():
        raise DataError(f"{task}: {problem}")
    if split not in SPLITS:
        raise DataError(f"{task}: split={split!r}, needs 'train' or 'test'")
    if selection.stop == -1 and selection.max_samples == -1:
        raise DataError(f"{task}: the rows are endless; needs max_samples or stop")
    if selection.shuffle_seed is not None:
        raise DataError(
            f"{task}: shuffle_seed={selection.shuffle_seed}, but the rows are random already; needs None"
        )
    last = (
        selection.stop
        if selection.stop != -1
        else selection.start + selection.max_samples * selection.step
    )
    make = {"spelling_bee": _count_row, "simple_spelling": _spell_row}[task]
    own = [
        word for index, word in enumerate(words) if (index % TEST_EVERY == 0) == (split == "test")
    ]
    rows = []
    for index in selection.of(last):
        seed = index if split == "train" else -(index + 1)
        rows.append(make(random.Random(f"{task} {seed}"), own, f"{task}[{split}] row {index}"))
    return rows


def _count_row(generator: random.Random, words: Sequence[str], where: str) -> Row:
    word = generator.choice(words)
    other = generator.random() < ABSENT_LETTER_SHARE
    letter = generator.choice(string.ascii_lowercase if other else word)
    question = generator.choice(QUESTIONS)
    if generator.random() < 0.3:
        question = question.lower()
    letter_quote, word_quote = generator.choice(QUOTES), generator.choice(QUOTES)
    question = question.format(
        letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}"
    )
    question += "?" if generator.random() < 0.5 else ""
    count = str(word.count(letter))
    call = calculator_turns(_count_by_hand(word, letter), f"'{word}'.count('{letter}')", count, 0)
    final = f"The calculator says {count}, too.\n\n#### {count}"
    messages = [
        {"role": "user", "content": question},
        *call,
        {"role": "assistant", "content": final},
    ]
    return Row(where, {"messages": messages, "answer": count})


def _count_by_hand(word: str, letter: str) -> str:
    """Return the count step by step. A letter has no space before it: " a" and "a" are different tokens."""
    lines, found = [], 0
    for position, char in enumerate(word, start=1):
        found += char == letter
        lines.append(
            f"{position}:{char}" + (f" found, that makes {found}" if char == letter else "")
        )
    steps = "\n".join(lines)
    spelled = f"The word, letter by letter:\n{_spelled(word)}"
    return f"{spelled}\n\nCounting '{letter}':\n{steps}\n\nThat gives {found}. Checking:\n"


def _spell_row(generator: random.Random, words: Sequence[str], where: str) -> Row:
    word = generator.choice(words)
    user = {"role": "user", "content": f"Spell the word: {word}"}
    return Row(where, {"messages": [user, {"role": "assistant", "content": _spelled(word)}]})


def _spelled(word: str) -> str:
    return f"{word}:{','.join(word)}"
