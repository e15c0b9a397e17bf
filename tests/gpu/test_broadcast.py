"""The broadcast of weights over the real NCCL, whose first collective makes the communicator and blocks its thread.

Two cards: NCCL refuses two members on one. ROLLOUTS_TEST_BROADCAST=gloo runs the same on a CPU, to try the test itself.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch

from rollouts.training.inference.http import EngineError
from rollouts.training.weights.channel.process_group import ProcessGroupChannel
from rollouts.training.weights.wire import WireTensor

ON_CPU = os.environ.get("ROLLOUTS_TEST_BROADCAST") == "gloo"
KIND = "cpu" if ON_CPU else "cuda"
pytestmark = [
    pytest.mark.anyio,
    *([] if ON_CPU else [pytest.mark.gpu]),
    pytest.mark.skipif(
        not ON_CPU and torch.cuda.device_count() < 2, reason="needs two CUDA devices"
    ),
]
ENTRY = WireTensor("weight", (1 << 18,), torch.float32)
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Peer:
    """An engine, as the channel calls it, over a process that has the second card."""

    base_url = "http://127.0.0.1:9"

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.gpu.group_peer"]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.comes = True
        self.sums: list[int] = []
        self.weights = self  # its routes

    async def _ask(self, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = await anyio.to_thread.run_sync(self.process.stdout.readline, abandon_on_cancel=True)
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def init_weights_update_group(
        self,
        address: str,
        port: int,
        *,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None:
        place = {"rank": rank_offset, "world": world_size, "name": group_name, "backend": backend}
        await self._ask(
            join={
                "address": address,
                "port": port,
                "device": f"{KIND}:{0 if ON_CPU else 1}",
                **place,
            }
        )

    async def update_weights_from_distributed(self, *arguments: Any, **options: Any) -> None:
        if not self.comes:
            await anyio.sleep_forever()
        self.sums.append((await self._ask(receive=ENTRY.nbytes))["sum"])

    async def destroy_weights_update_group(self, name: str) -> None: ...


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    made = [Peer(), Peer()]
    yield made
    for peer in made:
        peer.process.kill()
        peer.process.wait()


async def test_over_the_real_communicator(peers: list[Peer]) -> None:
    """Goal: two broadcasts arrive whole; a member that never comes is given up in time and its group aborted, so that
    the next engine gets a group that works. The event loop runs on all the while."""
    device = torch.device(KIND, 0) if not ON_CPU else torch.device("cpu")
    channel = ProcessGroupChannel(device_type=KIND, timeout_s=60.0)
    buffer = channel.buffer(ENTRY.nbytes, device)
    ticks: list[None] = []

    async def tick() -> None:
        while True:
            await anyio.sleep(0.01)
            ticks.append(None)

    with anyio.fail_after(240):
        async with anyio.create_task_group() as group:
            group.start_soon(tick)
            for value in (1, 2):
                buffer.flat.fill_(value)
                await channel.open(peers[:1])
                await channel.put(peers[:1], buffer, [ENTRY], str(value))
            assert peers[0].sums == [ENTRY.nbytes, 2 * ENTRY.nbytes]
            peers[0].comes = False
            impatient = ProcessGroupChannel(device_type=KIND, timeout_s=5.0)
            impatient._joined, channel._joined = channel._joined, None
            before = len(ticks)
            with pytest.raises(EngineError, match="not over after 5 s"):
                await impatient.send(peers[:1], buffer, [ENTRY], "3")
            assert len(ticks) > before + 100, "the event loop was blocked"
            await channel.open(peers[1:])
            await channel.put(peers[1:], buffer, [ENTRY], "3")
            assert peers[1].sums == [2 * ENTRY.nbytes]
            group.cancel_scope.cancel()
        await channel.aclose(peers[1:])
