"""SGLang's real router in front of two embedded engines, with keys: what comes through it, and what outlives it."""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest

from base_config import SGLang
from rollouts.engines.command_lines import engine_url, router_argv, router_ready_url, router_url
from rollouts.engines.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from rollouts.training.inference.client import RequestError
from rollouts.training.inference.http import EngineError, EngineLost
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.recovery import Recovered
from rollouts.training.inference.pool.router_client import RouterClient
from rollouts.training.weight_sync import SGLangEngine
from tests.engines.environments import interpreter
from tests.engines.lives import WAIT_S, Server, meanwhile, wait_for
from tests.engines.serving import PROMPT, make_model, start
from tests.example_config import sglang
from tests.ports import free_port, free_ports

pytestmark = pytest.mark.anyio
API, ADMIN = "the-api-key", "the-admin-key"
KEYS = {API_KEY_VARIABLE: API, ADMIN_KEY_VARIABLE: ADMIN}
PROMPTS = [[3 + index, *PROMPT] for index in range(8)]
# Every parameter that a request may have, at values that show: the router reads them all.
PARAMS = {
    "temperature": 0.9,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.01,
    "max_new_tokens": 12,
    "stop_token_ids": [9],
}
PARAMS |= {"skip_special_tokens": False, "ignore_eos": False}
SEEDS = [2**63 - 1 - index for index in range(len(PROMPTS))]
LONG = {"temperature": 0.9, "max_new_tokens": 400, "ignore_eos": True}  # time to kill something
ANSWER_S = 600.0  # on a machine where much else runs


class Counting(RouterClient):
    """Knows how many answers came through it."""

    answers = 0

    async def _ask(self, *arguments: Any) -> Any:
        rows = await super()._ask(*arguments)
        self.answers += 1
        return rows


class RouterProcess:
    """The router's process, started as a run starts it; it can be killed and started again."""

    def __init__(self, engine: SGLang) -> None:
        url = router_url(engine)
        assert url is not None
        self.url, self._ready_url = url, router_ready_url(engine)
        self._argv = list(
            router_argv(
                engine,
                [engine_url(engine, at) for at in range(engine.replicas)],
                python=interpreter("sglang"),
                request_timeout_s=ANSWER_S,
            )
        )
        self.start()

    def start(self) -> None:
        self.process = start(self._argv, {**KEYS, "SPT_NOENV": "1"})

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def await_replicas(self, count: int = 2) -> None:
        """Until that many serve behind it."""
        wait_for(lambda: self.process.poll() is None and self._healthy() == count)

    def _healthy(self) -> int:
        try:
            return int(httpx.get(self._ready_url, timeout=60).json().get("healthy_workers", 0))
        except httpx.TransportError:
            return 0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model("llama", root / name, seed=seed)
        for seed, name in enumerate(("old", "new"))
    }


@pytest.fixture(scope="module")
def config() -> SGLang:
    return sglang(replicas=2, sglang_port=free_ports(2), router_port=free_port())


@pytest.fixture(scope="module")
def replicas(
    config: SGLang, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    logs, ports = tmp_path_factory.mktemp("logs"), (config.sglang_port, config.sglang_port + 1)
    made = [Server(models["old"], logs, port=port, keys=KEYS) for port in ports]
    yield made
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def running(config: SGLang, replicas: Sequence[Server]) -> Iterator[RouterProcess]:
    made = RouterProcess(config)
    yield made
    made.kill()


class Stack:
    """The trainer's clients of both replicas, with and without the router between, and what they recovered."""

    def __init__(self, replicas: Sequence[Server], running: RouterProcess) -> None:
        keys: dict[str, Any] = {"api_key": API, "admin_key": ADMIN}
        self.recovered: list[Recovered] = []
        self.clients = [SGLangEngine(one.url, **keys) for one in replicas]
        self.router = Counting(running.url, self.clients[0], requests_max=64, **keys)
        options: dict[str, Any] = {"reruns_max": 3, "recover_timeout_s": WAIT_S}
        self.pool = EnginePool(
            self.clients, router=self.router, on_recovered=self.recovered.append, **options
        )

    async def ask(self, first: int = 0, params: dict[str, Any] = PARAMS) -> list[Any]:
        return rows(await self.pool.generate_batch(PROMPTS, with_seeds(params), n=2, first=first))

    async def ask_directly(self, params: dict[str, Any] = PARAMS) -> list[Any]:
        return rows(await self.clients[0].generate_batch(PROMPTS, with_seeds(params), n=2))


@pytest.fixture
async def stack(replicas: Sequence[Server], running: RouterProcess) -> AsyncIterator[Stack]:
    for one in replicas:
        one.await_health()
    running.await_replicas()
    made = Stack(replicas, running)
    yield made
    for client in (made.router, *made.clients):
        await client.aclose()


def with_seeds(params: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**params, "sampling_seed": seed} for seed in SEEDS]


def rows(groups: Sequence[Sequence[Any]]) -> list[Any]:
    return [(row.output_ids, row.logprobs, row.finish_reason) for group in groups for row in group]


def listeners(pid: int) -> set[str]:
    """The IPv4 addresses that a process listens on, as /proc has them."""
    sockets = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        line[1].partition(":")[0]
        for line in lines
        if line[3] == "0A" and f"socket:[{line[9]}]" in sockets
    }


async def test_it_answers_as_a_replica_does(
    stack: Stack, replicas: Sequence[Server], running: RouterProcess
) -> None:
    """Goal: ids and log-probs of a routed batch are a replica's own, to the bit, with every parameter and seed; both
    replicas did some of it; the router listens on loopback alone, asks for the key, and has it on no command line. Red
    with the router's figures on all addresses."""
    before = [prefilled(one) for one in replicas]
    assert await stack.ask() == await stack.ask_directly()
    assert stack.router.answers == len(PROMPTS) and stack.recovered == []
    assert all(prefilled(one) > count for one, count in zip(replicas, before, strict=True))
    assert listeners(running.process.pid) == {"0100007F"}
    command = Path(f"/proc/{running.process.pid}/cmdline").read_text()
    assert API not in command and ADMIN not in command and "--worker-urls" in command
    refused = httpx.post(f"{running.url}/generate", json={"input_ids": PROMPT}, timeout=60)
    assert refused.status_code == 401


def prefilled(server: Server) -> int:
    return int(server.get("/server_info").json()["internal_states"][0]["prefilled_tokens"])


async def test_a_replica_dies(
    stack: Stack, replicas: Sequence[Server], models: dict[str, Path]
) -> None:
    """Goal: kill -9 of a replica under requests costs those alone, which the other answers, with the same results; back
    with its start model, it serves nobody before it has the current weights. Red with answers by any weights taken."""
    await stack.pool.update_weights_from_checkpoint(str(models["new"]), weight_version="7")
    expected = await stack.ask()
    dead = replicas[1]
    long = await stack.ask(0, LONG)

    def kill() -> None:
        wait_for(lambda: dead.running() > 0)
        dead.kill()

    with meanwhile(kill):
        assert await stack.ask(0, LONG) == long
    assert await stack.ask(0) == await stack.ask(1) == expected
    assert stack.recovered == []
    dead.start()
    dead.await_health()
    assert dead.version() == "default"
    with anyio.fail_after(WAIT_S):  # the router has to notice it, within its second
        while not stack.recovered:
            assert await stack.ask() == expected
    assert dead.version() == "7" and [one.url for one in stack.recovered] == [dead.url]
    assert "sampled with weights default" in stack.recovered[0].reason


async def test_the_router_dies(
    stack: Stack, running: RouterProcess, replicas: Sequence[Server]
) -> None:
    """Goal: kill -9 of the router under requests: the replicas are asked themselves, with the same results, until it is
    back; then they come through it again. Red with what the router failed raised."""
    expected, long = await stack.ask(), await stack.ask(1, LONG)

    def kill() -> None:
        wait_for(lambda: any(one.running() for one in replicas))
        running.kill()

    with meanwhile(kill):
        assert await stack.ask(1, LONG) == long
    through = stack.router.answers
    assert await stack.ask() == expected and stack.router.answers == through
    running.start()
    running.await_replicas()
    assert await stack.ask() == expected and stack.router.answers == through + len(PROMPTS)
    assert stack.recovered == []


async def test_without_reruns_nothing_is_run_again(stack: Stack, running: RouterProcess) -> None:
    """Goal: reruns_max 0 raises what the router gave, and a caller's mistake is raised with any."""
    pool = EnginePool(stack.clients[:1], reruns_max=0, recover_timeout_s=1.0, router=stack.router)
    running.kill()
    with pytest.raises(EngineLost, match="/generate"):
        await pool.generate(PROMPT, PARAMS)
    running.start()
    running.await_replicas()
    with pytest.raises(RequestError, match="outside the vocabulary"):
        await stack.pool.generate([10**6], PARAMS)
    with pytest.raises(EngineError, match="400"):
        await stack.router.request(
            "POST", "/generate", {"input_ids": PROMPT * 400, "sampling_params": {}}
        )


async def test_weights_change_under_requests(
    stack: Stack, replicas: Sequence[Server], models: dict[str, Path]
) -> None:
    """Goal: an update in flight, given to each replica itself: routed requests go on, by two versions, none run
    again."""
    await stack.pool.update_weights_from_checkpoint(str(models["old"]), weight_version="20")
    through = stack.router.answers
    found: list[Any] = []

    async def ask() -> None:
        found.extend(await stack.pool.generate_batch(PROMPTS[:4], {**LONG, "max_new_tokens": 1500}))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.to_thread.run_sync(
            lambda: wait_for(lambda: sum(one.running() for one in replicas) == 4)
        )
        await stack.pool.update_weights_from_checkpoint(str(models["new"]), weight_version="21")
    versions = [
        [span["version"] for span in row.weight_versions] for group in found for row in group
    ]
    assert versions == [["20", "21"]] * 4
    assert stack.router.answers == through + 4 and stack.recovered == []


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_aborts_and_hang_ups_reach_the_replica(
    stack: Stack, replicas: Sequence[Server]
) -> None:
    """Goal: an abort by rid, asked of any of the clients, ends the request at whichever replica has it, and is no
    failure; a cancelled request runs nowhere any more. Red with the abort sent to the client's own replica alone."""

    async def until_one_runs() -> None:
        await anyio.to_thread.run_sync(
            lambda: wait_for(lambda: any(one.running() for one in replicas))
        )

    answers: list[Any] = []

    async def ask() -> None:
        answers.extend(await stack.pool.generate(PROMPT, LONG, n=2, rid="some"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await until_one_runs()
        await stack.pool.abort("some")
    assert [row.finish_reason for row in answers] == ["abort"] * 2
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await until_one_runs()
        tasks.cancel_scope.cancel()
    await anyio.to_thread.run_sync(
        lambda: wait_for(lambda: not any(one.running() for one in replicas))
    )
    assert stack.recovered == []
