"""What both loops do at every step: run it on the backend, decide what is due, call the caller's functions."""

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rollouts.training import distributed
from rollouts.training.loops.batching import split_batch
from rollouts.training.metrics import MetricsLogger
from rollouts.training.seams import Batch, TrainFuture, TrainingBackend
from rollouts.training.types import RLTrainingConfig, SFTTrainingConfig

logger = logging.getLogger(__name__)
EvalFn = Callable[[int], Mapping[str, float] | Awaitable[Mapping[str, float] | None] | None]
PrepareFn = Callable[[list[Batch]], Awaitable[dict[str, float]]]
CheckpointFn = Callable[[Path, int], Awaitable[None] | None]


class StepsError(ValueError):
    """Steps or sizes that leave nothing to do. The message has both numbers and the fix."""


def check_steps(num_steps: int, first: int = 0, **sizes: int | None) -> None:
    """Raise StepsError unless steps are left after `first`, and each of `sizes` that is not None is at least 1.

    Of those named "…_every" -1 is allowed too: only after the last step.
    """
    whole = {"num_steps": num_steps, **sizes}
    problems = [f"{name}={size!r}: needs a whole number" for name, size in whole.items() if type(size) in (bool, float)]
    if problems:
        raise StepsError("; ".join(problems))
    last_alone = {name for name, size in sizes.items() if name.endswith("_every") and name != "sync_every"}
    problems = [
        f"{name}={size}: needs >= 1{', or -1: only after the last step' if name in last_alone else ''}"
        for name, size in sizes.items()
        if size is not None and size < 1 and not (size == -1 and name in last_alone)
    ]
    if num_steps < 1:
        problems.append(f"num_steps={num_steps}: needs >= 1, or nothing is done")
    elif first >= num_steps:
        problems.append(
            f"the checkpoint is of step {first} and num_steps={num_steps}: no step is left. Fix: num_steps > {first} "
            "to train on, or start a new run from the checkpoint's weights, without resuming"
        )
    if problems:
        raise StepsError("; ".join(problems))


async def train_step(
    backend: TrainingBackend,
    batch: Batch,
    micro_batch_size: int | None,
    micro_batch_tokens: int | None = None,
    *,
    prepare: PrepareFn | None = None,
    updates: int = 1,
) -> dict[str, float]:
    """`updates` optimizer steps over a whole step's `batch`, the same on every rank: loss and the backend's metrics.

    `prepare` gets this rank's micro-batches first, may add to them, and returns metrics. Of several updates "step" and
    "lr" are the last one's, the other numbers their means.
    """
    micro_batches = list(
        own_micro_batches(batch, micro_batch_size, micro_batch_tokens, equal_counts=backend.collective)
    )
    prepared = {} if prepare is None else await prepare(micro_batches)
    found = [await train_micro_batches(backend, micro_batches) for _ in range(updates)]
    if updates == 1:
        return found[0] | prepared
    means = {key: sum(metrics[key] for metrics in found) / updates for key in found[-1]}
    return {**means, "step": found[-1]["step"], "lr": found[-1]["lr"], **prepared}


def own_micro_batches(
    batch: Batch, micro_batch_size: int | None, micro_batch_tokens: int | None, *, equal_counts: bool
) -> Iterator[Batch]:
    """This process's share of a step's `batch`: see `split_batch`."""
    return split_batch(
        batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        equal_counts=equal_counts,
    )


async def train_micro_batches(backend: TrainingBackend, micro_batches: Iterable[Batch]) -> dict[str, float]:
    """One optimizer step over this process's share of it: its loss and the backend's metrics."""
    micro_batches = list(micro_batches)
    backend.expect(len(micro_batches))
    pending = [backend.forward_backward(micro_batch) for micro_batch in micro_batches]
    update = backend.optim_step()
    losses = [(await future.result()).get("loss", 0.0) for future in pending]  # the first that failed says why
    return {"loss": sum(losses), **await update.result()}


class Checkpoints:
    """Saves that run while training goes on. Each is reported to `on_checkpoint`, on rank 0, once it is complete.

    Leaving the context waits for the one in flight, also when training failed: what was saved counts.
    """

    def __init__(self, backend: TrainingBackend, on_checkpoint: CheckpointFn | None) -> None:
        self._backend = backend
        self._on_checkpoint = on_checkpoint
        self._pending: tuple[int, TrainFuture[Path]] | None = None

    async def __aenter__(self) -> "Checkpoints":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            await self.finish()
        except Exception as failure:  # whatever the backend or on_checkpoint raises
            if error is None:
                raise
            logger.error("the last checkpoint failed too: %s", failure)  # training's own error goes on from here

    async def save(self, step: int, metrics: dict[str, Any], extra: dict[str, Any]) -> None:
        """Start to save the state after `step`; waits for the save before."""
        await self.finish()
        self._pending = step, await self._backend.start_checkpoint(step, metrics, extra=extra)

    async def poll(self) -> None:
        """Report the save that has completed since the last call, if one has; raises what made it fail."""
        if self._pending is not None and self._pending[1].done():
            await self.finish()

    async def finish(self) -> None:
        """Wait for the save in flight and report it."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            await self._report(await future.result(), step)

    async def _report(self, path: Path, step: int) -> None:
        if self._on_checkpoint is not None and distributed.rank() == 0:
            await call(self._on_checkpoint, path, step)


def log_step(
    history: list[dict[str, float]], metrics_logger: MetricsLogger | None, step: int, metrics: dict[str, float]
) -> None:
    """Keep the metrics of `step`, and log them on rank 0."""
    history.append(metrics)
    if metrics_logger is not None and distributed.rank() == 0:
        metrics_logger.log(metrics, step=step)


async def finish_step(
    step: int,
    metrics: dict[str, Any],
    config: SFTTrainingConfig | RLTrainingConfig,
    checkpoints: Checkpoints,
    extra: Callable[[], dict[str, Any]],
    *,
    eval_fn: EvalFn | None,
    eval_every: int,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Evaluate, log and save after `step`, each where it is due; what was evaluated is added to `metrics`.

    A checkpoint holds its step's evaluation, so it comes last. Not so the stage's last one: it is complete before the
    evaluation begins, which may need more memory or time than there is, and all of the training would go with it.
    """
    last = step == config.num_steps
    if last:
        await checkpoints.save(step, metrics, extra=extra())
        await checkpoints.finish()
    try:
        if eval_fn is not None and due(step, eval_every, config.num_steps):
            metrics |= {f"eval_{key}": value for key, value in (await call(eval_fn, step) or {}).items()}
    finally:
        if due(step, config.log_every, config.num_steps):
            log(metrics)
    if not last and due(step, config.checkpoint_every, config.num_steps):
        await checkpoints.save(step, metrics, extra=extra())
    await checkpoints.poll()


def due(step: int, every: int, last: int) -> bool:
    """Whether something done each `every` steps (-1: only after the last) is done after `step`, counted from 1."""
    return step == last or (every > 0 and step % every == 0)


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns, awaited where it is async."""
    value = function(*arguments)
    return await value if inspect.isawaitable(value) else value


def check_resume(resume: Mapping[str, Any] | None, data: Mapping[str, Any]) -> int:
    """The step to continue after: 0 without `resume`, else what `load_checkpoint` returned, if the data is the same.

    `data` describes what the order of examples depends on. Raises ValueError naming each entry that changed.
    """
    if resume is None:
        return 0
    saved = resume["extra"].get("data")
    if saved is None:
        raise ValueError(f"the checkpoint of step {resume['step']} was not written by this loop: it has no data cursor")
    changed = [
        f"{key}={data[key]!r}, the checkpoint has {saved.get(key)!r}" for key in data if data[key] != saved.get(key)
    ]
    if changed:
        raise ValueError(
            f"cannot resume after step {resume['step']}: {'; '.join(changed)}. Resume with what the run began with, or "
            "start a new run from the checkpoint's weights."
        )
    return int(resume["step"])
