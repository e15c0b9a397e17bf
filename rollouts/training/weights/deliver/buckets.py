"""Deliver weights a bucket at a time: while the engines load one, the next is gathered into another buffer.

Rank 0 has one buffer more than its channel sends at once (fewer, if all buckets fit), from delivery to delivery. No
rank holds the whole model, unless a delivery is kept. Every rank gathers every bucket whatever the engines do: failures
are between them and rank 0, so that rank 0 alone can mend them, while the others are elsewhere.
"""

import contextlib
from collections.abc import Sequence
from functools import partial

import anyio
import torch

from rollouts.training import distributed
from rollouts.training.inference.fan_out import on_all_engines
from rollouts.training.inference.http import EngineError, WeightSyncError, require
from rollouts.training.inference.inference_engine import InferenceEngine, routes_of
from rollouts.training.seams import TrainingBackend
from rollouts.training.weights.channel import Channel
from rollouts.training.weights.deliver.bucket_source import BucketSource
from rollouts.training.weights.deliver.pipeline import Fill, Pipeline
from rollouts.training.weights.gather import buffer_bytes
from rollouts.training.weights.wire import Buffer, SharedMemoryError


class BucketDelivery:
    """`Delivery` over a `Channel`. `backend`: a PyTorch or FSDP one; `dtype` and `keep` as `BucketSource` has them."""

    def __init__(
        self,
        backend: TrainingBackend,
        channel: Channel,
        *,
        dtype: torch.dtype | None,
        bucket_bytes: int,
        keep: bool = False,
    ) -> None:
        self._source = BucketSource(backend, dtype=dtype, bucket_bytes=bucket_bytes, keep=keep)
        self._channel = channel
        self._device = backend.device
        self._in_flight = channel.in_flight(backend.device)
        self._buffers: list[Buffer] = []
        # several engines may come back at once, and they share the buffers
        self._lock = anyio.Lock()

    async def deliver(self, clients: Sequence[InferenceEngine], version: str) -> None:
        if distributed.rank() != 0:
            await self._source.begin()
            return
        async with self._lock:
            await self._source.begin()
            try:
                await self._send(clients, version, self._source.gather)
            except WeightSyncError:
                await self._source.gather_rest()
                raise

    async def restore(self, client: InferenceEngine, version: str) -> None:
        self._source.require_for_restart()
        async with self._lock:
            await self._channel.aclose([client])  # what connected it to us was of its life before
            await self._send([client], version, self._source.load_again)

    async def aclose(self, clients: Sequence[InferenceEngine]) -> None:
        self._drop_buffers()
        self._source.close()
        if distributed.rank() == 0:
            await self._channel.aclose(clients)

    async def _send(self, clients: Sequence[InferenceEngine], version: str, fill: Fill) -> None:
        """Run the whole cycle, with buckets that `fill` brings into the buffers."""
        try:
            self._make_buffers()
            pipeline = Pipeline(
                self._buffers, len(self._source.buckets), in_flight=self._in_flight, fill=fill
            )
            await on_all_engines(clients, "pausing", lambda client: client.pause("retract"))
            await self._channel.open(clients)
            await self._put_all(clients, version, pipeline)
            await on_all_engines(clients, "finishing the update", partial(_finish, version=version))
        except (EngineError, SharedMemoryError) as error:
            raise WeightSyncError(
                f"weight sync of version {version}: {error}. Engines whose weights may have changed are left paused"
            ) from (error.__cause__ or error)

    async def _put_all(
        self, clients: Sequence[InferenceEngine], version: str, pipeline: Pipeline
    ) -> None:
        """Put all buckets within a session of each engine."""
        buckets, last = self._source.buckets, len(self._source.buckets) - 1

        async def put(index: int, buffer: Buffer) -> None:
            await self._channel.put(
                clients, buffer, buckets[index], version if index == last else None
            )

        try:
            await on_all_engines(
                clients,
                "opening the update",
                lambda client: routes_of(client).begin_weight_update(),
            )
            await pipeline.run(put)
        except Exception:
            for client in clients:  # or the next delivery finds a session that is open
                with contextlib.suppress(EngineError):
                    await routes_of(client).end_weight_update()
            raise
        await on_all_engines(
            clients, "closing the update", lambda client: routes_of(client).end_weight_update()
        )

    def _drop_buffers(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()

    def _make_buffers(self) -> None:
        buckets = self._source.buckets
        size, count = buffer_bytes(buckets), min(self._in_flight + 1, len(buckets))
        fits = len(self._buffers) == count and self._buffers[0].flat.numel() == size
        if not fits or not all(buffer.is_there for buffer in self._buffers):
            self._drop_buffers()
            for _ in range(count):
                self._buffers.append(self._channel.buffer(size, self._device))


async def _finish(client: InferenceEngine, version: str) -> None:
    await client.flush_cache()
    served = (await client.model_info()).get("weight_version")
    require(served == version, f"serves version {served!r}, needs {version!r}")
    await client.resume()
