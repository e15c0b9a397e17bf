"""Plain text to samples: no chat template; every token after a text's first is trained exactly once. Pure but for the
tokenizer it is given."""

from collections.abc import Iterator
from typing import Any

from rollouts.training.datasets.examples import Example
from rollouts.training.datasets.rows import DataError
from rollouts.training.types import Sample


def text_samples(example: Example, text: str, tokenizer: Any, *, max_length: int) -> list[Sample]:
    """The pieces of a text that fit `max_length` tokens (-1: one piece), in order; [] for a blank text."""
    tokens = text_tokens(tokenizer, text)
    if not text.strip() or len(tokens) < 2:
        return []
    pieces = list(split_tokens(tokens, max_length))
    samples = []
    for number, piece in enumerate(pieces, start=1):
        where = example.where if len(pieces) == 1 else f"{example.where} piece {number} of {len(pieces)}"
        mask = [0.0] + [1.0] * (len(piece) - 1)
        samples.append(
            Sample(
                prompt=example.prompt,
                tokens=piece,
                loss_mask=mask,
                metadata={"where": where},
                response_length=len(piece) - 1,
            )
        )
    return samples


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of a plain text with whatever the tokenizer puts before it, and one EOS at its end."""
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token, and plain text needs one at its end")
    tokens = list(tokenizer(text, verbose=False)["input_ids"])  # verbose would warn of every long text
    return tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]


def split_tokens(tokens: list[int], max_length: int) -> Iterator[list[int]]:
    """Pieces of at most `max_length` tokens (-1: one piece). Each begins with the last token of the one before.

    A piece's first token is read, not predicted, so that overlap lets every token but the very first be predicted once.
    """
    if max_length == -1 or len(tokens) <= max_length:
        yield tokens
        return
    for start in range(0, len(tokens) - 1, max_length - 1):
        yield tokens[start : start + max_length]
