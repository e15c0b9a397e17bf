"""The model thread's loop: who runs, who waits, and what happens between two steps.

Everything that touches the model runs on this one thread, in order. Other threads reach it through the mailbox, whose
calls take effect between steps: there is no lock around the model and no half-applied command.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from rollouts.engines.embedded.batch import BatchRow, PromptJob, RunningBatch, abort_reason
from rollouts.engines.embedded.decode_check import check_decode
from rollouts.engines.embedded.finisher import Finisher
from rollouts.engines.embedded.generate_request import PromptRequest, RowResult
from rollouts.engines.embedded.line import Line
from rollouts.engines.embedded.mailbox import SHUTTING_DOWN, Mailbox, resolve
from rollouts.engines.embedded.sampling import row_keys
from rollouts.engines.embedded.served_model import Served
from rollouts.engines.embedded.updates import WeightUpdates

T = TypeVar("T")
PauseMode = Literal["abort", "retract", "in_place"]


class Scheduler:
    """Lets rows into the batch, steps it, and ends them. Its methods are for the model thread: use `Mailbox.call`."""

    def __init__(self, served: Served, batch: RunningBatch, mailbox: Mailbox, *, seed: int) -> None:
        self.served = served
        self.weights = WeightUpdates(served, batch)
        self.paused = False
        self._batch = batch
        self._mailbox = mailbox
        self._line = Line()
        self._finisher = Finisher(served, self.weights)
        self._when_idle: deque[Future[None]] = deque()
        # for requests without a seed; drawn in order of arrival
        self._seeds = np.random.default_rng(seed)

    def run(self) -> None:
        """Serve until the mailbox is stopped; rows that still run or wait are then aborted."""
        while self._mailbox.wait(self._has_work):
            self._run_calls()
            self._answer_waiting()
            if not self.paused:
                self._advance()
        self._finisher.score_ended()
        self.abort(SHUTTING_DOWN, None)
        self._answer_waiting()

    def _answer_waiting(self) -> None:
        """Run the updates that are due, and answer those who wait for an empty batch, once it is."""
        self._line.run_updates(paused=self.paused, running=bool(self._batch.rows))
        while self._when_idle and not self._batch.rows:
            resolve(self._when_idle.popleft(), lambda: None)

    def _has_work(self) -> bool:
        if self._when_idle and not self._batch.rows:
            return True
        if self.paused:
            return self._line.has_update
        return bool(self._batch.rows or self._line.may_join or self._line.has_update)

    def _run_calls(self) -> None:
        while self._mailbox.has_call():
            self._finisher.score_ended()  # the call may change the weights, or ask who is running
            self._mailbox.run_call()

    def _advance(self) -> None:
        """Let waiting rows in, then sample one token for every row."""
        batch = self._batch
        try:
            count = min(batch.free, self._line.may_join)
            if count:
                batch.join(self._line.take(count), self.weights.version)
            if batch.rows:
                for row, reason in batch.step():
                    self._finisher.end(row, reason)
                self._finisher.after_step(running=bool(batch.rows))
        except torch.OutOfMemoryError:
            rows = batch.leave(range(len(batch.rows)))
            batch.flush()
            message = f"out of memory with {len(rows)} rows running: lower --max-running-requests or max_new_tokens"
            for row in rows:
                self._finisher.finish(row, abort_reason(message, 500))
            self._finisher.score_ended()

    def counts(self) -> dict[str, int]:
        """Return how many rows run and wait, how many updates wait for them, and how many prompt tokens were prefilled.
        Any thread may ask."""
        return {
            "running": len(self._batch.rows),
            "waiting": len(self._line),
            "updates_waiting": self._line.updates_waiting,
            "prefilled_tokens": self._batch.prefilled_tokens,
        }

    # --- requests ---

    def submit(
        self, requests: Sequence[PromptRequest], done: Callable[[int, list[RowResult]], object]
    ) -> None:
        """Queue prompts. `done(index, results)` is called on the model thread, once for each."""
        for index, request in enumerate(requests):
            self._submit(request, partial(done, index))

    def _submit(self, request: PromptRequest, done: Callable[[list[RowResult]], object]) -> None:
        job = PromptJob(request, done, [None] * request.params.n)
        seed = request.params.sampling_seed
        drawn = int(self._seeds.integers(2**63)) if seed is None else seed
        rows = [
            BatchRow(job, index, key) for index, key in enumerate(row_keys(drawn, request.params.n))
        ]
        if request.return_logprob and request.logprob_start < len(request.input_ids):
            try:
                job.input_logprobs = _input_logprobs(self.served, request)
            except torch.OutOfMemoryError:
                for row in rows:
                    reason = abort_reason(
                        "out of memory scoring the prompt: raise logprob_start_len", 500
                    )
                    self._finisher.finish(row, reason)
                return
        if request.max_new_tokens == 0:
            for row in rows:
                self._finisher.finish(row, {"type": "length", "length": 0})
            return
        self._line.add(rows)

    def abort(self, message: str, rids: Sequence[str] | None) -> int:
        """End the rows of these requests (None: all) with the tokens that they have. Return how many rows that were."""

        def is_meant(row: BatchRow) -> bool:
            return (
                rids is None
                or row.job.request.rid in rids
                or f"{row.job.request.rid}-{row.index}" in rids
            )

        rows = self._batch.leave([at for at, row in enumerate(self._batch.rows) if is_meant(row)])
        rows += self._line.remove(is_meant)
        for row in rows:
            self._finisher.finish(row, abort_reason(message))
        return len(rows)

    # --- pauses and updates ---

    def pause(self, mode: PauseMode) -> None:
        """Stop stepping. "abort" ends all rows, "retract" sends them back to the line, "in_place" keeps them."""
        self.paused = True
        if mode == "abort":
            self.abort("Aborted by pause_generation", None)
        elif mode == "retract":
            # to the head of the line: they go on where they were, on a fresh cache
            self._line.put_back(self._batch.leave(range(len(self._batch.rows))))

    def resume(self) -> None:
        self.paused = False

    def flush(self) -> bool:
        """Drop the cache unless rows are in it. Return whether it was dropped."""
        return self._batch.flush()

    def when_idle(self) -> "Future[None]":
        """Return a future that is resolved once no row is in the batch."""
        future: Future[None] = Future()
        self._when_idle.append(future)
        return future

    def between_requests(
        self, update: Callable[[], T], abort_message: str | None = None
    ) -> "Future[T]":
        """Run `update` at once while paused, else after all rows submitted before it; with a message, abort these."""
        future: Future[T] = Future()
        if abort_message is not None:
            self.abort(abort_message, None)
        self._line.add_update(partial(resolve, future, update))
        return future

    def set_version(self, version: str, abort_message: str | None) -> None:
        """Name the weights, at once; with a message, abort all rows first."""
        if abort_message is not None:
            self.abort(abort_message, None)
        self.weights.set_version(version)


def serve(
    load: Callable[[], Served],
    mailbox: Mailbox,
    *,
    rows_max: int,
    seed: int,
    ready: Callable[[Scheduler], object],
) -> None:
    """Load the model, hand its scheduler to `ready`, and serve until the mailbox stops. Raises what `load` raises."""
    served = load()
    with torch.inference_mode():
        batch = RunningBatch(served, rows_max)
        check_decode(served, batch)
        scheduler = Scheduler(served, batch, mailbox, seed=seed)
        ready(scheduler)
        scheduler.run()


def _input_logprobs(served: Served, request: PromptRequest) -> list[list[Any]]:
    """Return [[log-prob, id, null]] from `logprob_start` on; the first token has no log-prob, as in SGLang."""
    ids, start = request.input_ids, request.logprob_start
    later = served.input_logprobs(ids)[start:]
    return [[value, token, None] for value, token in zip([None, *later], ids[start:], strict=True)]
