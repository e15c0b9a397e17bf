"""A pool that outlives its engines: real embedded servers that are killed, cut off and replaced."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from rollouts.training.inference.http import EngineError, EngineLost
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.recovery import Recovered
from rollouts.training.weight_sync import SGLangEngine, WeightSyncError
from tests.engines.lives import WAIT_S, Server, meanwhile, wait_for
from tests.engines.proxy import Proxy, proxy
from tests.engines.serving import PROMPT, REPOSITORY, make_model

pytestmark = pytest.mark.anyio
ALIKE = {"temperature": 0.9, "max_new_tokens": 12, "sampling_seed": 3, "ignore_eos": True}
# more than the second that a stopped engine has to finish: time to kill its engine
LONG = {**ALIKE, "max_new_tokens": 2000}
both_backends = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model("llama", root / name, seed=seed)
        for seed, name in enumerate(("old", "new"))
    }


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(models["old"], tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


@pytest.fixture
def between(server: Server) -> Iterator[Proxy]:
    server.await_health()
    with proxy(server.url) as made:
        yield made


@pytest.fixture
def recovered() -> list[Recovered]:
    return []


def pool_of(
    *urls: str, recovered: list[Recovered], reruns_max: int = 3, **options: Any
) -> EnginePool:
    clients = [SGLangEngine(url, **options) for url in urls]
    return EnginePool(
        clients, reruns_max=reruns_max, recover_timeout_s=WAIT_S, on_recovered=recovered.append
    )


async def ask(
    pool: EnginePool, params: dict[str, Any] = ALIKE, first: int = 0
) -> list[tuple[list[int], list[float] | None]]:
    groups = await pool.generate_batch([PROMPT, PROMPT[1:]], params, n=2, first=first)
    return [(row.output_ids, row.logprobs) for group in groups for row in group]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@both_backends
@pytest.mark.parametrize("fault", ["reset", "cut", "503", "drip"])
async def test_a_request_that_breaks_is_run_again(
    between: Proxy, recovered: list[Recovered], fault: str
) -> None:
    """Goal: a reset, half an answer, a 5xx and an answer that drips in for ever cost another run, with the same ids and
    log-probs to the bit. Red with reruns_max=0; the drip with httpx's own timeouts, which bound each read alone."""
    # a drip takes minutes; anything else has the time that a busy machine takes
    limit_s = 5.0 if fault == "drip" else WAIT_S
    async with pool_of(between.url, recovered=recovered, timeout_s=limit_s) as pool:
        expected = await ask(pool)
        between.faults.append(fault)
        assert await ask(pool) == expected
    assert between.requests.count("/generate") == 3
    assert len(recovered) == 1 and recovered[0].url == between.url


async def test_a_mistake_of_the_callers_is_not_run_again(
    between: Proxy, recovered: list[Recovered]
) -> None:
    """Goal: a 400 is raised as it comes, after one request. Red with every EngineError run again."""
    async with pool_of(between.url, recovered=recovered) as pool:
        with pytest.raises(EngineError, match=r"400: .*maximum context length"):
            await pool.generate([9] * 3000, {})
    assert between.requests.count("/generate") == 1 and recovered == []


async def test_the_bound(between: Proxy, recovered: list[Recovered]) -> None:
    """Goal: a request that always fails is sent reruns_max + 1 times. Red with one more."""
    async with pool_of(between.url, recovered=recovered, reruns_max=2) as pool:
        between.faults.extend(["503"] * 9)
        with pytest.raises(EngineLost, match="503: sick"):
            await ask(pool)
    assert between.requests.count("/generate") == 3


async def test_killed_under_requests(
    server: Server, models: dict[str, Path], recovered: list[Recovered]
) -> None:
    """Goal: kill -9 under several requests at once: the next life gets the weights that the first had been given, once,
    and gives what the first would have, to the bit. Red without the weights given again, and without the lock."""
    async with pool_of(server.url, recovered=recovered) as pool:
        await pool.update_weights_from_checkpoint(str(models["new"]), weight_version="7")
        expected = await ask(pool, LONG)
        results: list[Any] = [None] * 3

        async def one(index: int) -> None:
            results[index] = await ask(pool, LONG)

        def kill() -> None:
            wait_for(lambda: server.running() == 12)
            server.replace()

        with meanwhile(kill):
            async with anyio.create_task_group() as tasks:
                for index in range(3):
                    tasks.start_soon(one, index)
    assert results == [expected] * 3
    assert [(one.weight_version, "/generate" in one.reason) for one in recovered] == [("7", True)]
    assert server.version() == "7"


async def test_a_restart_that_nobody_saw(
    server: Server, models: dict[str, Path], recovered: list[Recovered]
) -> None:
    """Goal: an engine that died and came back between two requests is known by the version of its answer, which is
    refused. Red with answers of any version taken."""
    async with pool_of(server.url, recovered=recovered) as pool:
        await pool.update_weights_from_checkpoint(str(models["new"]), weight_version="8")
        expected = await ask(pool)
        server.replace()
        server.await_health()
        assert server.version() == "default"
        assert await ask(pool) == expected
    assert "sampled with weights default; was given 8" in recovered[0].reason


async def test_an_engine_that_is_gone_at_the_first_look(
    server: Server, recovered: list[Recovered]
) -> None:
    """Goal: a trainer that asks an engine for its version while that is started again waits for it. Red with the
    client asked: ConnectError."""
    async with pool_of(server.url, recovered=recovered) as pool:
        server.kill()
        with meanwhile(server.start):
            assert (await pool.replicas[0].server()).kind == "embedded"
    assert ["/server_info" in one.reason for one in recovered] == [True]


async def test_an_engine_that_ends_properly(
    server: Server, models: dict[str, Path], recovered: list[Recovered]
) -> None:
    """Goal: SIGTERM, after which an engine answers its requests as aborted, is a death as well; an abort that the
    caller asked for is its own. Red with aborts taken as answers, and with all of them refused."""
    async with pool_of(server.url, recovered=recovered) as pool:
        await pool.update_weights_from_checkpoint(str(models["new"]), weight_version="9")
        expected = await ask(pool, LONG)

        def end() -> None:
            wait_for(lambda: server.running() == 4)
            subprocess.run(["kill", "-TERM", str(server.pid)], check=True)
            server.await_end()
            server.start()

        with meanwhile(end):
            assert await ask(pool, LONG) == expected
        assert len(recovered) == 1
        async with anyio.create_task_group() as tasks:

            async def abort() -> None:
                while server.running() == 0:
                    await anyio.sleep(0.01)
                await pool.abort()

            tasks.start_soon(abort)
            (row,) = await pool.generate(PROMPT, LONG)
        assert row.finish_reason == "abort" and 0 < len(row.output_ids) < 2000
    assert len(recovered) == 1


ROUTES = (
    "/pause_generation",
    "/update_weights_from_disk",
    "/flush_cache",
    "/model_info",
    "/continue_generation",
)


@pytest.mark.parametrize(("route", "fault"), list(itertools.product(ROUTES, ["reset", "killed"])))
async def test_a_sync_that_is_cut_off(
    server: Server, between: Proxy, models: dict[str, Path], route: str, fault: str
) -> None:
    """Goal: whichever call of a sync breaks, or finds its engine dead, the sync is done again, and the engine samples
    from the new weights, not paused. Red with WeightSyncError raised as it comes."""
    recovered: list[Recovered] = []
    async with pool_of(between.url, recovered=recovered) as pool:
        await pool.update_weights_from_checkpoint(
            str(models["old"]), weight_version=f"before {route} {fault}"
        )
        between.path = route
        between.faults.append("reset" if fault == "reset" else server.replace)
        answers = await pool.update_weights_from_checkpoint(
            str(models["new"]), weight_version=f"after {route} {fault}"
        )
        assert answers[0]["success"] is True
        (row,) = await pool.generate(PROMPT, ALIKE)
        assert row.weight_version == server.version() == f"after {route} {fault}"
        assert len(recovered) == 1


async def test_weights_that_are_refused(
    server: Server, models: dict[str, Path], tmp_path: Path, recovered: list[Recovered]
) -> None:
    """Goal: a checkpoint that the engine refuses is an error at once, and what it had before is what it comes back
    with. Red with the refused weights kept as the current ones."""
    server.await_health()
    async with pool_of(server.url, recovered=recovered) as pool:
        await pool.update_weights_from_checkpoint(str(models["new"]), weight_version="10")
        expected = await ask(pool)
        with pytest.raises(WeightSyncError, match="at update"):
            await pool.update_weights_from_checkpoint(str(tmp_path), weight_version="11")
        assert recovered == []
        server.replace()
        assert await ask(pool) == expected
    assert server.version() == "10"


async def test_weights_given_by_other_ways(
    server: Server, models: dict[str, Path], recovered: list[Recovered]
) -> None:
    """Goal: weights that came by calls of the client's own are given again by the function that was named for it, and a
    proof that the engine's death interrupts is asked again under them. Red with what `give` does not kept, and with
    the probe left to the client."""
    server.await_health()
    pool = pool_of(server.url, recovered=recovered)
    (replica,) = pool.replicas
    given: list[str] = []

    async def give(client: Any) -> dict[str, Any]:
        given.append("again")
        return dict(
            await client.update_weights_from_checkpoint(str(models["new"]), weight_version="13")
        )

    async with replica.receiving("13", give):
        await replica.client.update_weights_from_checkpoint(str(models["new"]), weight_version="13")
    expected, probe = await ask(pool), await replica.input_logprobs(PROMPT)
    assert not given
    server.replace()
    assert await replica.input_logprobs(PROMPT) == probe
    server.replace()
    server.await_health()
    assert await replica.input_logprobs(PROMPT) == probe
    assert await ask(pool) == expected
    assert given == ["again"] * 2 == ["again"] * len(recovered)
    await pool.aclose()


@pytest.fixture
def second(models: dict[str, Path], tmp_path: Path) -> Iterator[Server]:
    made = Server(models["old"], tmp_path)
    yield made
    made.close()


async def test_a_replica_takes_the_work(
    server: Server, second: Server, models: dict[str, Path], recovered: list[Recovered]
) -> None:
    """Goal: while one replica is dead the other answers for it, with the same results; back, it joins in with the
    current weights. Red with every engine waited for, and with a dead one never asked again."""
    server.await_health()
    pool = pool_of(server.url, second.url, recovered=recovered)
    await pool.update_weights_from_checkpoint(str(models["new"]), weight_version="12")
    expected = await ask(pool)
    second.kill()
    for _ in range(2):
        assert await ask(pool, first=1) == expected
    assert recovered == []
    second.start()
    second.await_health()
    assert await ask(pool, first=1) == expected
    assert [one.url for one in recovered] == [second.url] and second.version() == "12"
    await pool.aclose()


async def test_an_engine_that_does_not_come_back(
    second: Server, recovered: list[Recovered]
) -> None:
    """Goal: waiting ends, saying how long it was, what happened first and what was seen last. Red without the bound."""
    pool = EnginePool([SGLangEngine(second.url)], reruns_max=3, recover_timeout_s=0.5)
    await ask(pool)
    second.kill()
    with pytest.raises(
        EngineError,
        match=r"did not come back within 0\.5 s. What was wrong: .*/generate.* Last seen: ",
    ):
        await ask(pool)
    await pool.aclose()


@both_backends
async def test_a_cancelled_wait(second: Server, recovered: list[Recovered]) -> None:
    """Goal: cancelling a request whose engine is down ends the wait at once, and the next request waits anew. Red with
    the lock kept."""
    async with pool_of(second.url, recovered=recovered) as pool:
        expected = await ask(pool)
        second.kill()
        with anyio.move_on_after(0.3) as scope:
            await ask(pool)
        assert scope.cancelled_caught
        second.start()
        assert await ask(pool) == expected


ASKING = """
import sys, anyio
from rollouts.training.weight_sync import SGLangEngine
params = {"max_new_tokens": 2000, "ignore_eos": True}
anyio.run(SGLangEngine(sys.argv[1]).generate, [2, 3, 4], params)
"""


def test_no_request_of_a_dead_client_is_left(server: Server) -> None:
    """Goal: kill -9 of a client in the middle of a request: the engine stops working on it. Red with the engine's watch
    for hang-ups taken out."""
    server.await_health()
    with subprocess.Popen([sys.executable, "-c", ASKING, server.url], cwd=REPOSITORY) as client:
        wait_for(lambda: server.running() == 1)
        # or it may be done by itself
        httpx.post(f"{server.url}/pause_generation", json={"mode": "in_place"}, timeout=60)
        assert server.running() == 1
        client.send_signal(signal.SIGKILL)
    wait_for(lambda: server.running() == 0)
    httpx.post(f"{server.url}/continue_generation", json={}, timeout=60)


def test_one_client_in_several_event_loops(server: Server, recovered: list[Recovered]) -> None:
    """Goal: a pool is used from one event loop after another, as generate_rollout_batches does. Red with one
    lock for all of them."""
    server.await_health()
    pool = pool_of(server.url, recovered=recovered)
    for backend in ("asyncio", "trio"):
        for _ in range(2):
            server.replace()
            assert len(anyio.run(partial(ask, pool), backend=backend)) == 4
    assert len(recovered) >= 1
