"""`EnginePool`: all engines of a run as one. It chooses a replica for each request, and runs again what fails.

    pool = EnginePool([SGLangEngine(url) for url in urls], reruns_max=3, recover_timeout_s=180)

Interrupted requests are retried with the same seed and weights. So deaths do not change a run's results, if an engine's
answers follow from weights, request and seed alone (the embedded engine's do, on a CPU).
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rollouts.training.inference.adapted_engine import as_client
from rollouts.training.inference.fan_out import on_all_engines, update_all
from rollouts.training.inference.http import EngineError, EngineLost, Generation
from rollouts.training.inference.inference_engine import InferenceEngine, PauseMode
from rollouts.training.inference.pool.judge import Judge
from rollouts.training.inference.pool.recovery import Recovered, Reruns
from rollouts.training.inference.pool.replica import Replica
from rollouts.training.inference.pool.reruns import after_loss, ask_router, choose
from rollouts.training.inference.pool.router_client import RouterClient
from rollouts.training.inference.requests import per_prompt

logger = logging.getLogger(__name__)


class EnginePool:
    """The engines of a run, each a `Replica`. On ranks that do not talk to engines it is empty.

    A request is run again after EngineLost: a broken connection, 5xx, or no answer in time. It is also run again after
    an abort that the caller did not ask for, and after an answer by other weights than the engine was given.

    It is run again at most `reruns_max` times: at another replica that is up, else at an engine that is back within
    `recover_timeout_s`. Other errors (4xx) are the caller's, and raised as they come. With `reruns_max` 0 nothing is
    run again. With None every answer is taken, too. A `router` is asked once a request; the engines get what it fails.
    """

    def __init__(
        self,
        clients: Sequence[InferenceEngine],
        *,
        router: RouterClient | None = None,
        reruns_max: int | None,
        recover_timeout_s: float = 0.0,
        on_recovered: Callable[[Recovered], None] | None = None,
    ) -> None:
        self.reruns = (
            None if reruns_max is None else Reruns(reruns_max, recover_timeout_s, on_recovered)
        )
        self._router = router
        self.replicas = [Replica(client, self.reruns) for client in clients]

    @classmethod
    def of(cls, engines: "EnginePool | Sequence[object]") -> "EnginePool":
        """Return a pool as it is. Make one of a list of clients, or of engines of the user's own: see `AdaptedEngine`.

        Such a pool runs nothing again and takes every answer.
        """
        return (
            engines
            if isinstance(engines, EnginePool)
            else cls(list(map(as_client, engines)), reruns_max=None)
        )

    def __len__(self) -> int:
        return len(self.replicas)

    def __repr__(self) -> str:
        return ", ".join(map(repr, self.replicas))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def clients(self) -> list[InferenceEngine]:
        return [replica.client for replica in self.replicas]

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        n: int = 1,
        **options: Any,
    ) -> list[Generation]:
        """Return `n` continuations of one prompt. `options` as `generate_batch` has them."""
        (group,) = await self.generate_batch([input_ids], [sampling_params], n=n, **options)
        return group

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
        first: int = 0,
    ) -> list[list[Generation]]:
        """Return `n` continuations of each prompt, in order. `first` is the replica that is asked first."""
        params = per_prompt(sampling_params, len(prompts))
        options: dict[str, Any] = {"n": n, "return_logprob": return_logprob, "rid": rid}
        reruns = self.reruns.times_max if self.reruns else 0
        groups: dict[int, list[Generation]] = {}
        if self._router is not None:
            groups = await ask_router(
                self._router, self.replicas, prompts, params, may_rerun=reruns > 0, **options
            )
            reruns -= 1
        while missing := [index for index in range(len(prompts)) if index not in groups]:
            replica = await choose(self.replicas, self.replicas[first])
            recoveries, judge = replica.recoveries, Judge([replica])
            own = [prompts[index] for index in missing], [params[index] for index in missing]
            try:
                found = await replica.client.generate_batch(*own, **options)
                if self.reruns:
                    judge.check(itertools.chain.from_iterable(found))
            except EngineLost as error:
                if not reruns:
                    raise
                logger.warning("%s; the request is run again, at most %d more times", error, reruns)
                reruns -= 1
                await after_loss(self.replicas, replica, recoveries, str(error))
                continue
            if len(found) != len(missing):
                raise EngineError(f"{replica}: {len(found)} groups for {len(missing)} prompts")
            groups |= zip(missing, found, strict=True)
        return [groups[index] for index in range(len(prompts))]

    async def abort(self, rid: str | None = None) -> None:
        """End one request, or all if `rid` is None, wherever it runs."""
        rids = [rid] if rid is None or self._router is None else self._router.rids_of(rid)
        await on_all_engines(self.replicas, "aborting", lambda replica: replica.abort(rids))

    async def pause(self, mode: PauseMode = "retract") -> None:
        """Pause all engines, as their clients do."""
        await on_all_engines(self.replicas, "pausing", lambda replica: replica.pause(mode))

    def when_lost(self, act: Callable[[], object]) -> None:
        """Call `act` each time an engine is found lost, before it is waited for: it is being started meanwhile."""
        for replica in self.replicas:
            replica.on_lost = act

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> list[dict[str, Any]]:
        """Have all engines serve the checkpoint, now and after each restart. Return their answers, in order."""
        return await update_all(self.replicas, checkpoint_path, weight_version)

    async def aclose(self) -> None:
        """Close all connections."""
        for client in self.clients:
            await client.aclose()
        if self._router is not None:
            await self._router.aclose()
