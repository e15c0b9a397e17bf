"""Collectives that block their thread until all members have come, as NCCL's first one does."""

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import torch

from rollouts.training import devices
from rollouts.training.inference.http import EngineError, EngineLost, WeightSyncError
from rollouts.training.weights.channel import process_group
from rollouts.training.weights.channel.process_group import ProcessGroupChannel
from rollouts.training.weights.wire import Buffer, WireTensor

pytestmark = pytest.mark.anyio
ENTRY = WireTensor("weight", (2,), torch.float32)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Communicator:
    """Stand-in for NCCL's: a collective returns to nobody until all have come, or it was aborted."""

    def __init__(self, world: int) -> None:
        self._missing, self._changed, self._aborted = world, threading.Condition(), False
        self.threads: list[str] = []
        self.log: list[str] = []

    def enter(self, who: str) -> None:
        with self._changed:
            self._missing -= 1
            self.log.append(f"{who} entered")
            self.threads.append(threading.current_thread().name)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._missing <= 0 or self._aborted, timeout=100)
            if self._missing > 0:
                raise RuntimeError("the communicator was aborted")

    def abort(self) -> None:
        with self._changed:
            self._aborted = True
            self.log.append("aborted")
            self._changed.notify_all()

    def broadcast(self, flat: torch.Tensor, source: int, **options: Any) -> "Done":
        self.enter("trainer")
        return Done()


class Done:
    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Peer:
    """An engine. `late`: it joins that long after the request came; `never`, `dies`: it does not join."""

    base_url = "http://127.0.0.1:9"

    def __init__(
        self, communicator: Communicator, *, late_s: float = 0.0, way: str = "joins"
    ) -> None:
        self._communicator, self._late_s, self._way = communicator, late_s, way
        self.weights = self  # its routes

    async def init_weights_update_group(self, *arguments: Any, **options: Any) -> None:
        pass

    async def destroy_weights_update_group(self, name: str) -> None:
        pass

    async def update_weights_from_distributed(self, *arguments: Any, **options: Any) -> None:
        self._communicator.log.append("request begun")
        await anyio.sleep(self._late_s)
        if self._way == "never":
            await anyio.sleep_forever()
        if self._way == "dies":
            raise EngineLost("connection closed")
        await devices.run_on(None, lambda: self._communicator.enter("engine"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Communicator]]:
    """The communicators that the channel makes, in order; a test appends the ones it will get."""
    coming: list[Communicator] = []
    monkeypatch.setattr(process_group, "_join", lambda *arguments: coming[-1])
    monkeypatch.setattr(
        process_group.dist,
        "broadcast",
        lambda *arguments, **options: coming[-1].broadcast(*arguments),
    )
    monkeypatch.setattr(process_group.dist, "destroy_process_group", lambda group: None)
    yield coming
    for communicator in coming:
        communicator.abort()


async def send(channel: ProcessGroupChannel, peers: list[Peer]) -> None:
    await channel.open(peers)
    await channel.put(peers, channel.buffer(8, torch.device("cpu")), [ENTRY], "1")


@pytest.mark.parametrize("late_s", [0.0, 0.2], ids=["the peer first", "the trainer first"])
async def test_a_collective_that_blocks_its_thread(made: list[Communicator], late_s: float) -> None:
    """Goal: whoever comes first, the broadcast is over, the loop runs on meanwhile, and the request came first.

    Red with dist.broadcast called on the event loop: the loop's own thread is among those that waited.
    """
    made.append(Communicator(2))
    channel = ProcessGroupChannel(device_type="cpu", timeout_s=100.0)
    with anyio.fail_after(100):
        await send(channel, [Peer(made[0], late_s=late_s)])
    assert made[0].log[0] == "request begun" and set(made[0].log[1:]) == {
        "trainer entered",
        "engine entered",
    }
    assert threading.current_thread().name not in made[0].threads


@pytest.mark.parametrize(
    ("way", "said"),
    [("never", "not over after 0.3 s"), ("dies", "connection closed")],
    ids=["never comes", "dies"],
)
async def test_a_peer_that_does_not_join(made: list[Communicator], way: str, said: str) -> None:
    """Goal: it is given up in time as that engine's failure, the group is aborted so that our thread comes free, and
    the next sync makes a new one. Red without the abort: the thread waits for ever."""
    made.append(Communicator(2))
    channel = ProcessGroupChannel(device_type="cpu", timeout_s=0.3)
    with anyio.fail_after(100):
        with pytest.raises(EngineError, match=said) as raised:
            await send(channel, [Peer(made[0], way=way)])
        assert isinstance(raised.value, (EngineLost, WeightSyncError))
        assert "aborted" in made[0].log
        made.append(Communicator(2))
        channel._timeout_s = 60.0
        await send(channel, [Peer(made[1])])


async def test_one_engine_fails_while_another_hangs(made: list[Communicator]) -> None:
    """Goal: the failure ends the broadcast soon, and its engine's words are kept. Red with a wait for all answers."""
    made.append(Communicator(3))
    channel = ProcessGroupChannel(device_type="cpu", timeout_s=60.0)
    with anyio.fail_after(50), pytest.raises(EngineError, match="connection closed"):
        await send(channel, [Peer(made[0], way="never"), Peer(made[0], way="dies")])
    assert "aborted" in made[0].log


async def test_a_wait_that_is_called_off(made: list[Communicator]) -> None:
    """Goal: a stop from outside, too, aborts the group. Red with the abort after time-outs and failures alone."""
    made.append(Communicator(2))
    channel = ProcessGroupChannel(device_type="cpu", timeout_s=60.0)
    with anyio.move_on_after(0.3):
        await send(channel, [Peer(made[0], way="never")])
    assert made[0].log[-1] == "aborted"


class OnCard:
    """Stands in for a tensor on a card: what the link asks of one."""

    device = torch.device("cuda", 3)

    def __getitem__(self, part: slice) -> "OnCard":
        return self


async def test_every_call_has_the_groups_device(
    made: list[Communicator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the collective, and the wait for it, run where the tensor's device is current. Red with `run_on(None, …)`
    for either, and with a thread that does not set its device: device 0 in every rank."""
    where: dict[int, torch.device] = {}
    seen: list[torch.device | None] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: where.update({threading.get_ident(): device})
    )

    class Noting(Communicator):
        def broadcast(self, flat: torch.Tensor, source: int, **options: Any) -> Done:
            seen.append(where.get(threading.get_ident()))
            done = super().broadcast(flat, source, **options)
            monkeypatch.setattr(
                done, "wait", lambda: seen.append(where.get(threading.get_ident())), raising=False
            )
            return done

    made.append(Noting(2))
    channel = ProcessGroupChannel(device_type="cpu", timeout_s=100.0)
    peers = [Peer(made[0])]
    await channel.open(peers)
    await channel.put(peers, Buffer(OnCard(), None), [ENTRY], "1")  # type: ignore[arg-type]
    assert seen == [OnCard.device] * 2 and threading.get_ident() not in where
