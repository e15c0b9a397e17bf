"""Which rows are chosen, of a list and of a stream."""

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.training.datasets import selection
from rollouts.training.datasets.selection import Selection


@settings(max_examples=100)
@given(
    count=st.integers(0, 40),
    start=st.integers(0, 12),
    length=st.integers(1, 30),
    step=st.integers(1, 5),
    max_samples=st.sampled_from([-1, 1, 3, 100]),
    seed=st.sampled_from([None, 0, 42]),
)
def test_a_shuffle_then_a_slice_then_the_first(
    *, count: int, start: int, length: int, step: int, max_samples: int, seed: int | None
) -> None:
    """Goal: the rows that `Dataset.shuffle(seed).select(...)` gives, nanochat's. Red with the slice before the shuffle.

    Without a shuffle a stream gives the same.
    """
    own = Selection(seed, start, start + length, step, max_samples)
    order = datasets.Dataset.from_dict({"row": list(range(count))})
    shuffled = (order if seed is None else order.shuffle(seed=seed))["row"][:]
    expected = shuffled[start : start + length : step]
    assert own.of(count) == (expected if max_samples == -1 else expected[:max_samples])
    assert own.problem() is None
    if seed is None:
        assert list(own.of_stream(range(count))) == own.of(count)


def endless(pulled: list[int]) -> Iterator[int]:
    for index in itertools.count():
        pulled.append(index)
        yield index


def test_a_stream_is_pulled_no_further_than_needed() -> None:
    """Goal: a hundred rows of a huge set cost a hundred rows. Red (hung) when the stream was made a list first."""
    pulled: list[int] = []
    assert list(Selection(start=2, step=3, max_samples=4).of_stream(endless(pulled))) == [
        2,
        5,
        8,
        11,
    ]
    assert len(pulled) == 12


def test_a_streamed_shuffle_stays_within_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: seeded, a permutation, and no more held than the window. Red with a window that grows."""
    monkeypatch.setattr(selection, "STREAM_WINDOW_ROWS", 8)
    pulled: list[int] = []
    first = list(Selection(shuffle_seed=1, max_samples=20).of_stream(endless(pulled)))
    assert len(pulled) == 28 and len(set(first)) == 20
    assert all(value < position + 8 for position, value in enumerate(first))
    assert first == list(Selection(shuffle_seed=1, max_samples=20).of_stream(itertools.count()))
    assert first != list(Selection(shuffle_seed=2, max_samples=20).of_stream(itertools.count()))
    assert sorted(Selection(shuffle_seed=1).of_stream(range(30))) == list(range(30))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("start", -1, "start=-1, needs >= 0"),
        ("stop", 0, "stop=0, needs > start=0, or -1"),
        ("step", 0, "step=0, needs >= 1"),
        ("max_samples", 0, "max_samples=0, needs >= 1, or -1"),
    ],
)
def test_numbers_without_meaning_are_named(field: str, value: int, message: str) -> None:
    """Goal: no Python slice from the end by accident. Red for each without its check."""
    options: dict[str, Any] = {field: value}
    assert Selection(**options).problem() == message
