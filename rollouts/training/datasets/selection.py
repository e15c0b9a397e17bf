"""The rows of a split that are used. Pure."""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

STREAM_WINDOW_ROWS = (
    10_000  # a streamed shuffle draws from this many next rows, all that it holds in memory
)

T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """Rows shuffled by `shuffle_seed`, of those [start:stop:step], of those the first `max_samples`.

    The shuffle is that of `datasets.Dataset.shuffle(seed=...)`, so that a slice has the same rows as elsewhere.
    A stream cannot be shuffled as a whole: it is shuffled within STREAM_WINDOW_ROWS, by `random.Random(seed)`.
    """

    shuffle_seed: int | None = None  # None: in file order
    start: int = 0
    stop: int = -1  # -1: to the end
    step: int = 1
    max_samples: int = -1  # -1: all of them

    def problem(self) -> str | None:
        """Return the mistake in these numbers, or None."""
        checks = (
            (self.start >= 0, f"start={self.start}, needs >= 0"),
            (
                self.stop == -1 or self.stop > self.start,
                f"stop={self.stop}, needs > start={self.start}, or -1",
            ),
            (self.step >= 1, f"step={self.step}, needs >= 1"),
            (
                self.max_samples >= 1 or self.max_samples == -1,
                f"max_samples={self.max_samples}, needs >= 1, or -1",
            ),
        )
        return next((message for ok, message in checks if not ok), None)

    def of(self, count: int) -> list[int]:
        """Return the chosen ones of `count` rows, by index, in order."""
        order: Iterable[int] = range(count)
        if self.shuffle_seed is not None:
            import numpy

            order = numpy.random.default_rng(self.shuffle_seed).permutation(count).tolist()
        return list(self._cut(order))

    def of_stream(self, rows: Iterable[T]) -> Iterator[T]:
        """Yield the chosen ones of a stream. Except for the shuffle's window, no row after the last one is pulled."""
        return self._cut(
            rows if self.shuffle_seed is None else _shuffled_within_window(rows, self.shuffle_seed)
        )

    def _cut(self, rows: Iterable[T]) -> Iterator[T]:
        cut = itertools.islice(rows, self.start, None if self.stop == -1 else self.stop, self.step)
        return cut if self.max_samples == -1 else itertools.islice(cut, self.max_samples)

    def __str__(self) -> str:
        stop = "" if self.stop == -1 else self.stop
        return f"[{self.start}:{stop}:{self.step}]"


def _shuffled_within_window(rows: Iterable[T], seed: int) -> Iterator[T]:
    """Shuffle as `datasets.IterableDataset.shuffle` does: that one loses rows' numbers, which messages name."""
    generator, iterator = random.Random(seed), iter(rows)
    window = list(itertools.islice(iterator, STREAM_WINDOW_ROWS))
    for row in iterator:
        index = generator.randrange(len(window))
        yield window[index]
        window[index] = row
    generator.shuffle(window)
    yield from window
