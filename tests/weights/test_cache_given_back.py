"""When the trainer returns the memory that its allocator keeps: before engines of its card need it. A log of calls."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch

from rollouts.training.inference.http import EngineLost
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.weights.publish import WeightPublisher

pytestmark = pytest.mark.anyio
GIVEN = "cache given back"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Later:
    """A future of the backend's thread. `result` is what comes when somebody waits for it."""

    def __init__(self, log: list[str], done: str) -> None:
        self._log, self._done = log, done

    async def result(self) -> None:
        self._log.append(self._done)


class Backend:
    """A backend on a card, whose thread is in the middle of a step: work that is not waited for stays in the queue."""

    has_log_probs = False

    def __init__(self, log: list[str], device: str = "cuda") -> None:
        self.device, self._log = torch.device(device), log

    def give_cache_back(self) -> Later:
        self._log.append("asked")
        return Later(self._log, GIVEN)


class Client:
    """An engine's client, which dies at its next request once `dies` is set; it starts again, unless `stays_down`."""

    base_url = "http://127.0.0.1:9"

    def __init__(self, log: list[str]) -> None:
        self._log, self.dies, self.stays_down, self.version = log, False, False, "start"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any, **options: Any) -> dict[str, Any]:
            self._log.append(name)
            if self.stays_down:
                raise EngineLost("connection refused")
            return {"weight_version": self.version}

        return call

    @property
    def weights(self) -> "Client":
        return self

    async def generate_batch(self, *arguments: Any, **options: Any) -> list[list[Any]]:
        if self.dies:
            self.dies, self.version = False, "start"
            self._log.append("died")
            raise EngineLost("connection closed")
        self._log.append("generate")
        return [[]]


def pool_of(*clients: Client) -> EnginePool:
    return EnginePool(clients, reruns_max=None)


class Delivered:
    def __init__(self, log: list[str], clients: list[Client]) -> None:
        self._log, self._clients = log, clients

    async def deliver(self, clients: Any, version: str) -> None:
        self._log.append("deliver")
        for client in self._clients:
            client.version = version

    async def restore(self, client: Any, version: str) -> None:
        self._log.append("restore")
        client.version = version

    async def aclose(self, clients: Any) -> None: ...


async def test_before_engines_wake_and_before_a_sync() -> None:
    """Goal: the memory is free before the engines take theirs, and before a delivery. Red without the call in
    `wake`, and without that in a sync."""
    log: list[str] = []
    client = Client(log)
    publisher = WeightPublisher(
        Backend(log), pool_of(client), Delivered(log, [client]), sleep_while_training=True
    )
    await publisher.sleep(weights=False)
    log.clear()
    await publisher.wake()
    assert log == ["asked", GIVEN, "resume_memory", "resume"]
    await publisher.sleep(weights=True)
    log.clear()
    await publisher.publish(1)
    assert log.index(GIVEN) < log.index("resume_memory") < log.index("deliver")
    log.clear()
    await publisher.publish(2)
    assert log == ["asked", GIVEN, "deliver"]


async def test_at_the_death_of_an_engine_in_mid_step() -> None:
    """Goal: an engine that dies while the trainer steps starts beside as little of the trainer's memory as can be: it
    is asked for at once, before anybody asks the engine again, and no one waits for the step. Once for a death.

    Red without `when_lost`.
    """
    log: list[str] = []
    client = Client(log)
    pool = EnginePool([client], reruns_max=2, recover_timeout_s=5.0)
    publisher = WeightPublisher(Backend(log), pool, Delivered(log, [client]))
    await publisher.publish(1)
    log.clear()
    client.dies = True
    with anyio.fail_after(5):
        await pool.generate([1], {})
    assert log[:3] == ["died", "asked", "model_info"] and log[-1] == "generate" and "restore" in log
    assert log.count("asked") == 1 and GIVEN not in log


async def test_a_replica_that_takes_the_work() -> None:
    """Goal: the memory is returned also where a peer answers in place of the dead one. Red with it asked for only by
    who waits for the engine."""
    log: list[str] = []
    clients = [Client(log), Client(log)]
    pool = EnginePool(clients, reruns_max=2, recover_timeout_s=5.0)
    publisher = WeightPublisher(Backend(log), pool, Delivered(log, clients))
    await publisher.publish(1)
    log.clear()
    clients[0].dies = clients[0].stays_down = True
    await pool.generate([1], {})
    assert log[:2] == ["died", "asked"] and "restore" not in log and log[-1] == "generate"


async def test_a_cpu_has_nothing_to_give_back() -> None:
    """Goal: on a CPU nothing is asked of the backend. Red without the look at the device."""
    log: list[str] = []
    client = Client(log)
    await WeightPublisher(Backend(log, "cpu"), pool_of(client), Delivered(log, [client])).publish(1)
    assert log == ["deliver"]
