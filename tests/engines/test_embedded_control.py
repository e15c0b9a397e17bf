"""What the RL loop relies on around sampling: abort, pause, weight updates, refusals. On a real server process."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.serving import (
    CONTEXT,
    LOGPROB_TOLERANCE,
    LONG,
    LONG_TOKENS,
    PROMPT,
    Engine,
    in_background,
    logprobs,
    logprobs_of,
    start_long,
    wait_for,
)

# --- abort and pause ------------------------------------------------------------------------------------------------


def test_abort_by_rid_brings_the_partial_tokens(engine: Engine) -> None:
    """Goal: an aborted request answers with what it has, log-probs with it; others run on. Red with all rows ended."""
    thread, results = start_long(engine, rid="mine")
    other, others = in_background(lambda: engine.generate(PROMPT, **LONG))
    wait_for(lambda: engine.state()["waiting"] == 1)
    assert engine.post("/abort_request", {"rid": "mine"}).status_code == 200
    thread.join(200)
    answer = results[0]
    assert (
        answer["meta_info"]["finish_reason"]["type"] == "abort"
        and answer["meta_info"]["id"] == "mine"
    )
    assert 0 < len(answer["output_ids"]) < LONG_TOKENS
    expected = logprobs_of(engine.model, PROMPT, answer["output_ids"], 1.0)
    assert logprobs(answer) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    engine.post("/continue_generation")
    other.join(200)
    assert others[0]["meta_info"]["finish_reason"]["type"] == "length"


def test_pause_abort(engine: Engine) -> None:
    """Goal: mode abort ends what runs and holds what comes until continue. Red with `paused` never set."""
    thread, results = start_long(engine)
    assert engine.post("/pause_generation", {"mode": "abort"}).status_code == 200
    thread.join(200)
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort" and results[0]["output_ids"]
    late, held = in_background(lambda: engine.generate(PROMPT, max_new_tokens=2, ignore_eos=True))
    wait_for(lambda: engine.state()["waiting"] == 1)
    late.join(0.2)
    assert not held
    engine.post("/continue_generation")
    late.join(200)
    assert len(held[0]["output_ids"]) == 2


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_pause_and_go_on_changes_no_token(engine: Engine, mode: str) -> None:
    """Goal: a pause in the middle leaves ids and log-probs what they would have been.

    Red with the stream of draws restarted when a row joins again.
    """
    params = {**LONG, "sampling_seed": 21}
    undisturbed = engine.generate(PROMPT, **params)
    thread, results = start_long(engine, sampling_params=params)
    engine.post("/pause_generation", {"mode": mode})
    state = engine.state()
    assert (state["running"], state["waiting"]) == ((0, 1) if mode == "retract" else (1, 0))
    flush = engine.post("/flush_cache")
    assert flush.status_code == (200 if mode == "retract" else 400)  # in_place holds its cache
    engine.post("/continue_generation")
    thread.join(200)
    assert results[0]["output_ids"] == undisturbed["output_ids"]
    assert logprobs(results[0]) == pytest.approx(logprobs(undisturbed), abs=LOGPROB_TOLERANCE)


def test_flush_waits_when_told_to(engine: Engine) -> None:
    """Goal: /flush_cache refuses while rows run, and with ?timeout succeeds after them. Red without the wait."""
    thread, _ = start_long(engine)
    assert engine.post("/flush_cache").status_code == 400
    engine.post("/continue_generation")
    assert engine.post("/flush_cache?timeout=600").status_code == 200
    thread.join(200)
    assert engine.post("/flush_cache").status_code == 200


# --- weights --------------------------------------------------------------------------------------------------------


def test_an_update_changes_what_is_sampled_from(engine: Engine) -> None:
    """Goal: after the update log-probs are the new checkpoint's (tied head too) and the version says so.

    Red with the tensors not copied.
    """
    body = {"model_path": str(engine.new), "weight_version": "v1"}
    answer = engine.post("/update_weights_from_disk", body)
    assert answer.status_code == 200 and answer.json()["success"] is True
    assert engine.info()["weight_version"] == "v1" and engine.info()["model_path"] == str(
        engine.new
    )
    sample = engine.generate(PROMPT, max_new_tokens=30)
    assert sample["meta_info"]["weight_version"] == "v1"
    new_model = AutoModelForCausalLM.from_pretrained(engine.new, dtype=torch.float32).eval()
    expected = logprobs_of(new_model, PROMPT, sample["output_ids"], 1.0)
    assert logprobs(sample) == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
    assert logprobs_of(engine.model, PROMPT, sample["output_ids"], 1.0) != pytest.approx(
        expected, abs=1e-2
    )


def test_an_update_waits_for_what_runs(engine: Engine) -> None:
    """Goal: unpaused, a request is sampled with one version only; those that come later get the new one.

    Red with `Line.run_updates` updating at once.
    """
    most = CONTEXT - len(PROMPT)  # it has to be there when the update comes
    thread, results = start_long(
        engine, sampling_params={"max_new_tokens": most, "ignore_eos": True}
    )
    body = {"model_path": str(engine.new), "weight_version": "v2"}
    engine.post("/continue_generation")
    update, updated = in_background(lambda: engine.post("/update_weights_from_disk", body))
    wait_for(lambda: engine.state()["updates_waiting"] == 1)
    late = engine.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
    thread.join(200)
    update.join(200)
    assert updated[0].status_code == 200
    assert results[0]["meta_info"]["weight_versions"] == [
        {"version": "default", "start": 0, "end": most}
    ]
    assert late["meta_info"]["weight_versions"] == [{"version": "v2", "start": 0, "end": 3}]


def test_retract_update_continue_finishes_the_same_request(engine: Engine) -> None:
    """Goal: one answer, its tokens attributed to both versions, each with its own weights' log-probs.

    Red with the old keys and values kept over the update (mode in_place), and with the whole budget of tokens given
    anew after it.
    """
    thread, results = start_long(engine)
    engine.post("/pause_generation", {"mode": "retract"})
    body = {"model_path": str(engine.new), "weight_version": "v3", "flush_cache": False}
    assert engine.post("/update_weights_from_disk", body).status_code == 200
    assert engine.post("/flush_cache").status_code == 200
    engine.post("/continue_generation")
    thread.join(200)
    (first, second) = results[0]["meta_info"]["weight_versions"]
    assert first["version"] == "default" and second["version"] == "v3"
    assert 0 == first["start"] < first["end"] == second["start"] < second["end"] == LONG_TOKENS
    ids, split = results[0]["output_ids"], first["end"]
    new_model = AutoModelForCausalLM.from_pretrained(engine.new, dtype=torch.float32).eval()
    expected = (
        logprobs_of(engine.model, PROMPT, ids, 1.0)[:split]
        + logprobs_of(new_model, PROMPT, ids, 1.0)[split:]
    )
    assert logprobs(results[0]) == pytest.approx(expected, abs=1e-4)


def test_abort_all_requests_of_an_update(engine: Engine) -> None:
    """Goal: abort_all_requests ends what runs instead of waiting for it. Red with the flag ignored (type length)."""
    thread, results = start_long(engine)
    body = {"model_path": str(engine.new), "weight_version": "v4", "abort_all_requests": True}
    assert engine.post("/update_weights_from_disk", body).status_code == 200
    thread.join(200)
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort"


def test_weight_version_alone(engine: Engine) -> None:
    """Goal: /update_weight_version renames what is served, no more."""
    answer = engine.post(
        "/update_weight_version", {"new_version": "v9", "abort_all_requests": False}
    )
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
    (
        "too many tokens",
        {"input_ids": [2] * 8, "sampling_params": {"max_new_tokens": CONTEXT}},
        str(CONTEXT),
    ),
    (
        "unknown sampling param",
        {"input_ids": [2], "sampling_params": {"temprature": 1}},
        "temprature",
    ),
    (
        "negative temperature",
        {"input_ids": [2], "sampling_params": {"temperature": -1}},
        "temperature",
    ),
    (
        "temperature as text",
        {"input_ids": [2], "sampling_params": {"temperature": "hot"}},
        "temperature",
    ),
    ("top_p of 0", {"input_ids": [2], "sampling_params": {"top_p": 0}}, "top_p"),
    ("top_k of 0", {"input_ids": [2], "sampling_params": {"top_k": 0}}, "top_k"),
    ("min_p of 2", {"input_ids": [2], "sampling_params": {"min_p": 2}}, "min_p"),
    ("n of 0", {"input_ids": [2], "sampling_params": {"n": 0}}, "n=0"),
    ("n beyond reason", {"input_ids": [2], "sampling_params": {"n": 10**12}}, "n=1000000000000"),
    (
        "negative max_new_tokens",
        {"input_ids": [2], "sampling_params": {"max_new_tokens": -1}},
        "max_new_tokens",
    ),
    (
        "penalty",
        {"input_ids": [2], "sampling_params": {"frequency_penalty": 1.0}},
        "frequency_penalty",
    ),
    (
        "params for too many prompts",
        {"input_ids": [[2]], "sampling_params": [{}, {}]},
        "2 entries for 1",
    ),
    ("stream", {"input_ids": [2], "stream": True}, "stream"),
    ("top log-probs", {"input_ids": [2], "top_logprobs_num": 2}, "top_logprobs_num"),
    ("same rid twice", {"input_ids": [[2], [3]], "rid": ["a", "a"]}, "rid"),
    ("a body that is a list", [1, 2], "object"),
)


@pytest.mark.parametrize(
    ("body", "word"), [case[1:] for case in BAD_BODIES], ids=[case[0] for case in BAD_BODIES]
)
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
        engine.post(
            "/generate", {"input_ids": [2], "extra_key": "x", "sampling_params": {"n": 1}}
        ).status_code
        == 200
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
