"""Kind "tensor": engines on this host read the weights from the trainer's memory: /dev/shm, or CUDA IPC on one GPU."""

from collections.abc import Sequence
from typing import Any

import torch

from rollouts.training.weight_transfer.fanout import each
from rollouts.training.weight_transfer.payload import Buffer, Entry, dumps, shared_buffer


class SharedMemoryLink:
    """`Link` over memory of this host. Only a message that says where it is goes over HTTP.

    `owner`: what the names of its files in /dev/shm begin with, after "rollouts-bucket-".
    """

    def __init__(self, *, tensor_parallel_size: int = 1, owner: str = "") -> None:
        self._owner = owner
        self._readers = tensor_parallel_size  # processes of one engine, each of which reads a message of its own

    def in_flight(self, device: torch.device) -> int:
        """On a CPU the next message waits at the engine, which else idles for some ms between two buckets."""
        return 2 if device.type == "cpu" else 1

    def buffer(self, nbytes: int, device: torch.device) -> Buffer:
        return shared_buffer(nbytes, device, owner=self._owner)

    async def open(self, engines: Sequence[Any]) -> None:
        """Nothing to be made ready."""

    async def send(self, engines: Sequence[Any], buffer: Buffer, entries: Sequence[Entry], version: str | None) -> None:
        async def one(engine: Any) -> None:
            messages = [dumps(buffer, entries) for _ in range(self._readers)]
            await engine.update_weights_from_tensor(messages, version)

        await each(engines, f"sending {entries[0].name} and {len(entries) - 1} more tensors", one)

    async def aclose(self, engines: Sequence[Any]) -> None:
        """Nothing was made beside the buffers."""
