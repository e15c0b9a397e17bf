"""Deliver weights to all engines of a pool at once, whichever of them die meanwhile."""

import contextlib
from collections.abc import Awaitable, Callable, Sequence

from rollouts.training.inference.http import WeightSyncError
from rollouts.training.inference.inference_engine import InferenceEngine
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.given_weights import Give

Deliver = Callable[[Sequence[InferenceEngine]], Awaitable[None]]


async def receive(pool: EnginePool, version: str, deliver: Deliver, give: Give) -> None:
    """Have `deliver(clients)` bring all engines to `version`. `give(client)` brings one to it that is started again.

    If an engine's death cuts `deliver` off, each engine gets the weights by `give`, one by one, once it is back.
    """
    async with contextlib.AsyncExitStack() as stack:
        for replica in pool.replicas:
            await stack.enter_async_context(replica.receiving(version, give))
        try:
            await deliver(pool.clients)
        except WeightSyncError as error:
            if not pool.replicas:
                raise
            for replica in pool.replicas:
                await replica.receive_again(error)
