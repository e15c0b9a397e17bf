"""The running batch's numbers: one line per row, in arrays, so that a step is a few operations on all rows at once.

B running rows. A line says where its row continues and how it is sampled; beside it is what the row has sampled.
"""

from collections.abc import Sequence

import numpy as np

OUTPUT_COLUMNS_MIN = 64

_LINE = np.dtype(
    [
        ("key", np.uint64),  # its stream of uniforms
        ("length", np.int64),  # column (and position) of its next input token
        ("token", np.int64),  # that token
        ("made", np.int64),  # tokens sampled so far
        ("made_max", np.int64),
        ("temperature", np.float32),
        ("top_k", np.float32),  # the vocabulary's size: no limit
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("greedy", bool),
        ("filtered", bool),  # by top_k, top_p or min_p
        ("ignore_eos", bool),
        ("watched", bool),  # stops at more than EOS
    ],
    align=True,
)


class RowTable:
    """Lines and outputs of at most `capacity` rows; lines that no row uses are 0."""

    def __init__(self, capacity: int) -> None:
        self.lines = np.zeros(capacity, dtype=_LINE)
        self._ids = np.zeros((capacity, OUTPUT_COLUMNS_MIN), dtype=np.int64)
        self._logprobs = np.zeros((capacity, OUTPUT_COLUMNS_MIN), dtype=np.float64)

    def start(
        self,
        at: int,
        line: tuple[object, ...],
        output_ids: Sequence[int],
        logprobs: Sequence[float],
    ) -> None:
        """Write a row's line, and the outputs that it already has."""
        self.lines[at] = line
        made = len(output_ids)
        self._reserve(made + 1)
        if made:  # it was retracted
            self._ids[at, :made], self._logprobs[at, :made] = output_ids, logprobs

    def record(self, tokens_B: np.ndarray, logprobs_B: np.ndarray) -> None:
        """Append one sampled token to each of the first B rows; it is their next input."""
        lines_B, index_B = self.lines[: len(tokens_B)], np.arange(len(tokens_B))
        self._reserve(int(lines_B["made"].max()) + 1)
        self._ids[index_B, lines_B["made"]] = tokens_B
        self._logprobs[index_B, lines_B["made"]] = logprobs_B
        lines_B["token"] = tokens_B
        lines_B["made"] += 1
        lines_B["length"] += 1

    def outputs(self, at: int) -> tuple[list[int], list[float]]:
        """Return a row's sampled tokens and their log-probs."""
        made = int(self.lines["made"][at])
        return self._ids[at, :made].tolist(), self._logprobs[at, :made].tolist()

    def newest(self, at: int, count: int) -> list[int]:
        """Return a row's last sampled tokens, at most `count`."""
        made = int(self.lines["made"][at])
        ids: list[int] = self._ids[at, max(0, made - count) : made].tolist()
        return ids

    def move(self, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Copy lines and outputs of `sources` over `rows`."""
        for values in (self.lines, self._ids, self._logprobs):
            values[rows] = values[sources]

    def clear_from(self, first: int) -> None:
        self.lines[first:] = 0

    def _reserve(self, columns: int) -> None:
        have = self._ids.shape[1]
        if columns > have:
            grow = ((0, 0), (0, max(columns, 2 * have) - have))
            self._ids, self._logprobs = np.pad(self._ids, grow), np.pad(self._logprobs, grow)
