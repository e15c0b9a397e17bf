"""Weights sent a bucket at a time: while the engines load one, the next is gathered into another buffer.

No rank ever holds the whole model for it: rank 0 has a bucket more than its link sends at once (fewer, if all fits in
them), kept from sync to sync.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio
import torch

from rollouts.training import distributed
from rollouts.training.backends.futures import ThreadFuture
from rollouts.training.inference.http import EngineError, WeightSyncError, require
from rollouts.training.weight_transfer.fanout import each
from rollouts.training.weight_transfer.payload import Buffer, Entry, SharedMemoryError
from rollouts.training.weight_transfer.protocol import Link
from rollouts.training.weight_transfer.weights import buffer_bytes, fill, plan_buckets

Buckets = Sequence[tuple[Entry, ...]]


class BucketTransfer:
    """`Transfer` over a `Link`. `backend`: a PyTorch or FSDP one; `dtype`: the engines' (None: the model's own)."""

    def __init__(self, backend: Any, link: Link, *, dtype: torch.dtype | None, bucket_bytes: int) -> None:
        self._backend = backend
        self._link = link
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._in_flight = link.in_flight(backend.device)
        self._buffers: list[Buffer] = []
        self._sent_at_step: int | None = None  # the backend's optimizer steps at the last sync

    async def __call__(self, engines: Sequence[Any], version: str) -> None:
        plan = partial(plan_buckets, dtype=self._dtype, bucket_bytes=self._bucket_bytes)
        buckets: Buckets = await self._backend.on_model(plan).result()
        if distributed.rank() != 0:
            for entries in buckets:
                await self._backend.on_model(partial(fill, entries=entries, flat=None)).result()
            return
        try:
            self._make_buffers(buckets)
            first = self._fill(buckets, 0)  # while the engines make ready
            await each(engines, "pausing", lambda engine: engine.pause("retract"))
            await self._send(engines, buckets, first, version)
            await each(engines, "finishing the update", partial(_finish, version=version))
        except (EngineError, SharedMemoryError) as error:
            raise WeightSyncError(
                f"weight sync of version {version}: {error}. Engines whose weights may have changed are left paused"
            ) from (error.__cause__ or error)
        self._sent_at_step = self._backend.step

    async def restore(self, engine: Any, version: str) -> None:
        fix = "set engine.weight_sync='disk', where an engine that was started again reads them from disk"
        if distributed.world_size() > 1 and self._backend.collective:
            raise WeightSyncError(
                "the weights of a sharded model take all ranks to gather, and the others are waiting for this step's "
                f"rollouts: {fix}"
            )
        if self._backend.step != self._sent_at_step:
            raise WeightSyncError(f"the trainer has taken steps since version {version}, whose weights are gone: {fix}")
        await self._link.aclose([engine])  # what linked it to us was of another life
        await self([engine], version)

    async def aclose(self, engines: Sequence[Any]) -> None:
        self._drop_buffers()
        if distributed.rank() == 0:
            await self._link.aclose(engines)

    def _drop_buffers(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()

    def _make_buffers(self, buckets: Buckets) -> None:
        size, count = buffer_bytes(buckets), min(self._in_flight + 1, len(buckets))
        fits = len(self._buffers) == count and self._buffers[0].flat.numel() == size
        if not fits or not all(buffer.is_there for buffer in self._buffers):
            self._drop_buffers()
            for _ in range(count):
                self._buffers.append(self._link.buffer(size, self._backend.device))

    def _fill(self, buckets: Buckets, index: int) -> ThreadFuture[None]:
        buffer = self._buffers[index % len(self._buffers)]
        filling: ThreadFuture[None] = self._backend.on_model(partial(fill, entries=buckets[index], flat=buffer.flat))
        return filling

    async def _send(self, engines: Sequence[Any], buckets: Buckets, first: ThreadFuture[None], version: str) -> None:
        await self._link.open(engines)
        try:
            await each(engines, "opening the update", lambda engine: engine.begin_weight_update())
            await self._pump(engines, buckets, first, version)
        except EngineError:
            for engine in engines:  # or the next sync finds a session that is open
                with contextlib.suppress(EngineError):
                    await engine.end_weight_update()
            raise
        await each(engines, "closing the update", lambda engine: engine.end_weight_update())

    async def _pump(self, engines: Sequence[Any], buckets: Buckets, first: ThreadFuture[None], version: str) -> None:
        """Fill one buffer while others are being loaded. Raises what the first failed bucket raised."""
        failures: list[EngineError] = []
        answered = [anyio.Event() for _ in buckets]
        filling, last = first, len(buckets) - 1

        async def send(index: int) -> None:
            buffer, label = self._buffers[index % len(self._buffers)], version if index == last else None
            try:
                await self._link.send(engines, buffer, buckets[index], label)
            except EngineError as error:
                failures.append(error)
            answered[index].set()

        async with anyio.create_task_group() as group:
            for index in range(len(buckets)):
                await filling.result()
                before = index if index == last else max(0, index + 1 - self._in_flight)  # a version means all of it
                for done in answered[:before]:
                    await done.wait()
                if failures:
                    break
                group.start_soon(send, index)
                if index < last:  # the next one's buffer is free: what was in it has been waited for
                    filling = self._fill(buckets, index + 1)
        if failures:
            raise failures[0]


async def _finish(engine: Any, version: str) -> None:
    await engine.flush_cache()
    served = (await engine.model_info()).get("weight_version")
    require(served == version, f"serves version {served!r}, needs {version!r}")
    await engine.resume()
