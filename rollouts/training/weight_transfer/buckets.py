"""Weights sent a bucket at a time: while the engines load one, the next is gathered into another buffer.

Rank 0 has a bucket more for it than its link sends at once (fewer, if all fits in them), from sync to sync; no rank
holds the whole model, unless what was sent is kept. Every rank gathers every bucket of a sync whatever the engines do:
what fails is between them and rank 0, so that rank 0 alone can mend it, while the others are elsewhere.
"""

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import anyio
import torch
from torch import Tensor, nn

from rollouts.training import distributed
from rollouts.training.devices import run_on
from rollouts.training.inference.http import EngineError, WeightSyncError, require
from rollouts.training.weight_transfer.fanout import each
from rollouts.training.weight_transfer.payload import Buffer, Entry, SharedMemoryError
from rollouts.training.weight_transfer.protocol import Link
from rollouts.training.weight_transfer.weights import buffer_bytes, fill, plan_buckets

Buckets = Sequence[tuple[Entry, ...]]
Loading = Callable[[], Awaitable[None]]  # waits for it; raises what failed
Load = Callable[[int, Tensor], Loading]  # begins to bring the bucket of this index into a buffer
FIX = "give BucketTransfer keep=True, or set engine.weight_sync=DiskSync(...), where an engine reads them from disk"


class BucketTransfer:
    """`Transfer` over a `Link`. `backend`: a PyTorch or FSDP one; `dtype`: the engines' (None: the model's own).

    `keep`: rank 0 keeps what it sent last, in its host's memory, for engines that are started again. Without, they get
    it from the model, which must be whole on rank 0 and have taken no step since.
    """

    def __init__(
        self, backend: Any, link: Link, *, dtype: torch.dtype | None, bucket_bytes: int, keep: bool = False
    ) -> None:
        self._backend = backend
        self._link = link
        self._dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._keep = keep
        self._in_flight = link.in_flight(backend.device)
        self._buffers: list[Buffer] = []
        self._buckets: Buckets = ()  # of the last sync, as all below
        self._gathering: Any = None  # the last one's future
        self._gathered = 0  # how many of them have been, or are being
        self._kept: list[Tensor] = []  # their bytes, where they are kept
        self._at_step: int | None = None  # the backend's optimizer steps
        self._lock = anyio.Lock()  # several engines may come back at once, and they share the buffers

    async def __call__(self, engines: Sequence[Any], version: str) -> None:
        plan = partial(plan_buckets, dtype=self._dtype, bucket_bytes=self._bucket_bytes)
        buckets: Buckets = await self._backend.on_model(plan).result()
        if distributed.rank() != 0:
            for entries in buckets:
                await self._backend.on_model(partial(fill, entries=entries, flat=None)).result()
            return
        async with self._lock:
            self._buckets, self._gathered, self._at_step = buckets, 0, self._backend.step
            if self._keep and [len(kept) for kept in self._kept] != [_nbytes(entries) for entries in buckets]:
                pinned = self._backend.device.type == "cuda"
                self._kept = [torch.empty(_nbytes(b), dtype=torch.uint8, pin_memory=pinned) for b in buckets]
            try:
                await self._transfer(engines, version, self._gather)
            except WeightSyncError:
                while self._gathered < len(buckets):  # with the other ranks, and for what is kept
                    await self._gather(self._gathered, None)()
                await self._gathering.result()  # one that nobody waited for would still write to what a restart reads
                raise

    async def restore(self, engine: Any, version: str) -> None:
        if not self._keep and distributed.world_size() > 1 and self._backend.collective:
            raise WeightSyncError(
                "the weights of a sharded model take all ranks to gather, and the others are waiting for this step's "
                f"rollouts: {FIX}"
            )
        async with self._lock:
            await self._link.aclose([engine])  # what linked it to us was of another life
            await self._transfer([engine], version, self._load_kept if self._keep else self._gather_again)

    async def aclose(self, engines: Sequence[Any]) -> None:
        self._drop_buffers()
        self._kept.clear()
        if distributed.rank() == 0:
            await self._link.aclose(engines)

    # --- where a bucket's bytes come from -----------------------------------------------------------------------------

    def _gather(self, index: int, flat: Tensor | None) -> Loading:
        """From the model, with the other ranks, into `flat` and what is kept. None: there is nobody to send it to."""
        entries, kept = self._buckets[index], self._kept[index] if self._keep else None

        def gather(model: nn.Module) -> None:
            fill(model, entries, kept if flat is None else flat)
            if flat is not None and kept is not None:
                kept.copy_(flat[: len(kept)])

        self._gathering = gathering = self._backend.on_model(gather)
        self._gathered = index + 1

        async def gathered() -> None:
            await gathering.result()

        return gathered

    def _gather_again(self, index: int, flat: Tensor) -> Loading:
        """From the model, on rank 0 alone."""

        def gather(model: nn.Module) -> int:
            fill(model, self._buckets[index], flat)
            return int(self._backend.step)

        gathering = self._backend.on_model(gather)

        async def gathered() -> None:
            if await gathering.result() != self._at_step:
                raise WeightSyncError(f"the trainer has taken steps since this version, whose weights are gone: {FIX}")

        return gathered

    def _load_kept(self, index: int, flat: Tensor) -> Loading:
        kept = self._kept[index]

        async def loaded() -> None:
            await run_on(flat.device, partial(flat[: len(kept)].copy_, kept))

        return loaded

    # --- to the engines -----------------------------------------------------------------------------------------------

    async def _transfer(self, engines: Sequence[Any], version: str, load: Load) -> None:
        try:
            self._make_buffers()
            first = load(0, self._buffers[0].flat)  # while the engines make ready
            await each(engines, "pausing", lambda engine: engine.pause("retract"))
            await self._send(engines, version, load, first)
            await each(engines, "finishing the update", partial(_finish, version=version))
        except (EngineError, SharedMemoryError) as error:
            raise WeightSyncError(
                f"weight sync of version {version}: {error}. Engines whose weights may have changed are left paused"
            ) from (error.__cause__ or error)

    def _drop_buffers(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()

    def _make_buffers(self) -> None:
        size, count = buffer_bytes(self._buckets), min(self._in_flight + 1, len(self._buckets))
        fits = len(self._buffers) == count and self._buffers[0].flat.numel() == size
        if not fits or not all(buffer.is_there for buffer in self._buffers):
            self._drop_buffers()
            for _ in range(count):
                self._buffers.append(self._link.buffer(size, self._backend.device))

    async def _send(self, engines: Sequence[Any], version: str, load: Load, first: Loading) -> None:
        await self._link.open(engines)
        try:
            await each(engines, "opening the update", lambda engine: engine.begin_weight_update())
            await self._pump(engines, version, load, first)
        except Exception:
            for engine in engines:  # or the next sync finds a session that is open
                with contextlib.suppress(EngineError):
                    await engine.end_weight_update()
            raise
        await each(engines, "closing the update", lambda engine: engine.end_weight_update())

    async def _pump(self, engines: Sequence[Any], version: str, load: Load, first: Loading) -> None:
        """Fill one buffer while others are being loaded. Raises what the first bucket that failed did."""
        failures: dict[int, Exception] = {}
        answered = [anyio.Event() for _ in self._buckets]
        loading, last = first, len(self._buckets) - 1

        async def send(index: int) -> None:
            buffer, label = self._buffers[index % len(self._buffers)], version if index == last else None
            try:
                await self._link.send(engines, buffer, self._buckets[index], label)
            except EngineError as error:
                failures[index] = error
            answered[index].set()

        async with anyio.create_task_group() as group:
            for index in range(len(self._buckets)):
                try:
                    await loading()
                except Exception as error:  # raised below: leaving the group with it would wrap it
                    failures[index] = error
                before = index if index == last else max(0, index + 1 - self._in_flight)  # a version means all of it
                for done in answered[:before]:
                    await done.wait()
                if failures:
                    break
                group.start_soon(send, index)
                if index < last:  # the next one's buffer is free: what was in it has been waited for
                    loading = load(index + 1, self._buffers[(index + 1) % len(self._buffers)].flat)
        if failures:
            raise failures[min(failures)]


def _nbytes(entries: Sequence[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


async def _finish(engine: Any, version: str) -> None:
    await engine.flush_cache()
    served = (await engine.model_info()).get("weight_version")
    require(served == version, f"serves version {served!r}, needs {version!r}")
    await engine.resume()
