"""Have engines on this host read the weights from the trainer's memory: /dev/shm, or CUDA IPC on one GPU."""

from collections.abc import Sequence

import torch

from rollouts.training.inference.fan_out import on_all_engines
from rollouts.training.inference.inference_engine import InferenceEngine, routes_of
from rollouts.training.weights.wire import Buffer, WireTensor, dumps, shared_buffer


class SharedMemoryChannel:
    """`Channel` over memory of this host. Only a message that says where it is goes over HTTP.

    `owner`: the beginning of its files' names in /dev/shm, after "rollouts-bucket-".
    """

    def __init__(self, *, tensor_parallel_size: int = 1, owner: str = "") -> None:
        self._owner = owner
        self._readers = tensor_parallel_size  # processes of one engine; each reads its own message

    def in_flight(self, device: torch.device) -> int:
        """Return 2 on a CPU: the next message waits at the engine, which else idles for some ms between two buckets."""
        return 2 if device.type == "cpu" else 1

    def buffer(self, nbytes: int, device: torch.device) -> Buffer:
        return shared_buffer(nbytes, device, owner=self._owner)

    async def open(self, clients: Sequence[InferenceEngine]) -> None:
        """Do nothing."""

    async def put(
        self,
        clients: Sequence[InferenceEngine],
        buffer: Buffer,
        entries: Sequence[WireTensor],
        version: str | None,
    ) -> None:
        async def one(client: InferenceEngine) -> None:
            messages = [dumps(buffer, entries) for _ in range(self._readers)]
            await routes_of(client).update_weights_from_tensor(messages, version)

        await on_all_engines(
            clients, f"sending {entries[0].name} and {len(entries) - 1} more tensors", one
        )

    async def aclose(self, clients: Sequence[InferenceEngine]) -> None:
        """Do nothing: the buffers are their owner's to close."""
