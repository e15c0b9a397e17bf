"""`BucketSource`: bring a model's buckets into buffers, gathered from the model or from what was kept."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rollouts.training import distributed
from rollouts.training.devices import run_on
from rollouts.training.inference.http import WeightSyncError
from rollouts.training.seams import TrainFuture, TrainingBackend
from rollouts.training.weights.deliver.pipeline import Filling
from rollouts.training.weights.gather import fill, plan_buckets
from rollouts.training.weights.wire import WireTensor

Buckets = Sequence[tuple[WireTensor, ...]]
FIX = "give BucketDelivery keep=True, or set engine.weight_sync=DiskSync(...), where an engine reads them from disk"


class BucketSource:
    """A model's tensors as buckets. `dtype`: the engines' (None: the model's own).

    `keep`: rank 0 keeps the last delivery in its host's memory, for engines that are started again. Without it, they
    get the weights from the model, which must be whole on rank 0 and have taken no step since.
    """

    def __init__(
        self, backend: TrainingBackend, *, dtype: torch.dtype | None, bucket_bytes: int, keep: bool
    ) -> None:
        self._backend = backend
        self._plan = partial(plan_buckets, dtype=dtype, bucket_bytes=bucket_bytes)
        self._keep = keep
        self.buckets: Buckets = ()  # of the last delivery, as all below
        self._gathering: TrainFuture[None] | None = None  # the last one
        self._gathered = 0  # how many buckets have been gathered, or are being
        self._kept: list[Tensor] = []  # the buckets' bytes, if they are kept
        self._at_step: int | None = None  # the backend's optimizer steps

    async def begin(self) -> None:
        """Plan a delivery, on every rank. The other ranks gather all of it here, for rank 0, whatever engines do."""
        buckets: Buckets = await self._backend.on_model(self._plan).result()
        if distributed.rank() != 0:
            for entries in buckets:
                await self._backend.on_model(partial(fill, entries=entries, flat=None)).result()
            return
        self.buckets, self._gathered, self._at_step = buckets, 0, self._backend.step
        if self._keep and [len(kept) for kept in self._kept] != [
            nbytes_of(entries) for entries in buckets
        ]:
            pinned = self._backend.device.type == "cuda"
            self._kept = [
                torch.empty(nbytes_of(b), dtype=torch.uint8, pin_memory=pinned) for b in buckets
            ]

    def gather(self, index: int, flat: Tensor | None) -> Filling:
        """Begin to gather a bucket with the other ranks, into `flat` and what is kept. None: it is sent nowhere."""
        entries, kept = self.buckets[index], self._kept[index] if self._keep else None

        def gather(model: nn.Module) -> None:
            fill(model, entries, kept if flat is None else flat)
            if flat is not None and kept is not None:
                kept.copy_(flat[: len(kept)])

        self._gathering = gathering = self._backend.on_model(gather)
        self._gathered = index + 1
        return _waiting_for(gathering)

    async def gather_rest(self) -> None:
        """Gather what a delivery that failed left, with the other ranks, and for what is kept."""
        while self._gathered < len(self.buckets):
            await self.gather(self._gathered, None)()
        if self._gathering is not None:
            # one that was not waited for would still write to what a restart reads
            await self._gathering.result()

    def require_for_restart(self) -> None:
        """Raise WeightSyncError if an engine that is started again cannot get the last delivery's weights."""
        if not self._keep and distributed.world_size() > 1 and self._backend.collective:
            raise WeightSyncError(
                "the weights of a sharded model take all ranks to gather, and the others are waiting for this step's "
                f"rollouts: {FIX}"
            )

    def load_again(self, index: int, flat: Tensor) -> Filling:
        """Begin to load a bucket of the last delivery, on rank 0 alone: what was kept, else from the model."""
        if self._keep:
            kept = self._kept[index]

            async def loaded() -> None:
                await run_on(flat.device, partial(flat[: len(kept)].copy_, kept))

            return loaded

        def gather(model: nn.Module) -> int:
            fill(model, self.buckets[index], flat)
            return self._backend.step

        gathering = self._backend.on_model(gather)

        async def gathered() -> None:
            if await gathering.result() != self._at_step:
                raise WeightSyncError(
                    f"the trainer has taken steps since this version, whose weights are gone: {FIX}"
                )

        return gathered

    def close(self) -> None:
        self._kept.clear()


def _waiting_for(gathering: TrainFuture[None]) -> Filling:
    async def gathered() -> None:
        await gathering.result()

    return gathered


def nbytes_of(entries: Sequence[WireTensor]) -> int:
    return sum(entry.nbytes for entry in entries)
