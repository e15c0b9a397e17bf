"""The engine client and the weight sync, against real servers, under asyncio and trio."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollouts.training.weight_sync import (
    EngineError,
    SGLangEngine,
    VLLMEngine,
    WeightSyncError,
    sync_weights_to_engines,
)
from tests.engines.scripted import Scripted
from tests.engines.serving import logprobs_of, make_model, serving
from tests.ports import free_port

pytestmark = pytest.mark.anyio
PROMPT = [2, 3, 4, 5]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    paths = {
        name: make_model("llama", root / name, seed=seed)
        for seed, name in enumerate(("old", "new"))
    }
    paths["broken"] = make_model("llama", root / "broken", seed=2)
    file = paths["broken"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return paths


@pytest.fixture(scope="module")
def urls(checkpoints: dict[str, Path]) -> Iterator[list[str]]:
    """Two engines of their own."""
    with serving(checkpoints["old"]) as first, serving(checkpoints["old"]) as second:
        yield [first, second]


def state(url: str) -> dict[str, Any]:
    return httpx.get(url + "/server_info", verify=False, timeout=60).json()["internal_states"][0]  # type: ignore[no-any-return]


async def test_generate_gives_typed_results(urls: list[str], checkpoints: dict[str, Path]) -> None:
    """Goal: ids, log-probs, reason, version and text of a row stay together. Red with rows of a batch cut by prompt
    count instead of n.
    """
    async with SGLangEngine(urls[0]) as engine:
        params = {"temperature": 0.8, "max_new_tokens": 9, "sampling_seed": 1, "ignore_eos": True}
        rows = await engine.generate(PROMPT, params, n=3)
        batch = await engine.generate_batch(
            [[9], PROMPT], [{**params, "sampling_seed": 7}, params], n=3
        )
        silent = await engine.generate(PROMPT, params, return_logprob=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoints["old"], dtype=torch.float32).eval()
    assert [row.output_ids for row in batch[1]] == [row.output_ids for row in rows]
    assert [len(group) for group in batch] == [3, 3]
    for row in rows:
        expected = logprobs_of(model, PROMPT, row.output_ids, 0.8)
        assert row.logprobs == pytest.approx(expected, abs=1e-5)
        assert (row.finish_reason, len(row.output_ids), row.prompt_tokens) == ("length", 9, 4)
        assert row.text is not None and row.weight_versions[0]["end"] == 9
    assert silent[0].logprobs is None and silent[0].output_ids == rows[0].output_ids


async def test_errors_carry_the_servers_words(urls: list[str]) -> None:
    """Goal: a refusal tells URL, route and reason. Red with only the status in the message."""
    engine = SGLangEngine(urls[0])
    with pytest.raises(EngineError, match=r"/generate: 400: .*maximum context length"):
        await engine.generate([9] * 3000, {})
    await engine.aclose()


async def test_an_engine_that_is_down() -> None:
    """Goal: health is False, waiting ends in time with what was last seen, calls name the URL."""
    url = f"http://127.0.0.1:{free_port()}"
    async with SGLangEngine(url) as engine:
        assert await engine.health() is False
        with pytest.raises(EngineError, match=r"not ready after 0.3 s; last seen: .*ConnectError"):
            await engine.wait_ready(0.3)
        with pytest.raises(EngineError, match=url):
            await engine.generate(PROMPT, {})


async def test_an_engine_that_never_answers() -> None:
    """Goal: timeout_s bounds a call, and the error says so. Red with httpx's timeouts off (the test then hangs)."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with SGLangEngine(
            f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3
        ) as engine:
            with pytest.raises(EngineError, match=r"no whole answer within 0\.3 s"):
                await engine.model_info()


def test_one_client_over_many_event_loops(urls: list[str], anyio_backend_name: str) -> None:
    """Goal: a client made once serves loops that come and go, as `anyio.run` per step makes them. Red with the httpx
    client kept over loops ("Event loop is closed").
    """
    engine = SGLangEngine(urls[0])
    for _ in range(3):
        answers = anyio.run(
            engine.generate, PROMPT, {"max_new_tokens": 1}, backend=anyio_backend_name
        )
        assert len(answers) == 1


async def test_pause_resume_abort(urls: list[str]) -> None:
    """Goal: a paused engine holds requests until resume; abort ends one with its partial tokens."""
    async with SGLangEngine(urls[0]) as engine, anyio.create_task_group() as group:
        done: list[str] = []

        async def ask(rid: str) -> None:
            rows = await engine.generate(
                PROMPT, {"max_new_tokens": 2000, "ignore_eos": True}, rid=rid
            )
            done.append(rows[0].finish_reason)

        group.start_soon(ask, f"mine-{anyio.get_current_task().id}")
        with anyio.fail_after(200):
            while state(urls[0])["running"] == 0:
                await anyio.sleep(0.01)
            await engine.pause("retract")
            assert state(urls[0])["waiting"] == 1 and not done
            await engine.flush_cache()
            await engine.resume()
            await engine.abort()
    assert done == ["abort"]


async def test_a_sync_is_proven(urls: list[str], checkpoints: dict[str, Path]) -> None:
    """Goal: after the sync both engines sample from the new checkpoint, under the version asked for, unpaused.

    Red with `load_weights` copying nothing (log-probs), and with the version left out of the update (the proof).
    """
    engines = [SGLangEngine(url) for url in urls]
    await sync_weights_to_engines(engines, str(checkpoints["old"]))
    answers = await sync_weights_to_engines(
        engines, str(checkpoints["new"]), f"step-{anyio.get_current_task().id}"
    )
    assert [answer["success"] for answer in answers] == [True, True]
    new = AutoModelForCausalLM.from_pretrained(checkpoints["new"], dtype=torch.float32).eval()
    for engine, answer in zip(engines, answers, strict=True):
        (row,) = await engine.generate(PROMPT, {"max_new_tokens": 12})
        assert (
            row.weight_version == answer["weight_version"] == f"step-{anyio.get_current_task().id}"
        )
        assert row.logprobs == pytest.approx(
            logprobs_of(new, PROMPT, row.output_ids, 1.0), abs=1e-5
        )
        await engine.aclose()


async def test_without_a_version_each_sync_makes_a_new_one(
    urls: list[str], checkpoints: dict[str, Path]
) -> None:
    """Goal: the proof means something for a directory that is overwritten in place. Red with the bare name."""
    async with SGLangEngine(urls[0]) as engine:
        first = await engine.update_weights_from_checkpoint(str(checkpoints["new"]))
        second = await engine.update_weights_from_checkpoint(str(checkpoints["new"]))
    assert (
        first["weight_version"].startswith("new-")
        and first["weight_version"] != second["weight_version"]
    )


async def test_a_failed_load_is_loud_and_the_old_weights_serve_on(
    urls: list[str], checkpoints: dict[str, Path]
) -> None:
    """Goal: WeightSyncError names the engine and the reason; the engine still serves what it had. Red with the answer's
    success not looked at, and with the engine left paused.
    """
    engines = [SGLangEngine(url) for url in urls]
    await sync_weights_to_engines(engines, str(checkpoints["old"]), "before")
    with pytest.raises(WeightSyncError, match="2 of 2 engines") as caught:
        await sync_weights_to_engines(engines, str(checkpoints["broken"]), "after")
    for url in urls:
        assert url in str(caught.value)
    assert "serves on with version 'before'" in str(caught.value) and "cannot be loaded" in str(
        caught.value
    )
    old = AutoModelForCausalLM.from_pretrained(checkpoints["old"], dtype=torch.float32).eval()
    (row,) = await engines[0].generate(PROMPT, {"max_new_tokens": 12})
    assert row.weight_version == "before"
    assert row.logprobs == pytest.approx(logprobs_of(old, PROMPT, row.output_ids, 1.0), abs=1e-5)
    for engine in engines:
        await engine.aclose()


async def test_one_bad_engine_is_named_and_the_others_are_waited_for(
    urls: list[str], checkpoints: dict[str, Path]
) -> None:
    """Goal: with one engine down, the error names that one, and the other has finished its sync. Red with the task
    group cancelling the rest at the first failure.
    """
    down = f"http://127.0.0.1:{free_port()}"
    async with SGLangEngine(urls[0]) as good, SGLangEngine(down) as bad:
        with pytest.raises(WeightSyncError, match="1 of 2 engines") as caught:
            await sync_weights_to_engines([bad, good], str(checkpoints["new"]), "survivor")
        assert down in str(caught.value) and urls[0] not in str(caught.value)
        assert (await good.model_info())["weight_version"] == "survivor"


class Duck:
    """An engine as a user writes one: no base class, no version."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.paths: list[str] = []

    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> Any:
        self.paths.append(checkpoint_path)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def __repr__(self) -> str:
        return "Duck"


async def test_duck_typed_engines() -> None:
    """Goal: the one-method contract is enough, version or not. Red with weight_version always passed."""
    duck = Duck({"success": True, "took": 1})
    assert await sync_weights_to_engines([duck], "/a") == [{"success": True, "took": 1}]
    assert await sync_weights_to_engines([duck], "/b", "v1") == [{"success": True, "took": 1}]
    assert duck.paths == ["/a", "/b"]
    assert await sync_weights_to_engines([], "/a") == []


@pytest.mark.parametrize(
    "answer", [{"success": False, "message": "no"}, {}, None, RuntimeError("boom")]
)
async def test_anything_but_success_raises(answer: Any) -> None:
    """Goal: failure reported as success trains on stale weights. Red with `if answer` in place of `is True`."""
    with pytest.raises(WeightSyncError, match="Duck"):
        await sync_weights_to_engines([Duck({"success": True}), Duck(answer)], "/a")


# --- servers that misbehave: what no healthy engine does, so played by a small HTTP server ----------------------------


SGLANG_CYCLE = [
    "/pause_generation",
    "/update_weights_from_disk",
    "/flush_cache",
    "/model_info",
    "/continue_generation",
]


async def test_the_cycle_in_order() -> None:
    """Goal: pause, update, flush, proof, continue: five requests, in this order. Red with any two swapped."""
    with Scripted({"/model_info": (200, '{"weight_version": "v1"}')}) as server:
        async with SGLangEngine(server.url) as engine:
            await engine.update_weights_from_checkpoint("/a", "v1")
    assert server.calls == SGLANG_CYCLE


@pytest.mark.parametrize(
    ("answers", "word", "calls"),
    [
        ({"/model_info": (200, '{"weight_version": "v0"}')}, "serves version 'v0', needs 'v1'", 4),
        ({"/flush_cache": (400, "Flush refused")}, "Flush refused", 3),
        ({"/pause_generation": (404, "Not Found")}, "failed at pause", 1),
    ],
)
async def test_unproven_weights_are_not_sampled_from(
    answers: dict[str, tuple[int, str]], word: str, calls: int
) -> None:
    """Goal: a stale version or a refused flush raises, the engine stays paused. Red with `resume` in a finally."""
    with Scripted(answers) as server:
        async with SGLangEngine(server.url) as engine:
            with pytest.raises(WeightSyncError, match=word):
                await engine.update_weights_from_checkpoint("/a", "v1")
    assert server.calls == SGLANG_CYCLE[:calls]


VLLM_CYCLE = [
    *("/pause", "/reset_prefix_cache", "/collective_rpc", "/reset_prefix_cache"),
    *("/update_weight_version", "/weight_info", "/resume"),
]


@pytest.mark.parametrize(
    ("answers", "word", "calls"),
    [
        ({}, "", 7),
        ({"/collective_rpc": (500, "no such method")}, "no such method", 3),
        ({"/reset_prefix_cache": (200, '{"success": false}')}, "refused to flush", 2),
        ({"/weight_info": (200, '{"weight_version": "v0"}')}, "serves version 'v0', needs 'v1'", 6),
    ],
)
async def test_vllms_cycle(answers: dict[str, tuple[int, str]], word: str, calls: int) -> None:
    """Goal: pause, reload, flush, name, proof, continue, in this order; whatever fails leaves it paused. That a
    vLLM takes them is the contract's to show."""
    with Scripted({"/weight_info": (200, '{"weight_version": "v1"}'), **answers}) as server:
        async with VLLMEngine(server.url) as engine:
            if word:
                with pytest.raises(WeightSyncError, match=word):
                    await engine.update_weights_from_checkpoint("/a", "v1")
            else:
                assert (await engine.update_weights_from_checkpoint("/a", "v1"))["success"] is True
    assert server.calls == VLLM_CYCLE[:calls]
