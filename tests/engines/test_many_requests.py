"""Many small requests at once, as agents send them: what each costs, what limits them, and how they share an engine."""

import os
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import anyio
import pytest

from rollouts.training.inference.http import Generation
from rollouts.training.inference.sglang_client import SGLangEngine
from rollouts.training.rollout_gen.concurrency import gather_in_order
from tests.engines.scripted import Scripted
from tests.engines.serving import LONG, PROMPT, REPOSITORY, Engine

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[SGLangEngine]:
    async with SGLangEngine(engine.url) as made:
        yield made


def requests(count: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of several lengths, with answers of several lengths."""
    return [
        (
            [2 + index % 25] * (1 + index % 7),
            {"temperature": 1.0, "max_new_tokens": 1 + index % 9, "sampling_seed": index},
        )
        for index in range(count)
    ]


def told(generations: Sequence[Generation]) -> list[Any]:
    return [(one.output_ids, one.logprobs, one.finish_reason) for one in generations]


async def singly(
    client: SGLangEngine, asked: Sequence[tuple[list[int], dict[str, Any]]]
) -> list[Generation]:
    return [
        group[0]
        for group in await gather_in_order(
            [partial(client.generate, *request) for request in asked]
        )
    ]


async def test_single_requests_are_answered_as_one_batch_is(client: SGLangEngine) -> None:
    """Goal: how prompts are sent changes no token and no log-prob, to the bit, whatever lengths stand side by side.
    Red with too little company for a row that is scored alone (_COMPANY = 2)."""
    asked = requests(200)
    together = [
        g
        for (g,) in await client.generate_batch(
            [prompt for prompt, _ in asked], [item for _, item in asked]
        )
    ]
    assert told(await singly(client, asked)) == told(together)
    assert {len(one.output_ids) for one in together} == set(range(1, 10))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_a_request_costs_does_not_depend_on_how_many_run(client: SGLangEngine) -> None:
    """Goal: the client's work for a request, counted in Python calls, is the same beside 200 others as beside 20.
    Red with one pool of httpx for all: eight times as many calls, and 4 s for what takes 0.3 s."""

    async def calls(count: int) -> float:
        asked, made = requests(count), 0

        def counting(frame: Any, event: str, argument: Any) -> None:
            nonlocal made
            made += event == "call"

        await singly(client, asked)  # connects
        sys.setprofile(counting)
        try:
            await singly(client, asked)
        finally:
            sys.setprofile(None)
        return made / count

    few, many = await calls(20), await calls(200)
    assert many < 1.5 * few, f"{few:.0f} calls a request beside 20, {many:.0f} beside 200"


async def test_connections_are_kept() -> None:
    """Goal: the next round of requests goes over the connections of the last; a client that was closed opens new ones.
    Red with 64 of them kept alive at most: each round then opened the others again."""
    with Scripted({"/generate": (200, "[]")}, together=100) as server:
        client = SGLangEngine(server.url)
        calls = [partial(client.request, "POST", "/generate", {})] * 100
        for _ in range(3):
            await gather_in_order(calls)
            assert server.connections == 100
        await client.aclose()
        assert await gather_in_order(calls) == [[]] * 100
        assert server.connections == 200
        await client.aclose()


async def test_one_cancelled_request_frees_its_rows_and_troubles_no_other(
    client: SGLangEngine,
) -> None:
    """Goal: of many, one is given up: its row goes, the others end as if it had never been, and the client goes on.
    Red without the server's abort of a request whose client went away."""
    asked = requests(40)
    expected = told(await singly(client, asked))
    for _ in range(3):
        async with anyio.create_task_group() as group:
            group.start_soon(partial(client.generate, PROMPT, LONG))
            await running(client, 1)
            assert told(await singly(client, asked)) == expected
            await client.pause("in_place")  # from here on it can only end by an abort
            group.cancel_scope.cancel()
        await running(client, 0)
        await client.resume()
    assert told(await singly(client, asked)) == expected


async def test_short_requests_do_not_wait_for_a_long_one(client: SGLangEngine) -> None:
    """Goal: who is done is answered, while a request that takes a hundred times as long runs on. Red with all requests
    of a moment sent as one batch."""
    done: list[str] = []

    async def ask(name: str, prompt: list[int], params: dict[str, Any]) -> None:
        await client.generate(prompt, params)
        done.append(name)

    async with anyio.create_task_group() as group:
        group.start_soon(ask, "long", PROMPT, LONG)
        for index, request in enumerate(requests(60)):
            group.start_soon(ask, f"short {index}", *request)
    assert len(done) == 61 and done[-1] == "long"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_thousand_single_requests(client: SGLangEngine) -> None:
    """Goal: far more than the engine runs at once: each gets its own answer, and nothing is left."""
    asked = requests(1000)
    found = await singly(client, asked)
    for one, (_, item) in zip(found, asked, strict=True):
        assert len(one.output_ids) == item["max_new_tokens"] or one.finish_reason == "stop"
    assert told(found[500:510]) == told(await singly(client, asked[500:510]))
    await running(client, 0)


FEW_FILES = """
import resource, sys
import anyio
from rollouts.training.inference.sglang_client import SGLangEngine

resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))

async def main():
    answered = []
    async def ask(index):
        params = {"max_new_tokens": 2, "sampling_seed": index, "ignore_eos": True}
        [one] = await client.generate([2 + index % 25], params)
        answered.append(len(one.output_ids))
    async with SGLangEngine(sys.argv[1]) as client:
        await client.pause("in_place")
        async with anyio.create_task_group() as group:
            for index in range(300):
                group.start_soon(ask, index)
            await anyio.sleep(0.5)
            before = await client.model_info(), await client.input_logprobs([2, 3, 4]), len(answered)
            await client.resume()
    print(before[2], answered == [2] * 300)

anyio.run(main)
"""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_few_open_files_are_enough(engine: Engine, anyio_backend: str) -> None:
    """Goal: 300 requests from a process that may open 80 files: they wait in line, and what controls the engine does
    not stand behind them. Red without the line: connections fail."""
    argv = [sys.executable, "-c", FEW_FILES, engine.url]
    process = await anyio.run_process(argv, cwd=REPOSITORY, env={**os.environ}, check=False)
    assert process.stdout.decode() == "0 True\n", process.stderr.decode()


async def running(client: SGLangEngine, rows: int) -> None:
    """Return once so many rows run."""
    with anyio.fail_after(200):
        while (await client.request("GET", "/server_info"))["internal_states"][0][
            "running"
        ] != rows:
            await anyio.sleep(0.01)
