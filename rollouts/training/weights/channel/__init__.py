"""`Channel`: how a bucket of tensors gets from rank 0's buffer into engines. A module each, on rank 0 alone."""

from collections.abc import Sequence
from typing import Protocol

import torch

from rollouts.training.inference.inference_engine import InferenceEngine
from rollouts.training.weights.wire import Buffer, WireTensor


class Channel(Protocol):
    def in_flight(self, device: torch.device) -> int:
        """Return how many calls of `put` may run at once, for buffers on `device`.

        With more than 1 they may arrive in any order. The last bucket's begins when all others have returned.
        """
        ...

    def buffer(self, nbytes: int, device: torch.device) -> Buffer:
        """Return memory for one bucket. Raises SharedMemoryError."""
        ...

    async def open(self, clients: Sequence[InferenceEngine]) -> None:
        """Prepare for a delivery. It is called at the start of each."""
        ...

    async def put(
        self,
        clients: Sequence[InferenceEngine],
        buffer: Buffer,
        entries: Sequence[WireTensor],
        version: str | None,
    ) -> None:
        """Return when all engines have loaded the bucket: `buffer` may be filled again. `version`: of the last one.

        Raises WeightSyncError.
        """
        ...

    async def aclose(self, clients: Sequence[InferenceEngine]) -> None: ...
