"""Rows that have ended wait to be scored together; none is forgotten."""

import threading
import time
from pathlib import Path

import pytest

from rollouts.engines.embedded import scheduler as scheduler_module
from rollouts.engines.embedded.model import load
from rollouts.engines.embedded.protocol import PromptRequest, SamplingParams
from rollouts.engines.embedded.scheduler import Scheduler
from tests.engines.serving import CONTEXT, PROMPT, make_model


def test_an_engine_that_stops_answers_those_that_wait_for_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a stop answers every request, finished ones as finished. Red without scoring on the way out."""
    monkeypatch.setattr(scheduler_module, "SCORE_STEPS_MAX", 10**9)
    path = str(make_model("qwen2-tied", tmp_path, seed=0))
    engine = Scheduler(lambda: load(path, dtype="float32", device="cpu", trust_remote_code=False), rows_max=4, seed=0)
    thread = threading.Thread(target=engine.run)
    thread.start()
    params = SamplingParams(ignore_eos=True)
    requests = [
        PromptRequest(str(count), tuple(PROMPT), params, count, True, len(PROMPT))
        for count in (2, CONTEXT - len(PROMPT))
    ]
    answers: dict[int, str] = {}
    engine.submit(requests, lambda index, results: answers.update({index: results[0].finish_reason["type"]}))
    deadline = time.monotonic() + 60
    while engine.counts()["running"] != 1 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert answers == {}  # the short one has ended, and waits
    engine.stop()
    thread.join(60)
    assert answers == {0: "length", 1: "abort"}
