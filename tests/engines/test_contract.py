"""The contract that every engine client keeps, the same cases on real servers: embedded, SGLang and vLLM on a CPU.

The RL loop, evaluation and agents rely on no more than this. Where a server cannot do it, `contract_servers.FACTS` says
so and why, and the case shows that too.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollouts.training.inference.client import EngineClient, RequestError
from rollouts.training.inference.known_versions import KNOWN_VERSIONS
from rollouts.training.weight_sync import (
    EngineError,
    Generation,
    WeightSyncError,
    sync_weights_to_engines,
)
from tests.engines.contract_servers import Running
from tests.engines.serving import CONTEXT, EOS, PROMPT, VOCAB, logprobs_of, make_tokenizer

# the first on a machine builds SGLang's environment
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1200)]
TOLERANCE = 1e-4
SHORT = {"max_new_tokens": 12, "ignore_eos": True}
LONG_TOKENS = 400
LONG = {"max_new_tokens": LONG_TOKENS, "ignore_eos": True}
ENDLESS = {"max_new_tokens": CONTEXT - 100, "ignore_eos": True}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def models(served: Running) -> dict[str, Any]:
    """The trainer's side: the same weights, one forward over the whole sequence."""
    load = AutoModelForCausalLM.from_pretrained
    return {path.name: load(path, dtype=torch.float32).eval() for path in (served.old, served.new)}


@pytest.fixture
async def client(served: Running) -> AsyncIterator[EngineClient]:
    """A client; afterwards nothing runs, nothing is paused, and the old weights serve."""
    async with served.client() as client:
        yield client
        with anyio.CancelScope(shield=True):
            await client.resume()
            await client.abort()
            version = (await client.model_info())["weight_version"]
            if version != served.first_version and not version.startswith("old-"):
                await client.update_weights_from_checkpoint(str(served.old))


def close(expected: list[float]) -> Any:
    return pytest.approx(expected, abs=TOLERANCE)


async def run_beside(
    client: EngineClient,
    params: dict[str, Any],
    then: Callable[[], Awaitable[None]],
    **options: Any,
) -> list[Generation]:
    """A request that is known to run when `then` is called; what it answers.

    It was sent first, and servers take requests in order: once a later one has its token, it runs.
    """
    found: list[Generation] = []

    async def ask() -> None:
        found.extend(await client.generate(PROMPT, params, **options))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.sleep(0.1)
        await client.generate([9], {"max_new_tokens": 1})
        await then()
    return found


# --- who answers ----------------------------------------------------------------------------------------------------


async def test_the_handshake(client: EngineClient, served: Running) -> None:
    """Goal: kind, a version we know, that seeds count, and the vocabulary. Red with another kind."""
    server = await client.server()
    assert server.kind == served.kind
    assert server.version in KNOWN_VERSIONS[server.kind]
    assert server.seeds and server.vocab_size == len(VOCAB)
    info = await client.model_info()
    assert info["model_path"] == str(served.old) and info["weight_version"]


async def test_health_while_paused(client: EngineClient) -> None:
    """Goal: a paused engine is alive, and waiting for it ends. Red with SGLang asked for /health, which samples."""
    await client.wait_ready(200)
    assert await client.health()
    await client.pause("retract")
    with anyio.fail_after(100):
        assert await client.health()


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
async def test_logprobs_are_the_trainers_own(
    client: EngineClient, models: Any, temperature: float
) -> None:
    """Goal: token ids in and out, each with the log-prob of the trainer's own forward at T. Red with T left out of
    the expectation."""
    prompts = [PROMPT, [9], [4] * 40, list(range(2, 30))]
    params = {"temperature": temperature, "max_new_tokens": 40, "ignore_eos": True}
    groups = await client.generate_batch(prompts, params, n=2)
    for prompt, group in zip(prompts, groups, strict=True):
        for row in group:
            assert (row.prompt_tokens, len(row.output_ids), row.finish_reason) == (
                len(prompt),
                40,
                "length",
            )
            assert row.logprobs == close(
                logprobs_of(models["old"], prompt, row.output_ids, temperature)
            )
    (silent,) = await client.generate(PROMPT, SHORT, return_logprob=False)
    assert silent.logprobs is None and len(silent.output_ids) == 12


async def test_greedy_is_the_models_own(client: EngineClient, models: Any) -> None:
    """Goal: temperature 0 is argmax, with log-probs at T = 1. Red with sampling at T = 1."""
    for prompt in (PROMPT, [9], list(range(2, 30))):
        (row,) = await client.generate(prompt, {"temperature": 0.0, "max_new_tokens": 24})
        with torch.no_grad():
            ids = torch.tensor([prompt])
            expected = models["old"].generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
            )
        assert row.output_ids == expected[0, len(prompt) :].tolist()
        assert row.logprobs == close(logprobs_of(models["old"], prompt, row.output_ids, 1.0))


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.5}])
async def test_filters(
    client: EngineClient, served: Running, models: Any, filters: dict[str, Any]
) -> None:
    """Goal: only the likeliest are sampled; log-probs are of the whole distribution, or refused. Red with top_k kept
    from the server."""
    if "min_p" in filters and not served.facts.min_p:
        with pytest.raises(RequestError, match="min_p"):
            await client.generate(PROMPT, filters)
        return
    probabilities = torch.tensor(logprobs_of_all(models["old"], PROMPT)).exp()
    order = probabilities.argsort(descending=True).tolist()
    if "top_k" in filters:
        allowed = set(order[:2])
    elif "top_p" in filters:
        before = probabilities[order].cumsum(0) - probabilities[order]
        allowed = {
            token for token, mass in zip(order, before.tolist(), strict=True) if mass <= 0.4 + 1e-6
        }
    else:
        allowed = {
            token for token in order if probabilities[token] >= 0.5 * probabilities.max() - 1e-6
        }
    rows = await client.generate(
        PROMPT, {"max_new_tokens": 1, **filters}, n=100, return_logprob=False
    )
    assert {row.output_ids[0] for row in rows} <= allowed and len(allowed) < len(VOCAB)
    params = {**SHORT, **filters, "temperature": 0.9}
    if not served.facts.filtered_logprobs:
        with pytest.raises(RequestError, match="log-probs"):
            await client.generate(PROMPT, params)
        return
    (row,) = await client.generate(PROMPT, params)
    assert row.logprobs == close(logprobs_of(models["old"], PROMPT, row.output_ids, 0.9))


def logprobs_of_all(model: Any, prompt: list[int]) -> list[float]:
    with torch.no_grad():
        found: list[float] = (
            model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1).tolist()
        )
    return found


async def test_groups_keep_their_order_and_their_rows_differ(client: EngineClient) -> None:
    """Goal: n different samples a prompt, prompts in order; as many alone as in a batch. Red with rows cut by prompt
    count instead of n, and on SGLang with one seed for the n rows."""
    params = [{**SHORT, "temperature": 1.5, "sampling_seed": seed} for seed in (3, 4)]
    groups = await client.generate_batch([PROMPT, [9, 10]], params, n=4)
    assert [[row.prompt_tokens for row in group] for group in groups] == [[7] * 4, [2] * 4]
    assert all(len({tuple(row.output_ids) for row in group}) == 4 for group in groups)
    alone = await client.generate([9, 10], params[1], n=4)
    assert [row.output_ids for row in alone] == [row.output_ids for row in groups[1]]


async def test_seeds(client: EngineClient) -> None:
    """Goal: a seed fixes the tokens, alone, as the first of n, and in a crowd; none, and each request is another draw.
    Red with the seed left out of the request."""
    params = {"max_new_tokens": 20, "ignore_eos": True, "temperature": 1.5, "sampling_seed": 11}
    (alone,) = await client.generate(PROMPT, params)
    crowd: list[list[Generation]] = []

    async def beside() -> None:
        crowd.append(await client.generate(PROMPT, params, n=3))

    async with anyio.create_task_group() as group:
        for index in range(20):
            group.start_soon(client.generate, [3 + index % 25, 4, 5] * (1 + index % 5), SHORT)
        group.start_soon(beside)
        group.start_soon(beside)
    for rows in crowd:
        assert rows[0].output_ids == alone.output_ids
        assert rows[0].logprobs == close(alone.logprobs or [])
    assert [row.output_ids for row in crowd[0]] == [row.output_ids for row in crowd[1]]
    (other,) = await client.generate(PROMPT, {**params, "sampling_seed": 12})
    assert other.output_ids != alone.output_ids
    draws = [await client.generate(PROMPT, {**params, "sampling_seed": None}) for _ in range(2)]
    assert draws[0][0].output_ids != draws[1][0].output_ids


# --- ends -----------------------------------------------------------------------------------------------------------


async def test_eos_ends_and_is_kept(client: EngineClient) -> None:
    """Goal: EOS is the last id, with its log-prob, so that stopping is trained, and it is not in the text; at the last
    place allowed it is a stop too. Red with the EOS cut off, and (embedded) with the length decided first."""
    params = {"max_new_tokens": 60, "temperature": 2.0, "sampling_seed": 3}
    rows = await client.generate(PROMPT, params, n=32)
    stopped = [row for row in rows if row.finish_reason == "stop"]
    assert len(stopped) > 16
    for row in stopped:
        assert row.output_ids[-1] == EOS and EOS not in row.output_ids[:-1]
        assert row.finish_detail["matched"] == EOS
        assert row.logprobs is not None and len(row.logprobs) == len(row.output_ids)
        assert row.text is None or "<eos>" not in row.text
    at = next(
        index
        for index, row in enumerate(rows)
        if row.finish_reason == "stop" and len(row.output_ids) > 2
    )
    last = await client.generate(
        PROMPT, {**params, "max_new_tokens": len(rows[at].output_ids)}, n=32
    )
    assert last[at].output_ids == rows[at].output_ids and last[at].finish_reason == "stop"
    assert any(row.finish_reason == "length" and row.output_ids[-1] != EOS for row in last)


async def test_own_stop_tokens(client: EngineClient) -> None:
    """Goal: stop_token_ids end a row and are kept. Red without them in the request."""
    params = {"max_new_tokens": 100, "temperature": 2.0, "stop_token_ids": [10, 11]}
    for row in await client.generate(PROMPT, params, n=16):
        ends = {10, 11, EOS}
        assert row.finish_reason == "stop" and row.output_ids[-1] in ends
        assert row.finish_detail["matched"] == row.output_ids[-1]
        assert not ends & set(row.output_ids[:-1])


async def test_text_is_what_the_ids_decode_to(client: EngineClient) -> None:
    """Goal: text, where a server gives any, is of these tokens, special ones left out."""
    (row,) = await client.generate(
        [2, 3, 4], {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    )
    assert row.text is None or row.text == make_tokenizer().decode(
        row.output_ids, skip_special_tokens=True
    )


async def test_limits(client: EngineClient, served: Running) -> None:
    """Goal: prompt and answer fill the context, less what the server spares; more is refused with the number.
    Red with the check left out: SGLang and vLLM then answer with less than was asked for."""
    room = CONTEXT - served.facts.context_spare
    (row,) = await client.generate([2] * 2000, {"max_new_tokens": room - 2000, "ignore_eos": True})
    assert (len(row.output_ids), row.finish_reason) == (room - 2000, "length")
    for prompt, new in (([2] * 2000, room - 1999), ([2] * (CONTEXT + 1), 1)):
        with pytest.raises(RequestError, match=str(room)):
            await client.generate(prompt, {"max_new_tokens": new, "ignore_eos": True})


# --- refusals -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[int], dict[str, Any], str]] = {
    "empty prompt": ([], {}, "empty"),
    "id over the vocabulary": ([2, 5000], {}, "5000"),
    "negative id": ([-1], {}, "-1"),
    "ids that are no integers": (["a"], {}, "integers"),  # type: ignore[list-item]
    "unknown name": ([2], {"temprature": 1}, "temprature"),
    "negative temperature": ([2], {"temperature": -1}, "temperature"),
    "temperature as text": ([2], {"temperature": "hot"}, "temperature"),
    "top_p of 0": ([2], {"top_p": 0}, "top_p"),
    "top_k of 0": ([2], {"top_k": 0}, "top_k"),
    "min_p of 2": ([2], {"min_p": 2}, "min_p"),
    "no new tokens": ([2], {"max_new_tokens": 0}, "max_new_tokens"),
    "seed below 0": ([2], {"sampling_seed": -1}, "sampling_seed"),
    "stop ids as text": ([2], {"stop_token_ids": ["x"]}, "stop_token_ids"),
    "stop ids beside ignore_eos": (
        [2],
        {"stop_token_ids": [3], "ignore_eos": True},
        "stop_token_ids",
    ),
}


async def test_bad_requests_are_refused_and_the_server_lives(client: EngineClient) -> None:
    """Goal: each mistake is an error that names it, with any server, and none hurts the server. Red with the checks
    left out: an empty prompt, or an id outside the vocabulary, ends SGLang."""
    for name, (prompt, params, word) in BAD.items():
        with pytest.raises(RequestError, match=word):
            await client.generate(prompt, params)
        with pytest.raises(RequestError, match=word):
            await client.generate_batch([PROMPT, prompt], [SHORT, params])
        assert name
    with pytest.raises(RequestError, match="n=0"):
        await client.generate(PROMPT, SHORT, n=0)
    (row,) = await client.generate(PROMPT, SHORT)
    assert len(row.output_ids) == 12


# --- abort, pause, flush --------------------------------------------------------------------------------------------


async def test_abort_by_rid_brings_the_partial_tokens(client: EngineClient, models: Any) -> None:
    """Goal: all rows of the aborted request answer with what they have; another request runs on. Red with n rows under
    one name on SGLang, which then finds none of them."""
    others: list[Generation] = []

    async def other() -> None:
        others.extend(await client.generate([9], LONG))

    async with anyio.create_task_group() as group:
        group.start_soon(other)
        rows = await run_beside(client, ENDLESS, lambda: client.abort("mine"), n=2, rid="mine")
    for row in rows:
        assert row.finish_reason == "abort" and 0 < len(row.output_ids) < ENDLESS["max_new_tokens"]
        assert row.logprobs == close(logprobs_of(models["old"], PROMPT, row.output_ids, 1.0))
    assert [row.finish_reason for row in others] == ["length"]


async def test_abort_all(client: EngineClient) -> None:
    """Goal: without a rid everything ends. Red with nothing sent."""
    (row,) = await run_beside(client, ENDLESS, client.abort)
    assert row.finish_reason == "abort" and row.output_ids


async def test_pause_abort_ends_what_runs_and_holds_what_comes(client: EngineClient) -> None:
    """Goal: mode abort brings partial tokens; a later request waits for resume. Red with no pause after the abort."""
    (row,) = await run_beside(client, ENDLESS, lambda: client.pause("abort"))
    assert row.finish_reason == "abort" and row.output_ids
    held: list[Generation] = []

    async def late() -> None:
        held.extend(await client.generate(PROMPT, SHORT))

    async with anyio.create_task_group() as group:
        group.start_soon(late)
        await anyio.sleep(0.5)
        assert not held
        await client.resume()
    assert [len(row.output_ids) for row in held] == [12]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_a_pause_changes_no_token(client: EngineClient, served: Running, mode: Any) -> None:
    """Goal: what is paused goes on as if nothing had been; `retract` lets go of the cache, `in_place` holds it.
    Red with mode abort."""
    params = {**LONG, "sampling_seed": 21}
    (undisturbed,) = await client.generate(PROMPT, params)

    async def disturb() -> None:
        await client.pause(mode)
        if mode == "retract" or served.facts.frozen_flush:
            await client.flush_cache()
        else:
            with pytest.raises(EngineError, match="flush"):
                await client.flush_cache()
        await client.resume()

    (row,) = await run_beside(client, params, disturb)
    assert row.finish_reason == "length"
    assert row.output_ids == undisturbed.output_ids
    assert row.logprobs == close(undisturbed.logprobs or [])


async def refuses_to_flush(client: EngineClient) -> bool:
    try:
        await client.flush_cache()
    except EngineError as error:
        assert "flush" in str(error)
        return True
    return False


async def test_flush_refuses_while_requests_run(client: EngineClient, served: Running) -> None:
    """Goal: a flush is done or refused, never pretended; a prompt is cold after it. vLLM answers 200 with
    success false. Red with nothing sent. SGLang counts a request for a moment after its answer, and refuses."""

    async def flush() -> None:
        with pytest.raises(EngineError, match="flush"):
            await client.flush_cache()
        await client.abort()  # it would run for a minute

    await run_beside(client, ENDLESS, flush)
    prompt = list(range(2, 32)) * 10
    await client.generate(prompt, SHORT)
    (warm,) = await client.generate(prompt, SHORT)
    assert (warm.cached_tokens > 0) == served.facts.prefix_cache
    with anyio.fail_after(200):
        while await refuses_to_flush(client):
            await anyio.sleep(0.05)
    (cold,) = await client.generate(prompt, SHORT)
    assert cold.cached_tokens == 0


# --- weights --------------------------------------------------------------------------------------------------------


async def test_new_weights_are_sampled_from(
    client: EngineClient, served: Running, models: Any
) -> None:
    """Goal: after a sync log-probs are the new checkpoint's, the cached prompt's too (NeMo-RL#4018), under the new
    version. Red with the version bumped and nothing loaded, and on SGLang with the cache not flushed."""
    await client.generate(PROMPT, SHORT)
    (answer,) = await sync_weights_to_engines([client], str(served.new), "7")
    assert answer["success"] is True and answer["weight_version"] == "7"
    info = await client.model_info()
    assert (info["weight_version"], info["model_path"]) == ("7", str(served.new))
    (row,) = await client.generate(PROMPT, {"max_new_tokens": 30, "ignore_eos": True})
    assert row.weight_version == "7"
    assert row.weight_versions == [{"version": "7", "start": 0, "end": 30}]
    assert row.logprobs == close(logprobs_of(models["new"], PROMPT, row.output_ids, 1.0))
    assert row.logprobs != pytest.approx(
        logprobs_of(models["old"], PROMPT, row.output_ids, 1.0), abs=0.01
    )


async def test_a_sync_in_the_middle_of_a_request(
    client: EngineClient, served: Running, models: Any
) -> None:
    """Goal: what was in flight goes on under the new weights, with what is left of its tokens (slime#2260); each knows
    its version and has that version's log-prob. Red with the cache of the old weights kept."""
    versions: list[str] = []

    async def sync() -> None:
        answer = await client.update_weights_from_checkpoint(str(served.new))
        versions.append(answer["weight_version"])

    (row,) = await run_beside(client, LONG, sync)
    before, after = row.weight_versions
    assert (
        after["version"] == versions[0] == row.weight_version
        and before["version"] != after["version"]
    )
    assert 0 == before["start"] < before["end"] == after["start"] < after["end"] == LONG_TOKENS
    ids, split = row.output_ids, before["end"]
    old, new = (logprobs_of(models[name], PROMPT, ids, 1.0) for name in ("old", "new"))
    assert row.logprobs == close(old[:split] + new[split:])


async def test_the_prompts_own_logprobs(client: EngineClient, models: Any) -> None:
    """Goal: what a sync's proof asks for: log-probs of given tokens at T = 1, nothing sampled. Red shifted by one."""
    found = await client.input_logprobs(PROMPT)
    assert found == close(logprobs_of(models["old"], PROMPT[:1], PROMPT[1:], 1.0))


async def test_weights_that_cannot_be_read(
    client: EngineClient, served: Running, models: Any
) -> None:
    """Goal: a damaged file is told with its name and the engine's; the old weights serve on, unpaused. Red with the
    server sent there: SGLang ends."""
    before = (await client.model_info())["weight_version"]
    with pytest.raises(
        WeightSyncError, match=f"model.safetensors cannot be loaded.*{served.url}"
    ) as caught:
        await client.update_weights_from_checkpoint(str(served.broken))
    assert repr(before) in str(caught.value)
    assert (await client.model_info())["weight_version"] == before
    (row,) = await client.generate(PROMPT, SHORT)
    assert row.logprobs == close(logprobs_of(models["old"], PROMPT, row.output_ids, 1.0))


# --- load -----------------------------------------------------------------------------------------------------------


async def test_five_hundred_requests_at_once(client: EngineClient, models: Any) -> None:
    """Goal: far more connections than rows decoded at once, and each has its own answer. Red with each given the
    answer before."""
    found: dict[int, Generation] = {}

    def prompt_of(index: int) -> list[int]:
        return [2 + index % 25] * (1 + index % 9)

    async def ask(index: int) -> None:
        (found[index],) = await client.generate(
            prompt_of(index), {"max_new_tokens": 1 + index % 4, "ignore_eos": True}
        )

    async with anyio.create_task_group() as group:
        for index in range(500):
            group.start_soon(ask, index)
    for index in range(500):
        row = found[index]
        assert len(row.output_ids) == 1 + index % 4
        assert row.logprobs == close(
            logprobs_of(models["old"], prompt_of(index), row.output_ids, 1.0)
        )


async def test_a_client_that_goes_away_frees_its_rows(client: EngineClient) -> None:
    """Goal: nobody decodes for a closed connection: minutes of work are gone in seconds. Red on SGLang with the request
    not cancelled: the flush is then refused for as long as it runs."""
    with anyio.move_on_after(2):
        await client.generate_batch([PROMPT] * 20, ENDLESS, n=24)
    with anyio.fail_after(100):
        while True:
            try:
                await client.flush_cache()
                return
            except EngineError:
                await anyio.sleep(0.2)


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_under_trio(client: EngineClient, served: Running) -> None:
    """Goal: the client's calls need no asyncio."""
    (row,) = await run_beside(client, ENDLESS, client.abort)
    assert row.finish_reason == "abort"
    await client.update_weights_from_checkpoint(str(served.new), "trio")
    assert (await client.generate_batch([PROMPT], SHORT))[0][0].weight_version == "trio"
