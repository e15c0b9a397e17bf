"""`Replica`: the state of one engine of a pool. It waits for an engine that died, and gives it its weights again."""

import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from rollouts.training.inference.http import EngineError, EngineLost
from rollouts.training.inference.inference_engine import InferenceEngine, PauseMode, ServerInfo
from rollouts.training.inference.loop_lock import LoopLock
from rollouts.training.inference.pool import recovery
from rollouts.training.inference.pool.given_weights import Give, GivenWeights

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Replica:
    """One engine's client, and what the pool knows of the engine. `reruns` None: its failures are raised as they come.

    Something else, the supervisor, starts a dead engine again. It then serves its start model.
    """

    def __init__(self, client: InferenceEngine, reruns: recovery.Reruns | None) -> None:
        self.client = client
        self.given = GivenWeights()
        self.is_up = True
        self.recoveries = 0
        self.aborts = 0  # that the caller asked for
        # called when the engine is found lost, before it is waited for
        self.on_lost: Callable[[], object] | None = None
        self._reruns = reruns
        self._lock = LoopLock()

    def __repr__(self) -> str:
        return repr(self.client)

    @property
    def base_url(self) -> str:
        return self.client.base_url

    async def server(self) -> ServerInfo:
        """Return this engine's kind and version. See `InferenceEngine`."""
        return await self._run_again(self.client.server)

    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float] | None:
        """Return this engine's own log-probs, under the weights that it was given. See `InferenceEngine`."""
        if self._reruns is None:
            return await self.client.input_logprobs(input_ids)

        async def ask() -> list[float] | None:
            found = await self.client.input_logprobs(input_ids)
            served = await recovery.served_version(self.client)
            if not self.given.explain(served):
                raise EngineLost(f"{self}: serves weights {served}; was given {self.given.newest}")
            return found

        return await self._run_again(ask)

    async def _run_again(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return what `ask` returns. It is asked again, once the engine is back, if the engine is lost meanwhile."""
        if self._reruns is None:
            return await ask()
        for left in range(self._reruns.times_max, -1, -1):
            recoveries = self.recoveries
            try:
                return await ask()
            except EngineLost as error:
                if not left:
                    raise
                logger.warning("%s; the request is run again, at most %d more times", error, left)
                self.note_lost(recoveries)
                await self.recover(recoveries, str(error))
        raise AssertionError("the last round returns or raises")

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]:
        """Have the client do it; repeat it if the engine dies meanwhile, and whenever it comes back.

        The directory has to stay until the next update. Raises EngineError if the engine does not come back.
        """
        version = weight_version or f"{Path(checkpoint_path).name}-{uuid.uuid4().hex[:8]}"

        async def give(client: InferenceEngine) -> dict[str, Any]:
            return await client.update_weights_from_checkpoint(
                checkpoint_path, weight_version=version
            )

        async with self.receiving(version, give):
            try:
                return await give(self.client)
            except EngineError as error:
                return cast(dict[str, Any], await self.receive_again(error))

    @contextlib.asynccontextmanager
    async def receiving(self, version: str, give: Give) -> AsyncIterator[None]:
        """Let the caller bring the engine to `version` within. `give(client)` does it for this engine alone.

        Either version may answer requests meanwhile, and none is run again before the end. After an error the engine
        counts as having the version before.
        """
        async with self._lock.here():
            with self.given.receiving(version, give):
                yield
            self.is_up = True

    async def receive_again(self, error: EngineError) -> object:
        """Wait, within `receiving`, for an engine that was lost, and give it the weights. Raises any other `error`."""
        if self._reruns is None or not self._reruns.times_max:
            raise error
        if not recovery.is_lost(error) and not await recovery.lives_anew(self.client, self.given):
            raise error
        self.note_lost(self.recoveries)
        logger.warning("%s; the weights are sent again", error)
        return await self._bring_back(self._reruns, str(error), again=True)

    def note_lost(self, recoveries: int) -> None:
        """Count the engine as down, since a request failed, unless it has recovered after that was sent."""
        if self.is_up and self.recoveries == recoveries:
            self.is_up = False
            if self.on_lost is not None:
                self.on_lost()

    async def recover(self, recoveries: int, reason: str) -> None:
        """Bring the engine back, once for all requests that saw it fail."""
        async with self._lock.here():
            if self.recoveries == recoveries and self._reruns is not None:
                await self._bring_back(self._reruns, reason, again=False)

    async def abort(self, rids: Sequence[str | None]) -> None:
        """End these requests; None: all. An engine that is gone has none."""
        self.aborts += 1
        with contextlib.suppress(EngineLost):
            for rid in rids:
                await self.client.abort(rid)

    async def pause(self, mode: PauseMode) -> None:
        """Pause as the client does. What "abort" ends was the caller's wish."""
        self.aborts += mode == "abort"
        await self.client.pause(mode)

    async def _bring_back(self, reruns: recovery.Reruns, reason: str, *, again: bool) -> object:
        answer = await recovery.bring_back(
            self.client, self.given, reruns, reason=reason, again=again
        )
        self.recoveries += 1
        self.is_up = True
        return answer
