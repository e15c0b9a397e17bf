"""Ends rows: scores them by the trainer's own forward pass, then answers their callers. Model thread alone.

Decoding sees one token at a time and rounds a little differently than a pass over the whole sequence (about 1e-7). In
float32 on a CPU, with one thread each, matrix products over enough rows give every row the same bits whatever is
beside it. A sequence that is scored here and by the trainer with the same weights then has exactly the same log-probs.
"""

import contextlib
from collections.abc import Sequence

import torch

from rollouts.engines.embedded import attention
from rollouts.engines.embedded.batch import BatchRow, FinishReason
from rollouts.engines.embedded.generate_request import RowResult
from rollouts.engines.embedded.served_model import Served
from rollouts.engines.embedded.updates import WeightUpdates
from rollouts.training import forward
from rollouts.training.loops.packing import pack_best_fit

SCORE_TOKENS_MAX = 8192  # finished rows wait for others to be scored with, up to so many tokens
SCORE_STEPS_MAX = 16  # and so many steps
PASS_TOKENS_MAX = (
    4096  # of one pass: bounds its memory, and keeps small models' activations in the cache
)
_COMPANY = 16  # tokens scored beside the rows: products over fewer rows take other kernels


class Finisher:
    """Keeps rows that have ended until they are scored together, and gives each prompt's caller its results."""

    def __init__(self, served: Served, weights: WeightUpdates) -> None:
        self._served = served
        self._weights = weights
        self._scores = can_score(served)
        self._unscored: list[tuple[BatchRow, FinishReason]] = []
        self._steps = 0  # since the first of them ended

    def end(self, row: BatchRow, reason: FinishReason) -> None:
        """Finish a row that left the batch: at once, or with others once they are scored."""
        asked = row.job.request.return_logprob
        if self._scores and asked and len(row.versions) == 1 and reason["type"] != "abort":
            self._unscored.append((row, reason))
        else:
            self.finish(row, reason)

    def after_step(self, *, running: bool) -> None:
        """Score the rows that have ended once they are many, have waited long, or no row is `running`."""
        self._steps += bool(self._unscored)
        tokens = sum(len(row.ids) for row, _ in self._unscored)
        if not running or tokens >= SCORE_TOKENS_MAX or self._steps >= SCORE_STEPS_MAX:
            self.score_ended()

    def score_ended(self) -> None:
        """Score and finish all rows that have ended."""
        ended, self._unscored, self._steps = self._unscored, [], 0
        if ended:
            # Without memory for it, the rows keep the log-probs that decoding gave: the same up to rounding.
            with contextlib.suppress(torch.OutOfMemoryError):
                score(self._served, [row for row, _ in ended])
        for row, reason in ended:
            self.finish(row, reason)

    def finish(self, row: BatchRow, reason: FinishReason) -> None:
        """Note the row's result. The last row of a prompt answers the caller."""
        job = row.job
        versions = row.versions or [(self._weights.version, 0)]
        job.results[row.index] = RowResult(
            row.output_ids, row.logprobs, reason, row.cached_tokens, versions, job.input_logprobs
        )
        finished = [result for result in job.results if result is not None]
        if len(finished) == len(job.results):
            job.done(finished)


def can_score(served: Served) -> bool:
    """Return whether the trainer's pass applies: to its architectures, in float32. Others keep decoding's log-probs."""
    if served.dtype != torch.float32 or not forward.prepare(served.model):
        return False
    if served.device.type == "cpu":
        # `prepare` set the trainer's attention; this one passes whole sequences to it
        attention.use_for(served.model)
    return True


def score(served: Served, rows: Sequence[BatchRow]) -> None:
    """Replace the log-probs of each row's output, at its own temperature. All were sampled with the served weights."""
    for temperature in sorted({row.job.request.params.scale for row in rows}):
        alike = [row for row in rows if row.job.request.params.scale == temperature]
        for bin_ in pack_best_fit([len(row.ids) for row in alike], PASS_TOKENS_MAX):
            _score([alike[index] for index in bin_], served, temperature)


def _score(rows: Sequence[BatchRow], served: Served, temperature: float) -> None:
    company = [0] * _COMPANY
    sequences = [*(row.ids for row in rows), company]
    lengths = torch.tensor([len(ids) for ids in sequences])
    first = torch.tensor([*(len(row.job.request.input_ids) for row in rows), 1])
    width = int(lengths.max())
    columns = torch.arange(width)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences])
    seen = columns < lengths[:, None]
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": seen,
        "loss_mask": seen & (columns >= first[:, None]),
        "temperature": temperature,
    }
    device = served.device
    moved = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    found = forward.token_log_probs(served.model, moved, with_entropy=False, share_prompts=True)
    values = found.log_probs_N.tolist()
    for row, count in zip(rows, found.keep.sum(1).tolist(), strict=False):  # the company is last
        row.logprobs, values = values[:count], values[count:]
