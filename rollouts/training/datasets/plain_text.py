"""Plain text to samples: no chat template; every token after a text's first is trained exactly once.

Pure, apart from the tokenizer.
"""

from collections.abc import Iterator, Sequence

from rollouts.data_formats.examples import Example
from rollouts.data_formats.row import DataError
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Sample


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text with the tokenizer's beginning, and one EOS at its end; [] for a blank text."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} has no eos_token, and plain text needs one at its end"
        )
    # verbose would warn of every long text
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    ended = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded]
    return [ids if text.strip() else [] for text, ids in zip(texts, ended, strict=True)]


def text_samples(example: Example, tokens: list[int], *, max_length: int) -> list[Sample]:
    """Return a text's tokens in pieces that fit `max_length` (-1: one piece); [] without a token to predict."""
    if max_length != -1 and max_length < 2:
        raise DataError(
            f"max_length={max_length}: needs >= 2, a token to read and one to predict, or -1 for no limit"
        )
    pieces = list(split_tokens(tokens, max_length)) if len(tokens) > 1 else []
    samples = []
    for number, piece in enumerate(pieces, start=1):
        where = (
            example.where
            if len(pieces) == 1
            else f"{example.where} piece {number} of {len(pieces)}"
        )
        sample = Sample(
            prompt=example.prompt,
            tokens=piece,
            loss_mask=[0.0] + [1.0] * (len(piece) - 1),
            metadata={"where": where},
            response_length=len(piece) - 1,
        )
        samples.append(sample)
    return samples


def split_tokens(tokens: list[int], max_length: int) -> Iterator[list[int]]:
    """Yield pieces of at most `max_length` tokens (-1: one piece). Each begins with the last token of the one before.

    A piece's first token is read, not predicted, so that overlap lets every token but the very first be predicted once.
    """
    if max_length == -1 or len(tokens) <= max_length:
        yield tokens
        return
    for start in range(0, len(tokens) - 1, max_length - 1):
        yield tokens[start : start + max_length]
