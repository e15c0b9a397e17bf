"""How rows look to the model: text in spans, trained or not, and how long samples are. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rollouts.training.seams import Tokenizer
from rollouts.training.types import Sample

BINS_MAX = 12  # of a histogram


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are all trained on, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Bin:
    """Samples of `start` to `end` tokens, both included."""

    start: int
    end: int
    count: int


def spans_of(sample: Sample, tokenizer: Tokenizer) -> list[Span]:
    """Return a sample's text as the model reads it, special tokens written out, cut where training begins or ends."""
    marked = zip(sample.tokens, sample.loss_mask, strict=True)
    groups = groupby(marked, key=lambda pair: pair[1] != 0)
    return [
        Span(tokenizer.decode([token for token, _ in group]), trained) for trained, group in groups
    ]


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """Return how many samples have how many tokens, in at most BINS_MAX bins of equal width; [] for none."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // BINS_MAX)
    starts = range(low, high + 1, width)
    counts = [0] * len(starts)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [
        Bin(start, start + width - 1, count) for start, count in zip(starts, counts, strict=True)
    ]
