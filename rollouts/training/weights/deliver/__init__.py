"""`Delivery`: one way for a backend's weights to reach engines. A module each; `publish` runs the cycle around them."""

from collections.abc import Sequence
from typing import Protocol

from rollouts.training.inference.inference_engine import InferenceEngine


class Delivery(Protocol):
    """Every rank makes each call. `clients` are rank 0's alone; other ranks pass none."""

    async def deliver(self, clients: Sequence[InferenceEngine], version: str) -> None:
        """Pause, send, flush the prefix cache, read the version back, resume: the engines then serve `version`.

        Raises WeightSyncError, which names each engine that failed. An engine with unknown weights stays paused.
        """
        ...

    async def restore(self, client: InferenceEngine, version: str) -> None:
        """Give the weights of the last `deliver` to one engine that was started again. On rank 0 alone.

        Raises WeightSyncError if the weights are gone, or would take the other ranks.
        """
        ...

    async def aclose(self, clients: Sequence[InferenceEngine]) -> None:
        """Remove what the delivery left anywhere. Never raises for an engine that is gone."""
        ...
