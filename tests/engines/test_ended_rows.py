"""Rows that have ended wait to be scored together; none is forgotten."""

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest
import torch

from rollouts.engines.embedded import finisher
from rollouts.engines.embedded.batch import RunningBatch
from rollouts.engines.embedded.cache import Prefilled
from rollouts.engines.embedded.generate_request import PromptRequest, SamplingParams
from rollouts.engines.embedded.mailbox import CommandRefused, Mailbox
from rollouts.engines.embedded.scheduler import Scheduler, serve
from rollouts.engines.embedded.served_model import Served, load
from tests.engines.serving import CONTEXT, PROMPT, make_model, wait_for


def start(directory: Path) -> tuple[Mailbox, Scheduler, threading.Thread]:
    """A served tiny model, its thread running."""
    path = str(make_model("qwen2-tied", directory, seed=0))
    mailbox, ready = Mailbox(), queue.Queue[Scheduler]()

    def load_tiny() -> Served:
        return load(path, dtype="float32", device="cpu", trust_remote_code=False)

    thread = threading.Thread(
        target=lambda: serve(load_tiny, mailbox, rows_max=4, seed=0, ready=ready.put)
    )
    thread.start()
    return mailbox, ready.get(timeout=60), thread


def test_a_prefill_without_memory_answers_its_request_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: memory that runs out as a row joins ends that row alone, once, and the next request is served. Red with the
    row left in the line: it joined again and again, and nothing else ran."""
    mailbox, engine, thread = start(tmp_path)
    prefill, failures = RunningBatch._prefill, [torch.OutOfMemoryError()]

    def first_fails(self: RunningBatch, prefixes: Sequence[Sequence[int]]) -> Prefilled:
        if failures:
            raise failures.pop()
        return prefill(self, prefixes)

    monkeypatch.setattr(RunningBatch, "_prefill", first_fails)
    answers: list[tuple[int, str]] = []
    params = SamplingParams(ignore_eos=True)
    requests = [
        PromptRequest(name, tuple(PROMPT), params, 2, True, len(PROMPT)) for name in ("a", "b")
    ]
    for number, request in enumerate(requests):
        note = partial(
            lambda at, _, results: answers.append((at, results[0].finish_reason["type"])), number
        )
        mailbox.call(partial(engine.submit, [request], note))
        wait_for(lambda: len(answers) > number)  # noqa: B023 - called at once
    mailbox.stop()
    thread.join(60)
    assert answers == [(0, "abort"), (1, "length")]


def test_an_engine_that_stops_answers_those_that_wait_for_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a stop answers every request, finished ones as finished. Red without scoring on the way out."""
    monkeypatch.setattr(finisher, "SCORE_STEPS_MAX", 10**9)
    mailbox, engine, thread = start(tmp_path)
    params = SamplingParams(ignore_eos=True)
    requests = [
        PromptRequest(str(count), tuple(PROMPT), params, count, True, len(PROMPT))
        for count in (2, CONTEXT - len(PROMPT))
    ]
    answers: dict[int, str] = {}
    mailbox.call(
        lambda: engine.submit(
            requests, lambda at, results: answers.update({at: results[0].finish_reason["type"]})
        )
    )
    deadline = time.monotonic() + 60
    while engine.counts()["running"] != 1 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert answers == {}  # the short one has ended, and waits
    mailbox.stop()
    thread.join(60)
    assert answers == {0: "length", 1: "abort"}


def test_a_stop_answers_every_call_that_waits(tmp_path: Path) -> None:
    """Goal: no request hangs because the engine stops: calls that were not run are refused, and who waits for the batch
    to empty, or for an update's turn, is answered. Red with any of the three left: its future was never resolved."""
    mailbox, engine, thread = start(tmp_path)
    entered, leave = threading.Event(), threading.Event()

    def block() -> None:
        params = SamplingParams(ignore_eos=True)
        long = PromptRequest("a", tuple(PROMPT), params, CONTEXT - len(PROMPT), True, len(PROMPT))
        engine.submit([long], lambda at, results: None)
        entered.set()
        leave.wait(60)

    blocked = mailbox.call(block)
    assert entered.wait(60)
    waiting = mailbox.call(lambda: "run")
    held: list[Future[object]] = [engine.when_idle(), engine.between_requests(lambda: "updated")]
    mailbox.stop()
    leave.set()
    thread.join(60)
    assert not thread.is_alive()
    with pytest.raises(CommandRefused, match="shutting down"):
        waiting.result(timeout=0)
    assert [blocked.result(timeout=0), *(future.result(timeout=0) for future in held)] == [
        *(None, None),
        "updated",
    ]
