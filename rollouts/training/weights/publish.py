"""`WeightPublisher`: bring the trainer's weights to all engines at once, and prove that they serve them.

The cycle is: pause → deliver → flush the prefix cache (checked) → read the version back → resume → prove by log-probs.
The proof comes last since a paused SGLang holds every request, the proof's too. Nothing sampled in between is used
before it: a failed proof is raised, and the engines are paused again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from rollouts.training import distributed
from rollouts.training.inference.fan_out import on_all_engines
from rollouts.training.inference.http import WeightSyncError, require
from rollouts.training.inference.inference_engine import InferenceEngine, routes_of
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.receive import receive
from rollouts.training.seams import TrainFuture, TrainingBackend
from rollouts.training.weights.deliver import Delivery
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.training.weights.proof import disagreement, probe_batch, probe_ids

GPU_MEMORY = ("kv_cache", "weights", "cuda_graph")  # SGLang's tags for all memory that it can free


class Scorer(Protocol):
    @property
    def base_url(self) -> str: ...

    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float] | None: ...


class WeightPublisher:
    """Publishes the trainer's weights to the engines. Every rank makes each call.

    `pool` holds rank 0's engines; it is empty on other ranks. `delivery` None: `DiskDelivery` beside the checkpoints.
    `dtype`: the coarser one of what trainer and engine compute in, which bounds how far their log-probs may differ. An
    engine that cannot score, or a backend without log-probs, has no proof beyond the delivery's own.
    `sleep_while_training`: the engines share their GPUs with the trainer.
    """

    def __init__(
        self,
        backend: TrainingBackend,
        pool: EnginePool,
        delivery: Delivery | None = None,
        *,
        dtype: str = "bfloat16",
        sleep_while_training: bool = False,
    ) -> None:
        self._backend = backend
        self._pool = pool
        self._delivery = delivery or DiskDelivery(backend)
        self._dtype = dtype
        self._sleeps = sleep_while_training
        # other ranks do not know the engines
        self._active = distributed.broadcast_object(len(pool) > 0)
        self._ids = probe_ids(_vocab_size(backend)) if backend.has_log_probs else None
        self._published: str | None = None  # the newest version
        self._expected: list[float] = []  # the trainer's log-probs of the probe
        # by engine: the trainer's log-probs and its own
        self._proven: dict[str, tuple[list[float], list[float]]] = {}
        self._asleep: tuple[str, ...] = ()
        pool.when_lost(self._start_giving_back)

    async def publish(self, version: int) -> None:
        """Return when all engines serve the current weights as `version`. Raises WeightSyncError otherwise."""
        if not self._active:
            return
        await self._give_cache_back()
        await self.wake()
        if self._ids is not None:
            log_probs_1T = await self._backend.log_probs(probe_batch(self._ids)).result()
            self._expected = log_probs_1T[0, 1:].tolist()
        name = str(version)
        deliver, give = (
            partial(self._delivery.deliver, version=name),
            partial(self._restore, version=name),
        )
        await receive(self._pool, name, deliver, give)
        self._published = name
        if distributed.rank() == 0:
            await self._prove(self._pool.replicas)

    async def _restore(self, client: InferenceEngine, version: str) -> None:
        """Give an engine that was started again `version`, and prove it. On rank 0. Raises WeightSyncError."""
        self._proven.pop(client.base_url, None)
        await self._delivery.restore(client, version)
        # else `publish` is under way, and proves all engines at its end
        if version == self._published:
            await self._prove([client])

    async def sleep(self, *, weights: bool) -> None:
        """Have the engines free their GPU memory until `wake` or `publish`, if they sleep while training.

        Running requests are re-queued. `weights`: free theirs too; they must be published before engines sample again.
        """
        if self._sleeps and self._active and distributed.rank() == 0 and not self._asleep:
            tags = GPU_MEMORY if weights else tuple(tag for tag in GPU_MEMORY if tag != "weights")

            async def release(client: InferenceEngine) -> None:
                await client.pause("retract")
                await client.flush_cache()
                await routes_of(client).release_memory(tags)

            await on_all_engines(self._pool.clients, "releasing engine memory", release)
            self._asleep = tags

    async def wake(self) -> None:
        """Have the engines take their memory again. Those without weights stay paused until `publish`."""
        if not self._asleep:
            return
        await self._give_cache_back()
        tags, self._asleep = self._asleep, ()

        async def resume(client: InferenceEngine) -> None:
            await routes_of(client).resume_memory(tags)
            if "weights" not in tags:
                await client.resume()

        await on_all_engines(self._pool.clients, "resuming engine memory", resume)

    async def aclose(self) -> None:
        """Undo what the delivery left: groups, directories in memory, buffers."""
        if self._active:
            await self._delivery.aclose(self._pool.clients)

    async def _give_cache_back(self) -> None:
        """Return the memory of the step's peak, which engines on the same card need to wake, or to start again."""
        if (returned := self._start_giving_back()) is not None:
            await returned.result()

    def _start_giving_back(self) -> TrainFuture[None] | None:
        """Begin to return it, in turn with the backend's work: an engine that died in a step is started meanwhile."""
        return self._backend.give_cache_back() if self._backend.device.type == "cuda" else None

    async def _prove(self, engines: Sequence[Scorer]) -> None:
        try:
            await on_all_engines(
                engines, f"the proof of version {self._published}", self._prove_one
            )
        except WeightSyncError as error:
            try:
                await self._pool.pause()
            except WeightSyncError as also:
                raise WeightSyncError(f"{error}. {also}") from error
            raise WeightSyncError(f"{error}. The engines are paused") from error

    async def _prove_one(self, engine: Scorer) -> None:
        served = None if self._ids is None else await engine.input_logprobs(self._ids)
        if served is None:
            return
        problem = disagreement(
            self._expected, served, self._dtype, before=self._proven.get(engine.base_url)
        )
        require(problem is None, f"it does not serve the trainer's weights: {problem}")
        self._proven[engine.base_url] = self._expected, served


def _vocab_size(backend: TrainingBackend) -> int:
    config: Any = backend.model.config
    return int(config.get_text_config().vocab_size)
