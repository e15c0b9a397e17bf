"""The clients before and around their requests: which servers they take, what they send, and what they do not."""

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.training.inference.client import read_vocab_size
from rollouts.training.inference.connect import engine_client
from rollouts.training.inference.inference_engine import ServerKind
from rollouts.training.inference.known_versions import KNOWN_VERSIONS
from rollouts.training.inference.requests import param_problems, prompt_problems, row_seed
from rollouts.training.inference.vllm_client import vllm_params
from rollouts.training.inference.weights_on_disk import damage
from rollouts.training.weight_sync import EngineError
from tests.engines.scripted import Scripted
from tests.engines.serving import make_model

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("kind", "route", "answer"),
    [
        ("sglang", "/server_info", '{"version": "9.9.9", "model_path": "/m"}'),
        ("sglang", "/server_info", '{"model_path": "/m"}'),
        ("embedded", "/server_info", '{"engine": "embedded", "version": "0"}'),
        ("vllm", "/version", '{"version": "9.9.9+cpu"}'),
    ],
)
async def test_a_version_nobody_tested_is_refused(
    kind: ServerKind, route: str, answer: str
) -> None:
    """Goal: before anything is sampled, with what was found, what is known, the fix. Red with all versions taken."""
    with Scripted({route: (200, answer)}) as server:
        async with engine_client(kind, server.url) as client:
            with pytest.raises(EngineError, match="is not a version this client knows") as caught:
                await client.generate([2], {"max_new_tokens": 1})
    message = str(caught.value)
    assert (
        server.url in message
        and ", ".join(KNOWN_VERSIONS[kind]) in message
        and "KNOWN_VERSIONS" in message
    )
    assert server.calls == [route]


@pytest.mark.parametrize("seeds", [True, False])
async def test_a_known_version_is_asked_once(seeds: bool, tmp_path: Path) -> None:
    """Goal: kind, version, whether seeds count, and the vocabulary of a model on this machine, in one request."""
    model = make_model("llama", tmp_path / "model", seed=0)
    info = {"version": "0.5.21", "context_length": 64, "enable_deterministic_inference": seeds}
    answer = json.dumps({**info, "model_path": str(model)})
    with Scripted({"/server_info": (200, answer)}) as server:
        async with engine_client("sglang", server.url) as client:
            async with anyio.create_task_group() as group:
                for _ in range(9):
                    group.start_soon(client.server)
            found = await client.server()
    assert (found.kind, found.version, found.seeds, found.vocab_size) == (
        "sglang",
        "0.5.21",
        seeds,
        32,
    )
    assert found.tokens_max == 62
    assert server.calls == ["/server_info"]


async def test_the_vocabulary_of_a_model_elsewhere_is_not_known(tmp_path: Path) -> None:
    """Goal: a hub name, or a server on another machine, is no error: ids are then checked from below alone."""
    assert await read_vocab_size("Qwen/Qwen2.5-0.5B") is None
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 7}}')
    assert await read_vocab_size(str(tmp_path)) == 7
    assert prompt_problems([[10**6]], None) == [] and "-1" in prompt_problems([[3, -1]], None)[0]


def test_row_seeds() -> None:
    """Goal: row 0 draws with the group's seed, all others apart from it and from each other, the same in every run.
    Neighbouring groups would share streams with seed + row."""
    seeds = [row_seed(seed, row) for seed in range(50) for row in range(16)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(11, 0) == 11 and row_seed(11, 1) == row_seed(11, 1) == 2883046802652001663
    assert row_seed(None, 0) != row_seed(None, 0)


def test_every_problem_of_a_request_is_named() -> None:
    """Goal: all at once, not one after another; what is left out, or None, is fine."""
    assert param_problems({}, 1) == param_problems({"sampling_seed": None, "top_k": -1}, 1) == []
    found = param_problems(
        {"temperature": float("nan"), "top_p": 2, "max_new_tokens": True, "n": 3}, 0
    )
    assert [problem.split(":")[0].split("=")[0] for problem in found] == [
        *("n", "n", "temperature", "top_p", "max_new_tokens")
    ]


def test_what_vllm_is_told() -> None:
    """Goal: nothing is left for the model's generation_config to decide: Qwen's has a top_k and a penalty."""
    given: dict[str, Any] = {
        "temperature": 0.7,
        "max_new_tokens": 5,
        "stop_token_ids": [3],
        "sampling_seed": 9,
    }
    told = vllm_params(given, 0, True)
    assert told == {
        "n": 1,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 5,
        "seed": 9,
        "stop_token_ids": [3],
        "ignore_eos": False,
        "skip_special_tokens": True,
        "logprobs": 0,
    }
    assert vllm_params({}, 1, False)["max_tokens"] == 128


def test_damaged_weights_are_found(tmp_path: Path) -> None:
    """Goal: a file cut short, and one that an index names and that is not there, each by its name."""
    model = make_model("llama", tmp_path / "model", seed=0)
    assert damage(model) is None and damage(tmp_path / "elsewhere") is None
    index = model / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    assert "model-00002-of-00002.safetensors cannot be loaded" in (damage(model) or "")
    index.unlink()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} cannot be loaded" in (damage(model) or "")
