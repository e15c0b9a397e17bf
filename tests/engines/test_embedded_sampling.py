"""What the RL loop relies on when it samples, from any engine, shown on a real server process."""

import json
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest
import torch

from tests.engines.serving import (
    EOS,
    LOGPROB_TOLERANCE,
    LONG,
    PROMPT,
    ROWS_MAX,
    VOCAB,
    Engine,
    in_background,
    logprobs,
    logprobs_of,
    make_tokenizer,
    tokens,
    wait_for,
)

# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_are_the_trainers_own(engine: Engine, temperature: float) -> None:
    """Goal: no train/inference gap: each log-prob equals a full forward's, divided by T. Red without the division."""
    prompts = [PROMPT, [9], [4] * 40, list(range(2, 30))]
    for prompt, answer in zip(
        prompts, engine.generate(prompts, temperature=temperature, max_new_tokens=40), strict=True
    ):
        expected = logprobs_of(engine.model, prompt, answer["output_ids"], temperature)
        assert tokens(answer) == answer["output_ids"]
        assert logprobs(answer) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_logprobs_are_not_renormalised_by_filters(engine: Engine) -> None:
    """Goal: top-k and top-p change what is sampled, never its log-prob. Red with log-probs taken after `_filter`."""
    answer = engine.generate(
        PROMPT, top_k=3, top_p=0.8, temperature=0.9, max_new_tokens=40, ignore_eos=True
    )
    expected = logprobs_of(engine.model, PROMPT, answer["output_ids"], 0.9)
    assert logprobs(answer) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_greedy_is_generate(engine: Engine) -> None:
    """Goal: temperature 0 is `model.generate(do_sample=False)`, with raw log-probs. Red with argmin in `sample`."""
    for prompt in (PROMPT, [9], list(range(2, 30))):
        answer = engine.generate(prompt, temperature=0, max_new_tokens=32)
        with torch.no_grad():
            expected = engine.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=32,
                do_sample=False,
            )
        assert answer["output_ids"] == expected[0, len(prompt) :].tolist()
        raw = logprobs_of(engine.model, prompt, answer["output_ids"], 1.0)
        assert logprobs(answer) == pytest.approx(raw, abs=LOGPROB_TOLERANCE)


def test_samples_follow_the_distribution(engine: Engine) -> None:
    """Goal: first tokens come with the model's probabilities (chi-square, 31 degrees). Red with a constant uniform."""
    count = 4000
    answers = engine.generate(PROMPT, n=count, max_new_tokens=1, sampling_seed=5)
    with torch.no_grad():
        probabilities = engine.model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1).tolist()
    seen = [0] * len(VOCAB)
    for answer in answers:
        seen[answer["output_ids"][0]] += 1
    likely = [token for token, p in enumerate(probabilities) if p * count >= 5]
    chi_square = sum(
        (seen[t] - count * probabilities[t]) ** 2 / (count * probabilities[t]) for t in likely
    )
    assert chi_square < 66  # p = 0.0003 at 31 degrees of freedom; the seed is fixed


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.5}])
def test_filters_keep_the_likeliest(engine: Engine, params: dict[str, float]) -> None:
    """Goal: top_k, top_p and min_p only ever let their own set of tokens through. Red with `_filter` left out."""
    with torch.no_grad():
        probabilities = engine.model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    if "top_k" in params:
        allowed = set(order[:2])
    elif "top_p" in params:
        before = probabilities[order].cumsum(0) - probabilities[order]
        allowed = {token for token, mass in zip(order, before.tolist(), strict=True) if mass <= 0.4}
    else:
        allowed = {token for token in order if probabilities[token] >= 0.5 * probabilities.max()}
    answers = engine.generate(PROMPT, n=200, max_new_tokens=1, **params)
    assert {answer["output_ids"][0] for answer in answers} <= allowed
    assert len(allowed) < len(VOCAB)


def test_a_seed_means_the_same_tokens_whoever_runs_beside(engine: Engine) -> None:
    """Goal: resume can be exact: (seed, row) fixes ids and log-probs, alone, in a crowd, filtered neighbours or not.

    Red with the draw keyed by the row's place in the batch, and (log-prob bits) with CPU_ROWS_MIN = 1.
    """
    params = {"max_new_tokens": 24, "sampling_seed": 11, "temperature": 1.5}
    alone = engine.generate(PROMPT, n=4, **params)
    assert len({tuple(answer["output_ids"]) for answer in alone}) == 4
    with ThreadPoolExecutor(16) as pool:
        crowd = [
            pool.submit(
                engine.generate,
                [3 + i % 25, 4, 5] * (1 + i % 5),
                max_new_tokens=10 + i,
                top_k=1 + i % 7,
            )
            for i in range(40)
        ]
        beside = [pool.submit(engine.generate, PROMPT, n=4, **params) for _ in range(3)]
        for future in beside:
            got = future.result()
            assert [answer["output_ids"] for answer in got] == [
                answer["output_ids"] for answer in alone
            ]
            assert [logprobs(answer) for answer in got] == [logprobs(answer) for answer in alone]
        for future in crowd:
            future.result()


def test_without_a_seed_samples_differ(engine: Engine) -> None:
    """Goal: two unseeded requests are two draws. Red with a fixed seed for requests that bring none."""
    first, second = (engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True) for _ in range(2))
    assert first["output_ids"] != second["output_ids"]


# --- shape of the answer --------------------------------------------------------------------------------------------


def test_single_batch_and_n(engine: Engine) -> None:
    """Goal: one prompt gives an object, a batch or n > 1 a list, prompt-major. Red with rows in order of finishing."""
    assert isinstance(engine.generate(PROMPT, max_new_tokens=2), dict)
    assert len(engine.generate([PROMPT], max_new_tokens=2)) == 1
    answers = engine.generate([PROMPT, [9, 10]], n=3, max_new_tokens=12, sampling_seed=3)
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [7, 7, 7, 2, 2, 2]
    assert len({answer["meta_info"]["id"] for answer in answers}) == 6
    one = engine.generate([9, 10], n=3, max_new_tokens=12, sampling_seed=3)
    assert [answer["output_ids"] for answer in one] == [
        answer["output_ids"] for answer in answers[3:]
    ]


def test_sampling_params_for_each_prompt(engine: Engine) -> None:
    """Goal: a batch may bring one set of params per prompt. Red with the first set used for all."""
    body = {
        "input_ids": [PROMPT, PROMPT],
        "sampling_params": [{"max_new_tokens": k, "ignore_eos": True} for k in (2, 5)],
    }
    answers = engine.post("/generate", body).json()
    assert [a["meta_info"]["finish_reason"] for a in answers] == [
        {"type": "length", "length": 2},
        {"type": "length", "length": 5},
    ]


def test_a_group_is_prefilled_once(engine: Engine) -> None:
    """Goal: n samples cost one prefill. Red with the prefixes of `Batch.join` keyed by row as well."""
    before = engine.state()["prefilled_tokens"]
    answers = engine.generate(list(range(2, 30)), n=16, max_new_tokens=3)
    assert engine.state()["prefilled_tokens"] - before == 27  # the 28th is the first step's input
    assert sorted({answer["meta_info"]["cached_tokens"] for answer in answers}) == [0, 27]


def test_eos_ends_and_is_kept(engine: Engine) -> None:
    """Goal: EOS is the last of output_ids with its log-prob, so stopping can be trained; it is not in the text.

    Red with the EOS dropped from the outputs.
    """
    answers = engine.generate(PROMPT, n=64, max_new_tokens=400, temperature=2.0)
    stopped = [
        answer for answer in answers if answer["meta_info"]["finish_reason"]["type"] == "stop"
    ]
    assert len(stopped) > 32
    for answer in stopped:
        ids = answer["output_ids"]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
        assert ids[-1] == EOS and EOS not in ids[:-1]
        assert answer["meta_info"]["completion_tokens"] == len(ids) == len(logprobs(answer))
        assert "<eos>" not in answer["text"]


def test_ignore_eos_runs_to_the_length(engine: Engine) -> None:
    """Goal: ignore_eos gives exactly max_new_tokens. Red with `_ignore_eos` never set."""
    answers = engine.generate(PROMPT, n=16, max_new_tokens=200, temperature=2.0, ignore_eos=True)
    assert {len(answer["output_ids"]) for answer in answers} == {200}
    assert any(EOS in answer["output_ids"] for answer in answers)
    assert answers[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 200}


def test_stop_token_ids_and_stop_strings(engine: Engine) -> None:
    """Goal: own stops end a row, ids keep what matched, text does not. Red with `_watched` left empty."""
    common = {"n": 32, "max_new_tokens": 400, "temperature": 2.0, "ignore_eos": True}
    for answer in engine.generate(PROMPT, **common, stop_token_ids=[10, 11]):
        reason, ids = answer["meta_info"]["finish_reason"], answer["output_ids"]
        assert reason == {"type": "stop", "matched": ids[-1]} and ids[-1] in (10, 11)
        assert not {10, 11} & set(ids[:-1])
    tokenizer = make_tokenizer()
    answers = engine.generate(PROMPT, **common, stop=["z", "ab"])
    assert {answer["meta_info"]["finish_reason"].get("matched") for answer in answers} <= {
        "z",
        "ab",
        None,
    }
    for answer in answers:
        if answer["meta_info"]["finish_reason"]["type"] == "stop":
            matched = answer["meta_info"]["finish_reason"]["matched"]
            whole = tokenizer.decode(answer["output_ids"], skip_special_tokens=False)
            assert whole.endswith(matched) and matched not in whole[:-1]
            assert matched not in answer["text"]


def test_text_in_and_out(engine: Engine) -> None:
    """Goal: `text` is encoded as the tokenizer does it, and output_ids decode to the answer's text."""
    body = {
        "text": "abc",
        "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
    }
    answer = engine.post("/generate", body).json()
    assert answer["meta_info"]["prompt_tokens"] == 3
    same = engine.generate([2, 3, 4], temperature=0, max_new_tokens=6, ignore_eos=True)
    assert answer["output_ids"] == same["output_ids"]
    assert answer["text"] == make_tokenizer().decode(answer["output_ids"], skip_special_tokens=True)


def test_prompt_logprobs(engine: Engine) -> None:
    """Goal: logprob_start_len=0 scores the prompt as a full forward does. Red shifted by one."""
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    answer = engine.post("/generate", {**body, "logprob_start_len": 0}).json()
    entries = answer["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == PROMPT and entries[0][0] is None
    expected = logprobs_of(engine.model, PROMPT[:1], PROMPT[1:], 1.0)
    assert [entry[0] for entry in entries[1:]] == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    assert answer["output_ids"] == []
    assert engine.post("/generate", body).json()["meta_info"]["input_token_logprobs"] == []


# --- load -----------------------------------------------------------------------------------------------------------


def test_three_hundred_requests_at_once(engine: Engine) -> None:
    """Goal: far more requests than max_running_requests all get their own answer. Red with rows swapped in `leave`."""

    def ask(index: int) -> tuple[list[int], Any]:
        prompt = [2 + index % 25] * (1 + index % 9)
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 1 + index % 12},
            "return_logprob": True,
        }
        return prompt, client.post(engine.url + "/generate", json=body).json()

    limits = httpx.Limits(max_connections=None)
    with httpx.Client(timeout=120, limits=limits) as client, ThreadPoolExecutor(300) as pool:
        for prompt, answer in pool.map(ask, range(300)):
            expected = logprobs_of(engine.model, prompt, answer["output_ids"], 1.0)
            assert logprobs(answer) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    assert engine.state()["running"] == 0


def test_no_more_than_max_running_requests(engine: Engine) -> None:
    """Goal: the limit holds while more wait. Red with `free` twice as large."""
    thread, results = in_background(
        lambda: engine.generate(PROMPT, n=3 * ROWS_MAX, max_new_tokens=150, ignore_eos=True)
    )
    wait_for(lambda: engine.state()["waiting"] > 0)
    state = engine.state()
    assert state["running"] == ROWS_MAX
    thread.join(200)
    assert [len(answer["output_ids"]) for answer in results[0]] == [150] * 3 * ROWS_MAX


def test_a_client_that_goes_away_frees_its_rows(engine: Engine) -> None:
    """Goal: nobody decodes for a closed connection. Red with the disconnect not watched: frozen rows then stay."""

    body = {"input_ids": PROMPT, "sampling_params": {**LONG, "n": ROWS_MAX}}
    client = HTTPConnection(engine.url.removeprefix("http://"), timeout=60)
    client.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    wait_for(lambda: engine.state()["running"] == ROWS_MAX)
    # from here on they can only end by an abort
    engine.post("/pause_generation", {"mode": "in_place"})
    assert engine.state()["running"] == ROWS_MAX
    client.close()
    wait_for(lambda: engine.state()["running"] == 0)
    engine.post("/continue_generation")
    assert engine.generate(PROMPT, max_new_tokens=2)["output_ids"]
