"""What the kinds of weight transfer have in common. Each is a module; `sync.WeightSync` runs the cycle around it."""

from collections.abc import Sequence
from typing import Any, Protocol

from rollouts.training.weight_transfer.payload import Buffer, Entry


class Transfer(Protocol):
    """One way for a backend's weights to reach engines. Every rank makes each call; `engines` are rank 0's alone."""

    async def __call__(self, engines: Sequence[Any], version: str) -> None:
        """Pause, send, flush the prefix cache, read the version back, continue: `engines` then serve `version`.

        Raises WeightSyncError naming each engine that failed. One with weights nobody can name stays paused.
        """
        ...

    async def restore(self, engine: Any, version: str) -> None:
        """The weights of the last call to one engine that was started again. On rank 0 alone.

        Raises WeightSyncError where the weights are no longer there, or would take the other ranks.
        """
        ...

    async def aclose(self, engines: Sequence[Any]) -> None:
        """Remove and undo whatever the transfer left anywhere. Never raises for an engine that is gone."""
        ...


class Link(Protocol):
    """How a bucket of tensors gets from rank 0's buffer into engines. On rank 0 alone."""

    def in_flight(self, device: Any) -> int:
        """How many calls of `send` may be under way at once, for buffers on `device`: 1 where each waits for the last.

        With more, they may arrive in any order; that of the last bucket begins when all others have returned.
        """
        ...

    def buffer(self, nbytes: int, device: Any) -> Buffer:
        """Memory for one bucket. Raises SharedMemoryError."""
        ...

    async def open(self, engines: Sequence[Any]) -> None:
        """Make ready for a sync; called at the start of each."""
        ...

    async def send(self, engines: Sequence[Any], buffer: Buffer, entries: Sequence[Entry], version: str | None) -> None:
        """Returns when all engines have loaded it, so that `buffer` may be filled again. `version`: of the last bucket.

        Raises WeightSyncError.
        """
        ...

    async def aclose(self, engines: Sequence[Any]) -> None: ...
