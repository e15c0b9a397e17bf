"""The model thread: who runs, who waits, and what happens between two steps.

Everything that touches the model runs on this one thread, in order. Other threads hand in closures (`call`) and jobs
(`submit`); both take effect between steps, so there is no lock around the model and no half-applied command.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from rollouts.engines.embedded import model as model_module
from rollouts.engines.embedded.batch import Batch, Job, Row, abort_reason
from rollouts.engines.embedded.model import ModelError, Served
from rollouts.engines.embedded.protocol import PromptRequest, RowResult, SamplingParams
from rollouts.engines.embedded.sampling import row_keys
from rollouts.engines.embedded.scoring import can_score, score
from rollouts.engines.embedded.weights import UpdateSession

T = TypeVar("T")
PauseMode = Literal["abort", "retract", "in_place"]
DEFAULT_VERSION = "default"  # what SGLang calls the weights it started with
SCORE_TOKENS_MAX = 8192  # finished rows wait for others to be scored with, up to so many tokens
SCORE_STEPS_MAX = 16  # and so many steps


class UpdateRefused(Exception):
    """A command that did not succeed, with the message the caller gets."""


class Scheduler:
    """Owns the batch and the weights. `run` is the thread's body; all other methods may be called from any thread."""

    def __init__(self, load: Callable[[], Served], *, rows_max: int, seed: int) -> None:
        self._load = load
        self._rows_max = rows_max
        self._seeds = np.random.default_rng(seed)  # for requests that bring no seed; drawn in order of arrival
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._waiting: deque[Row] = deque()
        self._behind_update: deque[Row] = deque()  # arrived while an update waits for those before them
        self._updates: deque[Callable[[], None]] = deque()  # waiting until nothing runs
        self._when_idle: deque[Callable[[], None]] = deque()  # waiting until no row is in the batch
        self._unscored: list[tuple[Row, dict[str, Any]]] = []  # finished, but for their log-probs
        self._unscored_steps = 0  # since the first of them finished
        self._scores = False
        self._batch: Batch | None = None
        self._session: UpdateSession | None = None
        self._stopping = False
        self.served: Served | None = None
        self.paused = False
        self.weight_version = DEFAULT_VERSION
        self.model_path = ""

    # --- from any thread ---

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the model thread between two steps."""
        future: Future[T] = Future()

        def command() -> None:
            _resolve(future, function)

        with self._wake:
            if self._stopping:
                future.set_exception(UpdateRefused("the engine is shutting down"))
                return future
            self._commands.append(command)
            self._wake.notify()
        return future

    def submit(self, requests: Sequence[PromptRequest], done: Callable[[int, list[RowResult]], object]) -> None:
        """Queue prompts. `done(index, results)` is called on the model thread, once for each."""

        def enqueue() -> None:
            for index, request in enumerate(requests):
                self._enqueue(request, partial(done, index))

        self.call(enqueue)

    def abort(self, rids: Sequence[str] | None) -> "Future[int]":
        """End the rows of these requests (None: all) with what they have. How many rows that were."""
        return self.call(lambda: self._abort("Aborted", rids))

    def pause(self, mode: PauseMode) -> "Future[None]":
        return self.call(lambda: self._pause(mode))

    def resume(self) -> "Future[None]":
        return self.call(self._resume)

    def flush(self) -> "Future[bool]":
        """Drop the cache unless rows are in it; whether it was dropped."""
        return self.call(self._flush)

    def when_idle(self) -> "Future[None]":
        """Resolved when no row is in the batch."""
        future: Future[None] = Future()
        self.call(lambda: self._when_idle.append(lambda: _resolve(future, lambda: None)))
        return future

    def update_weights(
        self, path: str, *, version: str | None, abort_all: bool, flush_cache: bool
    ) -> "Future[tuple[str, int]]":
        """Load `path`: at once when paused, else after all that has been submitted. (message, rows that were held).

        The future raises UpdateRefused when the load failed (the old weights serve on) or the flush was refused (the
        new ones do).
        """
        return self._between_requests(lambda: self._update(path, version, flush_cache), abort_all)

    def begin_update(self) -> "Future[None]":
        """Open a session for `update_tensors`, at once when paused, else after all that has been submitted."""
        return self._between_requests(self._begin_update)

    def update_tensors(
        self, named: list[tuple[str, torch.Tensor]], *, version: str | None, abort_all: bool, flush_cache: bool
    ) -> "Future[tuple[str, int]]":
        """Copy tensors into the model, within a session; else as `update_weights`. What came before a failure stays."""
        return self._between_requests(lambda: self._update_tensors(named, version, flush_cache), abort_all)

    def end_update(self) -> "Future[None]":
        """Close the session. The future raises UpdateRefused when some of the model's tensors never came."""
        return self._between_requests(self._end_update)

    def _between_requests(self, function: Callable[[], T], abort_all: bool = False) -> "Future[T]":
        future: Future[T] = Future()

        def queue_update() -> None:
            if abort_all:
                self._abort("Aborted for a weight update", None)
            self._updates.append(lambda: _resolve(future, function))

        self.call(queue_update)
        return future

    def set_version(self, version: str, abort_all: bool) -> "Future[None]":
        def apply() -> None:
            if abort_all:
                self._abort("Aborted for a weight version update", None)
            self._set_version(version)

        return self.call(apply)

    def counts(self) -> dict[str, int]:
        """How many rows run and wait, and how many prompt tokens were prefilled so far."""
        batch = self._batch
        return {
            "running": len(batch.rows) if batch else 0,
            "waiting": len(self._waiting) + len(self._behind_update),
            "prefilled_tokens": batch.prefilled_tokens if batch else 0,
        }

    def stop(self) -> None:
        """End the thread after the step it is in; everything still queued is aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # --- the model thread ---

    def run(self) -> None:
        """Load the model, then serve until `stop`. Raises what loading raises."""
        served = self._load()
        with torch.inference_mode():
            batch = Batch(served, self._rows_max)
            check_decode(served, batch)
            self._scores = can_score(served)
            batch.prefilled_tokens = 0
            self._batch, self.served, self.model_path = batch, served, served.path
            while self._await_work():
                self._run_commands()
                if not self.paused:
                    self._advance(batch)
            self._finish_scored()
            self._abort("the engine is shutting down", None)

    def _await_work(self) -> bool:
        """Sleep until there is something to do; whether to go on."""
        assert self._batch is not None
        with self._wake:
            while not (self._stopping or self._commands or self._runnable()):
                self._wake.wait()
            return not self._stopping

    def _runnable(self) -> bool:
        assert self._batch is not None
        if self._when_idle and not self._batch.rows:
            return True
        if self.paused:
            return bool(self._updates)
        return bool(self._batch.rows or self._waiting or self._updates)

    def _run_commands(self) -> None:
        assert self._batch is not None
        while True:
            with self._wake:
                if not self._commands:
                    break
                command = self._commands.popleft()
            self._finish_scored()  # the command may change the weights, or ask who is running
            command()
        while self._updates and (self.paused or not (self._batch.rows or self._waiting)):
            self._updates.popleft()()
        if not self._updates:
            self._waiting.extend(self._behind_update)
            self._behind_update.clear()
        while self._when_idle and not self._batch.rows:
            self._when_idle.popleft()()

    def _advance(self, batch: Batch) -> None:
        """Let waiting rows in, then one token for everybody."""
        try:
            count = min(batch.free, len(self._waiting))
            if count:
                joining = [self._waiting[index] for index in range(count)]
                batch.join(joining, self.weight_version)
                for _ in range(count):
                    self._waiting.popleft()
            if batch.rows:
                for row, reason in batch.step():
                    self._end(row, reason)
                self._unscored_steps += bool(self._unscored)
                tokens = sum(len(row.ids) for row, _ in self._unscored)
                if not batch.rows or tokens >= SCORE_TOKENS_MAX or self._unscored_steps >= SCORE_STEPS_MAX:
                    self._finish_scored()
        except torch.OutOfMemoryError:
            rows = batch.leave(range(len(batch.rows)))
            batch.drop_cache()
            message = f"out of memory with {len(rows)} rows running: lower --max-running-requests or max_new_tokens"
            for row in rows:
                self._finish(row, abort_reason(message, 500))
            self._finish_scored()

    def _enqueue(self, request: PromptRequest, done: Callable[[list[RowResult]], object]) -> None:
        assert self.served is not None
        job = Job(request, done, [None] * request.params.n)
        seed = request.params.sampling_seed
        drawn = int(self._seeds.integers(2**63)) if seed is None else seed
        rows = [Row(job, index, key) for index, key in enumerate(row_keys(drawn, request.params.n))]
        if request.return_logprob and request.logprob_start < len(request.input_ids):
            try:
                job.input_logprobs = _input_logprobs(self.served, request)
            except torch.OutOfMemoryError:
                for row in rows:
                    self._finish(row, abort_reason("out of memory scoring the prompt: raise logprob_start_len", 500))
                return
        if request.max_new_tokens == 0:
            for row in rows:
                row.versions.append((self.weight_version, 0))
                self._finish(row, {"type": "length", "length": 0})
            return
        (self._behind_update if self._updates else self._waiting).extend(rows)

    def _end(self, row: Row, reason: dict[str, Any]) -> None:
        """Finish a row: at once, or with others once they are scored."""
        if self._scores and row.job.request.return_logprob and len(row.versions) == 1 and reason["type"] != "abort":
            self._unscored.append((row, reason))
        else:
            self._finish(row, reason)

    def _finish_scored(self) -> None:
        assert self.served is not None
        ended, self._unscored, self._unscored_steps = self._unscored, [], 0
        if ended:
            # Without memory for it, the rows keep the log-probs that decoding gave: the same up to rounding.
            with contextlib.suppress(torch.OutOfMemoryError):
                score(self.served, [row for row, _ in ended])
        for row, reason in ended:
            self._finish(row, reason)

    def _finish(self, row: Row, reason: dict[str, Any]) -> None:
        job = row.job
        versions = row.versions or [(self.weight_version, 0)]
        job.results[row.index] = RowResult(
            row.output_ids, row.logprobs, reason, row.cached_tokens, versions, job.input_logprobs
        )
        finished = [result for result in job.results if result is not None]
        if len(finished) == len(job.results):
            job.done(finished)

    def _abort(self, message: str, rids: Sequence[str] | None) -> int:
        assert self._batch is not None

        def meant(row: Row) -> bool:
            return rids is None or row.job.request.rid in rids or f"{row.job.request.rid}-{row.index}" in rids

        rows = self._batch.leave([at for at, row in enumerate(self._batch.rows) if meant(row)])
        for queue in (self._waiting, self._behind_update):
            kept = [row for row in queue if not meant(row)]
            rows += [row for row in queue if meant(row)]
            queue.clear()
            queue.extend(kept)
        for row in rows:
            self._finish(row, abort_reason(message))
        return len(rows)

    def _pause(self, mode: PauseMode) -> None:
        assert self._batch is not None
        self.paused = True
        if mode == "abort":
            self._abort("Aborted by pause_generation", None)
        elif mode == "retract":  # back to the head of the line: they go on where they were, on a fresh cache
            self._waiting.extendleft(reversed(self._batch.leave(range(len(self._batch.rows)))))

    def _resume(self) -> None:
        self.paused = False

    def _flush(self) -> bool:
        assert self._batch is not None
        if self._batch.rows:
            return False
        self._batch.drop_cache()
        return True

    def _set_version(self, version: str) -> None:
        assert self._batch is not None
        self.weight_version = version
        self._batch.note_version(version)

    def _update(self, path: str, version: str | None, flush_cache: bool) -> tuple[str, int]:
        assert self.served is not None and self._batch is not None
        try:
            with torch.inference_mode(False):
                model_module.load_weights(self.served, path)
        except ModelError as error:
            raise UpdateRefused(f"Failed to update weights: {error}. The old weights serve on.") from error
        self.model_path = path
        return self._updated(version, flush_cache)

    def _begin_update(self) -> None:
        assert self.served is not None
        if self._session is not None:
            raise UpdateRefused("a weight-update session is already open; call end_weight_update first")
        self._session = UpdateSession(self.served.model)

    def _update_tensors(
        self, named: list[tuple[str, torch.Tensor]], version: str | None, flush_cache: bool
    ) -> tuple[str, int]:
        if self._session is None:
            raise UpdateRefused("needs to stand between begin_weight_update and end_weight_update")
        try:
            with torch.inference_mode(False):
                self._session.load(named)
        except model_module.ModelError as error:
            raise UpdateRefused(f"Failed to update weights: {error}. What came before it stays.") from error
        return self._updated(version, flush_cache)

    def _end_update(self) -> None:
        if self._session is None:
            raise UpdateRefused("no weight-update session is open; call begin_weight_update first")
        session, self._session = self._session, None
        try:
            session.finish()
        except model_module.ModelError as error:
            raise UpdateRefused(f"The weights are incomplete: {error}.") from error

    def _updated(self, version: str | None, flush_cache: bool) -> tuple[str, int]:
        assert self._batch is not None
        message = "Succeeded to update model weights."
        if version is not None:
            self._set_version(version)
            message += f" Weight version updated to {version}."
        if flush_cache and not self._flush():
            raise UpdateRefused("The weights were updated, but the cache was not flushed: requests are running in it.")
        return message, len(self._batch.rows)


def _input_logprobs(served: Served, request: PromptRequest) -> list[list[Any]]:
    """[[log-prob, id, null]] from `logprob_start` on; the first has no log-prob, as in SGLang."""
    ids, start = request.input_ids, request.logprob_start
    later = served.input_logprobs(ids)[start:]
    return [[value, token, None] for value, token in zip([None, *later], ids[start:], strict=True)]


def _resolve(future: "Future[T]", function: Callable[[], T]) -> None:
    """Give the future what `function` returns or raises; the thread lives on either way."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:  # it belongs to whoever waits for the future
        future.set_exception(error)
    else:
        future.set_result(result)


def check_decode(served: Served, batch: Batch) -> None:
    """Prove that step-by-step decoding gives this architecture's own log-probs; also warms the model up.

    Raises ModelError where it does not, rather than serve tokens that the trainer would score otherwise.
    """
    ids = tuple(np.random.default_rng(0).integers(served.vocab_size, size=min(6, served.context_length - 2)).tolist())
    request = PromptRequest("check", ids, SamplingParams(temperature=0.0, ignore_eos=True), 2, True, len(ids))
    batch.join([Row(Job(request, lambda _: None, [None]), 0, row_keys(0, 1)[0])], DEFAULT_VERSION)
    ended: list[tuple[Row, dict[str, Any]]] = []
    while not ended:
        ended = batch.step()
    row = ended[0][0]
    expected = served.input_logprobs((*ids, *row.output_ids))[len(ids) - 1 :]
    worst = max(abs(ours - theirs) for ours, theirs in zip(row.logprobs, expected, strict=True))
    allowed = 1e-3 if served.dtype == torch.float32 else 0.3
    if not worst <= allowed:
        name = type(served.model).__name__
        raise ModelError(f"{served.path}: {name} decodes with log-probs off by {worst:.2g}: cannot be served")
