"""How long the way is from the RL loop to an engine's request, in functions of ours."""

import asyncio
import itertools
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import anyio
import httpx
import pytest

import rollouts
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops import run_rl_training
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.types import RLTrainingConfig, RolloutConfig
from rollouts.training.weight_sync import SGLangEngine
from tests.engines.serving import serving
from tests.training.loops.test_async_rl import make_backend
from tests.training.tiny_task import tiny_model, tiny_tokenizer

FRAMES_MAX = 12
OURS = str(Path(rollouts.__file__).parent)


@pytest.fixture(scope="module")
def engine_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("model")
    tiny_model(seed=1).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    with serving(path) as url:
        yield url


def running_here() -> list[CodeType]:
    """Code of the functions that are running, outermost first: of the current task, from its entry function on."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        found.append(frame.f_code)
        frame = frame.f_back
    return found[::-1]


def waiting_in(task: asyncio.Task[Any]) -> list[CodeType]:
    """Code of the coroutines that a task is suspended in, outermost first: each awaits the next."""
    found, waiting = [], task.get_coro()
    while isinstance(waiting, Coroutine) and getattr(waiting, "cr_code", None) is not None:
        found.append(waiting.cr_code)
        waiting = waiting.cr_await
    return found


@pytest.mark.parametrize("lag", [0, 1])
def test_frames_from_the_loop_to_the_request(
    engine_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """Goal: a reader follows a sample's request from `run_rl` to the wire through at most 12 functions of ours.

    Counted inside the HTTP transport of a real request: the distinct functions whose file lies in rollouts/, which the
    requesting task runs (its entry function and the coroutines that await each other), and those in which the tasks
    wait that started it: the loop's, and where generation runs ahead the producer's. Functions above `run_rl` are left
    out. Red as it was before there was one pool: 20 of them.
    """
    ways: list[list[CodeType]] = []
    send = httpx.AsyncHTTPTransport.handle_async_request

    async def recorded(
        transport: httpx.AsyncHTTPTransport, request: httpx.Request
    ) -> httpx.Response:
        here = running_here()
        if request.url.path == "/generate" and any(code.co_name == "generate_fn" for code in here):
            others = asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]
            waiting = sorted(
                map(waiting_in, others),
                key=lambda codes: "main" not in [one.co_name for one in codes],
            )
            codes = [*itertools.chain.from_iterable(waiting), *here]  # the loop's task first
            ways.append(
                list(dict.fromkeys(code for code in codes if code.co_filename.startswith(OURS)))
            )
        return await send(transport, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", recorded)

    async def main() -> None:
        engine = SGLangEngine(engine_url)
        generate_fn = make_generate_fn(
            [engine], tiny_tokenizer(), max_new_tokens=3, temperature=1.0
        )
        config = RolloutConfig(
            batch_size=1,
            n_samples_per_prompt=2,
            generate_fn=generate_fn,
            reward_fn=lambda sample: len(sample.response),
        )
        manager = AsyncRolloutManager(DataBuffer(["ab", "cd"], seed=0), config)
        steps = RLTrainingConfig(num_steps=1, policy_lag_steps_max=lag)
        await run_rl_training(make_backend(tmp_path), manager.buffer, manager, [engine], steps)

    anyio.run(main)
    assert ways
    for way in ways:
        names = [code.co_qualname for code in way]
        loop = max(at for at, name in enumerate(names) if name.startswith("run_rl"))
        assert len(way[loop:]) <= FRAMES_MAX, "\n".join(
            f"{code.co_filename}: {code.co_qualname}" for code in way[loop:]
        )
