"""What the RL loop relies on in any engine, shown on a real server process. Another server joins by a fixture param."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.serving import CONTEXT, EOS, VOCAB, logprobs_of, make_model, make_tokenizer, serving

ROWS_MAX = 24
LOGPROB_TOLERANCE = 1e-5
PROMPT = [2, 3, 4, 5, 6, 7, 8]
LONG_TOKENS = 1000
LONG = {"max_new_tokens": LONG_TOKENS, "ignore_eos": True}  # runs for seconds: something to pause and abort


@dataclass
class Engine:
    """A running server, and what it serves."""

    url: str
    client: httpx.Client
    old: Path  # what it started with
    new: Path  # the same architecture, other weights
    model: Any  # `old`, for reference numbers

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.client.post(self.url + path, json={} if body is None else body)

    def generate(self, input_ids: Any, *, logprob: bool = True, **params: Any) -> Any:
        answer = self.post("/generate", {"input_ids": input_ids, "sampling_params": params, "return_logprob": logprob})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def info(self) -> dict[str, Any]:
        return self.client.get(self.url + "/model_info").json()

    def state(self) -> dict[str, Any]:
        return self.client.get(self.url + "/server_info").json()["internal_states"][0]


@pytest.fixture(scope="module", params=["embedded:qwen2-tied", "embedded:llama"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    kind = request.param.split(":")[1]
    root = tmp_path_factory.mktemp(kind)
    old, new = make_model(kind, root / "old", seed=0), make_model(kind, root / "new", seed=1)
    with serving(old, max_running_requests=str(ROWS_MAX)) as url, httpx.Client(timeout=60) as client:
        yield Engine(url, client, old, new, AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32).eval())


@pytest.fixture(autouse=True)
def _as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did: nothing runs, nothing is paused, the old weights serve."""
    yield
    if "engine" in request.fixturenames:
        engine: Engine = request.getfixturevalue("engine")
        engine.post("/abort_request", {"abort_all": True})
        engine.post("/continue_generation")
        if engine.info()["weight_version"] != "default":
            body = {"model_path": str(engine.old), "weight_version": "default"}
            assert engine.post("/update_weights_from_disk", body).status_code == 200


def tokens(answer: Any) -> list[int]:
    return [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]]


def logprobs(answer: Any) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


def in_background(function: Callable[[], Any]) -> "tuple[threading.Thread, list[Any]]":
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    return thread, results


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
    answer = engine.generate(PROMPT, top_k=3, top_p=0.8, temperature=0.9, max_new_tokens=40, ignore_eos=True)
    expected = logprobs_of(engine.model, PROMPT, answer["output_ids"], 0.9)
    assert logprobs(answer) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_greedy_is_generate(engine: Engine) -> None:
    """Goal: temperature 0 is `model.generate(do_sample=False)`, with raw log-probs. Red with argmin in `sample`."""
    for prompt in (PROMPT, [9], list(range(2, 30))):
        answer = engine.generate(prompt, temperature=0, max_new_tokens=32)
        with torch.no_grad():
            expected = engine.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=32, do_sample=False
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
    chi_square = sum((seen[t] - count * probabilities[t]) ** 2 / (count * probabilities[t]) for t in likely)
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
            pool.submit(engine.generate, [3 + i % 25, 4, 5] * (1 + i % 5), max_new_tokens=10 + i, top_k=1 + i % 7)
            for i in range(40)
        ]
        beside = [pool.submit(engine.generate, PROMPT, n=4, **params) for _ in range(3)]
        for future in beside:
            got = future.result()
            assert [answer["output_ids"] for answer in got] == [answer["output_ids"] for answer in alone]
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
    assert [answer["output_ids"] for answer in one] == [answer["output_ids"] for answer in answers[3:]]


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
    stopped = [answer for answer in answers if answer["meta_info"]["finish_reason"]["type"] == "stop"]
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
    assert {answer["meta_info"]["finish_reason"].get("matched") for answer in answers} <= {"z", "ab", None}
    for answer in answers:
        if answer["meta_info"]["finish_reason"]["type"] == "stop":
            matched = answer["meta_info"]["finish_reason"]["matched"]
            whole = tokenizer.decode(answer["output_ids"], skip_special_tokens=False)
            assert whole.endswith(matched) and matched not in whole[:-1]
            assert matched not in answer["text"]


def test_text_in_and_out(engine: Engine) -> None:
    """Goal: `text` is encoded as the tokenizer does it, and output_ids decode to the answer's text."""
    body = {"text": "abc", "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}}
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
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1 + index % 12}, "return_logprob": True}
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
    thread.join(60)
    assert [len(answer["output_ids"]) for answer in results[0]] == [150] * 3 * ROWS_MAX


def test_a_client_that_goes_away_frees_its_rows(engine: Engine) -> None:
    """Goal: nobody decodes for a closed connection. Red with the disconnect not watched."""
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(10, read=0.5)) as client:
        client.post(engine.url + "/generate", json={"input_ids": PROMPT, "sampling_params": {**LONG, "n": ROWS_MAX}})
    wait_for(lambda: engine.state()["running"] == 0)
    assert engine.generate(PROMPT, max_new_tokens=2)["output_ids"]


# --- abort and pause ------------------------------------------------------------------------------------------------


def start_long(engine: Engine, **body: Any) -> "tuple[threading.Thread, list[Any]]":
    """A long request in the background, known to be running."""

    def ask() -> Any:
        return engine.post(
            "/generate", {"input_ids": PROMPT, "sampling_params": LONG, "return_logprob": True, **body}
        ).json()

    thread, results = in_background(ask)
    wait_for(lambda: engine.state()["running"] > 0)
    time.sleep(0.05)
    return thread, results


def test_abort_by_rid_brings_the_partial_tokens(engine: Engine) -> None:
    """Goal: an aborted request answers with what it has, log-probs with it; others run on. Red with all rows ended."""
    thread, results = start_long(engine, rid="mine")
    other, others = in_background(lambda: engine.generate(PROMPT, max_new_tokens=300, ignore_eos=True))
    wait_for(lambda: engine.state()["running"] == 2)
    assert engine.post("/abort_request", {"rid": "mine"}).status_code == 200
    thread.join(30)
    answer = results[0]
    assert answer["meta_info"]["finish_reason"]["type"] == "abort" and answer["meta_info"]["id"] == "mine"
    assert 0 < len(answer["output_ids"]) < LONG_TOKENS
    expected = logprobs_of(engine.model, PROMPT, answer["output_ids"], 1.0)
    assert logprobs(answer) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    other.join(30)
    assert others[0]["meta_info"]["finish_reason"]["type"] == "length"


def test_pause_abort(engine: Engine) -> None:
    """Goal: mode abort ends what runs and holds what comes until continue. Red with `paused` never set."""
    thread, results = start_long(engine)
    assert engine.post("/pause_generation", {"mode": "abort"}).status_code == 200
    thread.join(30)
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort" and results[0]["output_ids"]
    late, held = in_background(lambda: engine.generate(PROMPT, max_new_tokens=2, ignore_eos=True))
    wait_for(lambda: engine.state()["waiting"] == 1)
    late.join(0.2)
    assert not held
    engine.post("/continue_generation")
    late.join(30)
    assert len(held[0]["output_ids"]) == 2


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_pause_and_go_on_changes_no_token(engine: Engine, mode: str) -> None:
    """Goal: a pause in the middle leaves ids and log-probs what they would have been.

    Red with the stream of draws restarted when a row joins again.
    """
    params = {"max_new_tokens": 400, "ignore_eos": True, "sampling_seed": 21}
    undisturbed = engine.generate(PROMPT, **params)
    thread, results = start_long(engine, sampling_params=params)
    engine.post("/pause_generation", {"mode": mode})
    state = engine.state()
    assert (state["running"], state["waiting"]) == ((0, 1) if mode == "retract" else (1, 0))
    flush = engine.post("/flush_cache")
    assert flush.status_code == (200 if mode == "retract" else 400)  # in_place holds its cache
    engine.post("/continue_generation")
    thread.join(30)
    assert results[0]["output_ids"] == undisturbed["output_ids"]
    assert logprobs(results[0]) == pytest.approx(logprobs(undisturbed), abs=LOGPROB_TOLERANCE)


def test_flush_waits_when_told_to(engine: Engine) -> None:
    """Goal: /flush_cache refuses while rows run, and with ?timeout succeeds after them. Red without the wait."""
    thread, _ = start_long(engine, sampling_params={"max_new_tokens": 400, "ignore_eos": True})
    assert engine.post("/flush_cache").status_code == 400
    assert engine.post("/flush_cache?timeout=600").status_code == 200
    thread.join(30)
    assert engine.post("/flush_cache").status_code == 200


# --- weights --------------------------------------------------------------------------------------------------------


def test_an_update_changes_what_is_sampled_from(engine: Engine) -> None:
    """Goal: after the update log-probs are the new checkpoint's (tied head too) and the version says so.

    Red with the tensors not copied.
    """
    body = {"model_path": str(engine.new), "weight_version": "v1"}
    answer = engine.post("/update_weights_from_disk", body)
    assert answer.status_code == 200 and answer.json()["success"] is True
    assert engine.info()["weight_version"] == "v1" and engine.info()["model_path"] == str(engine.new)
    sample = engine.generate(PROMPT, max_new_tokens=30)
    assert sample["meta_info"]["weight_version"] == "v1"
    new_model = AutoModelForCausalLM.from_pretrained(engine.new, dtype=torch.float32).eval()
    expected = logprobs_of(new_model, PROMPT, sample["output_ids"], 1.0)
    assert logprobs(sample) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    assert logprobs_of(engine.model, PROMPT, sample["output_ids"], 1.0) != pytest.approx(expected, abs=1e-2)


def test_an_update_waits_for_what_runs(engine: Engine) -> None:
    """Goal: unpaused, a request is sampled with one version only; those that come later get the new one.

    Red with `_run_commands` updating at once.
    """
    thread, results = start_long(engine, sampling_params={"max_new_tokens": 400, "ignore_eos": True})
    body = {"model_path": str(engine.new), "weight_version": "v2"}
    update, updated = in_background(lambda: engine.post("/update_weights_from_disk", body))
    time.sleep(0.05)
    late = engine.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
    thread.join(30)
    update.join(30)
    assert updated[0].status_code == 200
    assert results[0]["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 400}]
    assert late["meta_info"]["weight_versions"] == [{"version": "v2", "start": 0, "end": 3}]


def test_retract_update_continue_finishes_the_same_request(engine: Engine) -> None:
    """Goal: one answer, its tokens attributed to both versions, each with its own weights' log-probs.

    Red with the old keys and values kept over the update (mode in_place).
    """
    thread, results = start_long(engine)
    engine.post("/pause_generation", {"mode": "retract"})
    body = {"model_path": str(engine.new), "weight_version": "v3", "flush_cache": False}
    assert engine.post("/update_weights_from_disk", body).status_code == 200
    assert engine.post("/flush_cache").status_code == 200
    engine.post("/continue_generation")
    thread.join(60)
    (first, second) = results[0]["meta_info"]["weight_versions"]
    assert first["version"] == "default" and second["version"] == "v3"
    assert 0 == first["start"] < first["end"] == second["start"] < second["end"] == LONG_TOKENS
    ids, split = results[0]["output_ids"], first["end"]
    new_model = AutoModelForCausalLM.from_pretrained(engine.new, dtype=torch.float32).eval()
    expected = logprobs_of(engine.model, PROMPT, ids, 1.0)[:split] + logprobs_of(new_model, PROMPT, ids, 1.0)[split:]
    assert logprobs(results[0]) == pytest.approx(expected, abs=1e-4)


def test_abort_all_requests_of_an_update(engine: Engine) -> None:
    """Goal: abort_all_requests ends what runs instead of waiting for it. Red with the flag ignored (type length)."""
    thread, results = start_long(engine)
    body = {"model_path": str(engine.new), "weight_version": "v4", "abort_all_requests": True}
    assert engine.post("/update_weights_from_disk", body).status_code == 200
    thread.join(30)
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort"


def test_weight_version_alone(engine: Engine) -> None:
    """Goal: /update_weight_version renames what is served, no more."""
    answer = engine.post("/update_weight_version", {"new_version": "v9", "abort_all_requests": False})
    assert answer.json()["success"] is True
    assert engine.generate(PROMPT, max_new_tokens=1)["meta_info"]["weight_version"] == "v9"
    assert engine.client.get(engine.url + "/get_model_info").json()["weight_version"] == "v9"


# --- bad requests ---------------------------------------------------------------------------------------------------

BAD_BODIES: tuple[tuple[str, Any, str], ...] = (
    ("empty prompt", {"input_ids": []}, "empty"),
    ("empty prompt in a batch", {"input_ids": [[2], []]}, "empty"),
    ("neither text nor ids", {}, "text"),
    ("both", {"input_ids": [2], "text": "a"}, "text"),
    ("id over the vocabulary", {"input_ids": [2, 5000]}, "5000"),
    ("negative id", {"input_ids": [-1]}, "-1"),
    ("ids that are no integers", {"input_ids": ["a"]}, "integer"),
    ("prompt over the context", {"input_ids": [2] * (CONTEXT + 1)}, str(CONTEXT)),
    ("too many tokens", {"input_ids": [2] * 8, "sampling_params": {"max_new_tokens": CONTEXT}}, str(CONTEXT)),
    ("unknown sampling param", {"input_ids": [2], "sampling_params": {"temprature": 1}}, "temprature"),
    ("negative temperature", {"input_ids": [2], "sampling_params": {"temperature": -1}}, "temperature"),
    ("temperature as text", {"input_ids": [2], "sampling_params": {"temperature": "hot"}}, "temperature"),
    ("top_p of 0", {"input_ids": [2], "sampling_params": {"top_p": 0}}, "top_p"),
    ("top_k of 0", {"input_ids": [2], "sampling_params": {"top_k": 0}}, "top_k"),
    ("min_p of 2", {"input_ids": [2], "sampling_params": {"min_p": 2}}, "min_p"),
    ("n of 0", {"input_ids": [2], "sampling_params": {"n": 0}}, "n=0"),
    ("negative max_new_tokens", {"input_ids": [2], "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
    ("penalty", {"input_ids": [2], "sampling_params": {"frequency_penalty": 1.0}}, "frequency_penalty"),
    ("params for too many prompts", {"input_ids": [[2]], "sampling_params": [{}, {}]}, "2 entries for 1"),
    ("stream", {"input_ids": [2], "stream": True}, "stream"),
    ("top log-probs", {"input_ids": [2], "top_logprobs_num": 2}, "top_logprobs_num"),
    ("same rid twice", {"input_ids": [[2], [3]], "rid": ["a", "a"]}, "rid"),
    ("a body that is a list", [1, 2], "object"),
)


@pytest.mark.parametrize(("body", "word"), [case[1:] for case in BAD_BODIES], ids=[case[0] for case in BAD_BODIES])
def test_bad_requests_are_400_and_say_why(engine: Engine, body: Any, word: str) -> None:
    """Goal: each mistake is a 400 with SGLang's error shape, naming what is wrong. Red with its check removed."""
    answer = engine.post("/generate", body)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


def test_a_body_that_is_no_json(engine: Engine) -> None:
    """Goal: broken JSON is a 400 as well, and the server lives on."""
    answer = engine.client.post(engine.url + "/generate", content=b"{not json")
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]
    assert engine.generate(PROMPT, max_new_tokens=1)["output_ids"]


def test_unknown_top_level_keys_are_ignored(engine: Engine) -> None:
    """Goal: as in SGLang, a key it does not know is no error."""
    assert (
        engine.post("/generate", {"input_ids": [2], "extra_key": "x", "sampling_params": {"n": 1}}).status_code == 200
    )


def test_the_context_can_be_filled_to_the_last_token(engine: Engine) -> None:
    """Goal: prompt + max_new_tokens == context is served. Red with a cache that ends one short."""
    answer = engine.generate([2] * (CONTEXT - 3), max_new_tokens=3, ignore_eos=True)
    assert len(answer["output_ids"]) == 3


def test_a_rid_in_use_is_refused(engine: Engine) -> None:
    """Goal: two running requests never share an id, or an abort would hit both. Red with `_rids` not kept."""
    start_long(engine, rid="taken")
    answer = engine.post("/generate", {"input_ids": [2], "rid": "taken"})
    assert answer.status_code == 400 and "taken" in answer.json()["error"]["message"]


def test_health_routes(engine: Engine) -> None:
    """Goal: the routes a supervisor asks, paused or not."""
    for path in ("/health", "/health_generate", "/ready"):
        assert engine.client.get(engine.url + path).status_code == 200
    engine.post("/pause_generation", {"mode": "retract"})
    assert engine.client.get(engine.url + "/health_generate").status_code == 200
    assert engine.post("/pause_generation", {"mode": "nap"}).status_code == 400
