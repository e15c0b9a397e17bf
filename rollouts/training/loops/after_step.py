"""After a training step, where it is due: evaluate, log, save a checkpoint. `Hooks` are the caller's functions."""

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import anyio.to_thread

from rollouts.training import distributed
from rollouts.training.loops.train_step import due
from rollouts.training.metrics import MetricsLogger
from rollouts.training.seams import TrainFuture, TrainingBackend
from rollouts.training.types import RLTrainingConfig, SFTTrainingConfig

logger = logging.getLogger(__name__)
EvalFn = Callable[[int], Mapping[str, float] | Awaitable[Mapping[str, float] | None] | None]
CheckpointFn = Callable[[Path, int], Awaitable[None] | None]


@dataclass(frozen=True)
class Hooks:
    """The functions of the caller that a loop calls beside training. They may be plain or async."""

    log: MetricsLogger | None = None  # each logged step's metrics, on rank 0
    log_samples: MetricsLogger | None = None  # every rollout that is trained on, on rank 0
    evaluate: EvalFn | None = (
        None  # its floats are logged as "eval_…"; in SFT every rank calls it, in RL rank 0 alone
    )
    eval_every: int = -1  # steps; -1: only after the last
    on_checkpoint: CheckpointFn | None = None  # each complete checkpoint and its step, on rank 0
    stop: Callable[[], bool] | None = (
        None  # asked on rank 0 after each step; True: save a checkpoint, and end
    )


class AfterStep:
    """Evaluates, logs and saves after each step where that is due. `history` holds the metrics of the logged steps.

    `state` returns what a checkpoint needs beside the model, to resume the data. Leaving the context waits for the
    checkpoint in flight, also when training failed: what was saved counts.
    """

    def __init__(
        self,
        backend: TrainingBackend,
        config: SFTTrainingConfig | RLTrainingConfig,
        hooks: Hooks,
        state: Callable[[], dict[str, Any]],
    ) -> None:
        self.history: list[dict[str, float]] = []
        self.stopped = False  # the caller's `stop` said so, and the step's checkpoint is complete
        self._config, self._hooks, self._state = config, hooks, state
        self._checkpoints = Checkpoints(backend, hooks.on_checkpoint)

    async def __aenter__(self) -> "AfterStep":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._checkpoints.close(error)

    async def finish(self, step: int, metrics: dict[str, Any]) -> None:
        """Evaluate, log and save after `step`, each where it is due; the evaluation is added to `metrics`.

        A checkpoint holds its step's evaluation, so it comes last. The stage's last one is complete before the
        evaluation begins: that may run out of memory or time, and all of the training would be lost.
        """
        config, hooks = self._config, self._hooks
        last = step == config.num_steps
        if last:
            await self._checkpoints.save(step, metrics, self._state())
            await self._checkpoints.finish()
        try:
            if hooks.evaluate is not None and due(step, hooks.eval_every, config.num_steps):
                metrics |= {
                    f"eval_{key}": value
                    for key, value in (await call(hooks.evaluate, step) or {}).items()
                }
        finally:
            if due(step, config.log_every, config.num_steps):
                self._log(step, metrics)
        self.stopped = not last and await self._is_asked_to_stop()
        if not last and (self.stopped or due(step, config.checkpoint_every, config.num_steps)):
            await self._checkpoints.save(step, metrics, self._state())
        await (self._checkpoints.finish() if self.stopped else self._checkpoints.poll())

    async def _is_asked_to_stop(self) -> bool:
        """Ask the caller, on rank 0; every rank gets that answer. Waits in a thread: others may be at work here."""
        if self._hooks.stop is None:
            return False
        asked = distributed.rank() == 0 and self._hooks.stop()
        if distributed.world_size() == 1:
            return asked
        return await anyio.to_thread.run_sync(distributed.broadcast_object, asked)

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        self.history.append(metrics)
        if self._hooks.log is not None and distributed.rank() == 0:
            self._hooks.log.log(metrics, step=step)


class Checkpoints:
    """Saves that run while training goes on. Each is reported to `on_checkpoint`, on rank 0, once it is complete."""

    def __init__(self, backend: TrainingBackend, on_checkpoint: CheckpointFn | None) -> None:
        self._backend = backend
        self._on_checkpoint = on_checkpoint
        self._pending: tuple[int, TrainFuture[Path]] | None = None

    async def save(self, step: int, metrics: dict[str, Any], extra: dict[str, Any]) -> None:
        """Start to save the state after `step`; waits for the save before."""
        await self.finish()
        self._pending = step, await self._backend.start_checkpoint(step, metrics, extra=extra)

    async def poll(self) -> None:
        """Report the save that has completed since the last call, if there is one; raise the error that it met."""
        if self._pending is not None and self._pending[1].done():
            await self.finish()

    async def finish(self) -> None:
        """Wait for the save in flight and report it."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            path = await future.result()
            if self._on_checkpoint is not None and distributed.rank() == 0:
                await call(self._on_checkpoint, path, step)

    async def close(self, error: BaseException | None) -> None:
        """Finish; where training failed by `error`, a save that fails too is only logged."""
        try:
            await self.finish()
        except Exception as failure:  # whatever the backend or on_checkpoint raises
            if error is None:
                raise
            # training's own error is raised
            logger.error("the last checkpoint failed too: %s", failure)


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns, awaited where it is async."""
    value = function(*arguments)
    return await value if inspect.isawaitable(value) else value
