"""Exact match by engine and in process. The engine is a real embedded server."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from rollouts.training.evaluation import evaluate_with_engine, evaluate_with_model, exact_match
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.weight_sync import SGLangEngine
from tests.training.tiny_task import tiny_model, tiny_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": "abcdefghij"[index % 4 :][: 3 + index % 5] + str(index)}], "answer": ""}
    for index in range(30)
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    """Weights that speak: random ones scaled up, so that greedy answers differ from prompt to prompt."""
    model = tiny_model(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def engine_url(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "rollouts.engines.embedded", "--model-path", str(directory), "--port", str(port)]
    log = Path(directory) / "engine.log"
    with log.open("w") as output, subprocess.Popen(argv, stdout=output, stderr=output) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            anyio.run(SGLangEngine(url).wait_ready, 120.0)
            yield url
        finally:
            process.terminate()


@pytest.mark.anyio
async def test_both_ways_count_the_same(model: Any, tokenizer: Any, engine_url: str) -> None:
    """Goal: one number for the same weights. A third of the rows are made right by what the model says.

    Red when the in-process way right-padded its prompts, and when text after the end token was compared.
    """
    said = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=6, batch_size=7).responses
    assert len(set(said)) > 5
    rows = [{**row, "answer": said[index] if index % 3 == 0 else "no"} for index, row in enumerate(ROWS)]
    in_process = evaluate_with_model(model, tokenizer, rows, max_new_tokens=6, batch_size=4)
    async with SGLangEngine(engine_url) as one, SGLangEngine(engine_url) as two:
        by_engine = await evaluate_with_engine([one, two], tokenizer, rows, max_new_tokens=6, rows_per_request=8)
    assert in_process == by_engine
    assert in_process.exact_match == 10 / 30 and in_process.num_rows == 30


@pytest.mark.anyio
async def test_stop_tokens_end_the_text_whatever_they_are(model: Any, tokenizer: Any, engine_url: str) -> None:
    """Goal: a stop token that is no special one stands in neither way's text. Red without the cut."""
    said = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=6).responses
    stops = [1, tokenizer(next(text for text in said if len(text) > 2 and text[1].isascii())[1])["input_ids"][0]]
    in_process = evaluate_with_model(model, tokenizer, ROWS, max_new_tokens=6, stop_token_ids=stops)
    async with SGLangEngine(engine_url) as engine:
        by_engine = await evaluate_with_engine([engine], tokenizer, ROWS, max_new_tokens=6, stop_token_ids=stops)
    assert in_process == by_engine and in_process.responses != said


@pytest.mark.anyio
async def test_groups_from_a_real_engine_match_a_forward_pass(model: Any, tokenizer: Any, engine_url: str) -> None:
    """Goal: trainer and sampler agree on every sampled token. Red with log-probs shifted by one."""
    async with SGLangEngine(engine_url) as engine:
        generate = make_generate_fn([engine], tokenizer, max_new_tokens=6, temperature=0.7)
        samples = await generate([ROWS[0]] * 4, seed=5)
        again = await generate([ROWS[0]] * 4, seed=5)
    assert samples == again and len({tuple(sample.tokens) for sample in samples}) > 1
    for sample in samples:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([sample.tokens])).logits[0].float()
        start = len(sample.tokens) - sample.response_length
        logprobs_TV = (logits_TV / 0.7).log_softmax(-1)
        expected = [float(logprobs_TV[t - 1, sample.tokens[t]]) for t in range(start, len(sample.tokens))]
        assert sample.rollout_log_probs == pytest.approx(expected, abs=1e-4)


@pytest.mark.anyio
async def test_an_engine_that_is_gone_is_an_error(tokenizer: Any) -> None:
    """Goal: no half-evaluated number. Red when failed rows counted as wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(Exception, match=url):
        await evaluate_with_engine([SGLangEngine(url)], tokenizer, ROWS[:3], max_new_tokens=2)


def test_the_training_mode_stays(model: Any, tokenizer: Any) -> None:
    """Goal: evaluation in the middle of training changes nothing. Red without the restore."""
    for training in (True, False):
        model.train(training)
        evaluate_with_model(model, tokenizer, ROWS[:2], max_new_tokens=2)
        assert model.training is training


def test_exact_match_of_texts() -> None:
    """Goal: shares by hand; white space around does not count. Red without strip."""
    assert exact_match(["a", " b\n", "c"], ["a", "b", "x"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 responses for 2 answers"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 responses"):
        exact_match([], [])


def test_nothing_to_evaluate_is_an_error(model: Any, tokenizer: Any) -> None:
    """Goal: no division by nothing, no 0.0 that means nothing. Red without the checks."""
    with pytest.raises(ValueError, match="no rows"):
        evaluate_with_model(model, tokenizer, [], max_new_tokens=2)
