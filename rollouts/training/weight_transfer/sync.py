"""A run's weight sync: transfer, then proof, for all engines at once; and engine memory given back while we train.

The cycle is: pause → transfer → flush the prefix cache (checked) → version, read back → continue → proof by log-probs.
The proof comes last since SGLang holds every request, the probe too, while it is paused; nothing that was sampled in
between is used before it: what fails is raised, and the engines are paused again.
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from rollouts.training import distributed
from rollouts.training.inference.http import WeightSyncError, require
from rollouts.training.inference.resilient import ResilientEngine
from rollouts.training.weight_transfer.disk import DiskTransfer
from rollouts.training.weight_transfer.fanout import each
from rollouts.training.weight_transfer.probe import disagreement, probe_batch, probe_ids
from rollouts.training.weight_transfer.protocol import Transfer

GPU_MEMORY = ("kv_cache", "weights", "cuda_graph")  # SGLang's tags for all it can give back


class WeightSync:
    """Hands the trainer's weights to the engines and proves that they serve them. Every rank makes each call.

    `engines` are rank 0's; others may pass []. `transfer`: how (None: `DiskTransfer` beside the checkpoints). `dtype`:
    the coarser of what trainer and engine compute in, which says how far their log-probs may differ. An engine without
    `input_logprobs`, or a backend without `log_probs`, has no proof beyond the transfer's own. `sleep_while_training`:
    the engines share their GPUs with the trainer.
    """

    def __init__(
        self,
        backend: Any,
        engines: Sequence[Any],
        transfer: Transfer | None = None,
        *,
        dtype: str = "bfloat16",
        sleep_while_training: bool = False,
    ) -> None:
        self._backend = backend
        self._engines = engines
        self._transfer = transfer or DiskTransfer(backend)
        self._dtype = dtype
        self._sleeps = sleep_while_training
        self._active = distributed.broadcast_object(bool(engines))  # other ranks need not know the engines
        self._ids = probe_ids(_vocab_size(backend)) if backend.has_log_probs else None
        self._version: int | None = None
        self._expected: list[float] = []
        self._proven: dict[int, tuple[list[float], list[float]]] = {}  # by engine: the trainer's and its own log-probs
        self._asleep: tuple[str, ...] = ()
        for engine in engines:
            if isinstance(engine, ResilientEngine):
                engine.when_lost(self._start_giving_back)

    async def __call__(self, version: int) -> None:
        """All engines serve the weights of now, as `version`. Raises WeightSyncError: no step trains on less."""
        if not self._active:
            return
        await self._give_cache_back()
        await self.wake()
        if self._ids is not None:
            log_probs_1T = await self._backend.log_probs(probe_batch(self._ids)).result()
            self._expected = log_probs_1T[0, 1:].tolist()
        await self._send(str(version))
        self._version = version
        if distributed.rank() == 0:
            for engine in self._engines:
                if isinstance(engine, ResilientEngine):
                    engine.comes_back_with(self.restore)
            await self._prove(self._engines)

    async def _send(self, version: str) -> None:
        """The transfer. Where an engine's death cuts it off, each gets it again, one by one, once it is back."""
        restore = partial(self._transfer.restore, version=version)
        lasting = [engine for engine in self._engines if isinstance(engine, ResilientEngine)]
        async with contextlib.AsyncExitStack() as stack:
            for engine in lasting:
                await stack.enter_async_context(engine.receiving(version, restore))
            try:
                await self._transfer([_client(engine) for engine in self._engines], version)
            except WeightSyncError as error:
                if not lasting or len(lasting) < len(self._engines):
                    raise
                for engine in lasting:
                    await engine.receive_again(error)

    async def restore(self, engine: Any) -> None:
        """Give an engine that was started again, one of the engines or in place of one, the weights of the last sync,
        and prove it. On rank 0. Raises WeightSyncError.
        """
        if self._version is None:
            raise WeightSyncError("no weights have been synced yet, so none can be restored")
        self._proven.pop(id(engine), None)
        await self._transfer.restore(engine, str(self._version))
        await self._prove([engine])

    async def sleep(self, *, weights: bool) -> None:
        """Where `sleep_while_training`: have the engines give their GPU memory back, until `wake` or the next sync.

        Requests that run are re-queued. `weights`: theirs too, so that a sync must come before they sample again.
        """
        if self._sleeps and self._active and distributed.rank() == 0 and not self._asleep:
            tags = GPU_MEMORY if weights else tuple(tag for tag in GPU_MEMORY if tag != "weights")

            async def release(engine: Any) -> None:
                await engine.pause("retract")
                await engine.flush_cache()
                await engine.release_memory(tags)

            await each(self._engines, "releasing engine memory", release)
            self._asleep = tags

    async def wake(self) -> None:
        """Have the engines take their memory again. Without their weights they stay paused, for a sync to follow."""
        if not self._asleep:
            return
        await self._give_cache_back()
        tags, self._asleep = self._asleep, ()

        async def resume(engine: Any) -> None:
            await engine.resume_memory(tags)
            if "weights" not in tags:
                await engine.resume()

        await each(self._engines, "resuming engine memory", resume)

    async def _give_cache_back(self) -> None:
        """Return the memory of the step's peak, which engines on the same card need: to wake, and to start again."""
        if (returned := self._start_giving_back()) is not None:
            await returned.result()

    def _start_giving_back(self) -> Any:
        """The same in turn with the backend's work, not waited for: an engine that died in a step starts meanwhile."""
        device = getattr(self._backend, "device", None)
        return self._backend.give_cache_back() if device is not None and device.type == "cuda" else None

    async def aclose(self) -> None:
        """Undo what the transfer left: groups, directories in memory, buffers."""
        if self._active:
            await self._transfer.aclose(self._engines)

    async def _prove(self, engines: Sequence[Any]) -> None:
        if self._ids is None:
            return
        asked = [engine for engine in engines if hasattr(engine, "input_logprobs")]
        try:
            await each(asked, f"the proof of version {self._version}", self._prove_one)
        except WeightSyncError as error:
            try:
                await each(asked, "pausing", lambda engine: engine.pause("retract"))
            except WeightSyncError as also:
                raise WeightSyncError(f"{error}. {also}") from error
            raise WeightSyncError(f"{error}. The engines are paused") from error

    async def _prove_one(self, engine: Any) -> None:
        assert self._ids is not None
        served = await engine.input_logprobs(self._ids)
        problem = disagreement(self._expected, served, self._dtype, before=self._proven.get(id(engine)))
        require(problem is None, f"it does not serve the trainer's weights: {problem}")
        self._proven[id(engine)] = self._expected, served


def _client(engine: Any) -> Any:
    return engine.client if isinstance(engine, ResilientEngine) else engine


def _vocab_size(backend: Any) -> int:
    return int(backend.model.config.get_text_config().vocab_size)
