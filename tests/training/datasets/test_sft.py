"""Plain text to samples: nothing lost, every token trained once, long ones split, everything counted."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.data_formats.examples import Example
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.plain_text import encode_texts, split_tokens
from rollouts.training.datasets.sft import build_sft_samples
from tests.training.tiny_task import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def texts(*values: str) -> list[Example]:
    return [
        Example(f"t.jsonl:{n}", [], {"format": "text"}, text=value)
        for n, value in enumerate(values, start=1)
    ]


def test_every_token_after_the_first_is_trained_and_eos_ends_it(tokenizer: Any) -> None:
    """Goal: plain text is not put through the chat template, and learns to stop. Red without the EOS."""
    (sample,), report = build_sft_samples(texts("ab c"), tokenizer, max_length=-1)
    assert sample.tokens == [*tokenizer("ab c")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(sample.tokens[:-1]) == "ab c"
    assert sample.loss_mask == [0.0, 1.0, 1.0, 1.0, 1.0] and sample.response_length == 4
    assert (report.kept, report.trained_tokens, report.total_tokens, report.texts_split) == (
        1,
        4,
        5,
        0,
    )


@settings(max_examples=100)
@given(length=st.integers(2, 60), max_length=st.integers(2, 20))
def test_a_split_text_is_trained_whole_and_once(length: int, max_length: int) -> None:
    """Goal: lossless: each token but the first is predicted once, after the one before it. Red without the overlap
    (a piece's first token was never predicted), and with a last piece of one token."""
    tokens = list(range(length))
    pieces = list(split_tokens(tokens, max_length))
    predicted = [pair for piece in pieces for pair in itertools.pairwise(piece)]
    assert predicted == list(itertools.pairwise(tokens))
    assert all(2 <= len(piece) <= max_length for piece in pieces)


def test_split_texts_are_counted_and_named(tokenizer: Any) -> None:
    """Goal: the report says how many texts were split, and a piece where it is from. Red with pieces not counted."""
    samples, report = build_sft_samples(texts("abcdefg", "ab"), tokenizer, max_length=4)
    assert [len(sample.tokens) for sample in samples] == [4, 4, 2, 3]
    assert [sample.metadata["where"] for sample in samples][1:] == [
        "t.jsonl:1 piece 2 of 3",
        "t.jsonl:1 piece 3 of 3",
        "t.jsonl:2",
    ]
    assert (report.kept, report.texts_split, report.pieces, report.trained_tokens) == (4, 1, 3, 9)
    assert "1 long texts became 3 pieces" in str(report)


def test_an_empty_text_is_left_out_and_counted(tokenizer: Any) -> None:
    """Goal: data sets such as wikitext hold blank rows; they cost nothing and are not hidden. Red (an EOS after
    nothing was trained) without the check."""
    samples, report = build_sft_samples(texts("", " \n", "ab"), tokenizer, max_length=8)
    assert len(samples) == 1 and report.left_out == {"no trained token (empty text)": 2}


def test_a_tokenizer_without_eos_is_named() -> None:
    """Goal: no text without an end. Red with None among the tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"tiny_qwen2' has no eos_token"):
        encode_texts(tokenizer, ["ab"])
