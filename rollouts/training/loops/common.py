"""What both loops do at every step: run it on the backend, decide what is due, call the caller's functions."""

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rollouts.training import distributed
from rollouts.training.backends.protocol import TrainingBackend
from rollouts.training.loops.batching import split_batch

EvalFn = Callable[[int], Mapping[str, float] | Awaitable[Mapping[str, float] | None] | None]
PrepareFn = Callable[[list[dict[str, Any]]], Awaitable[dict[str, float]]]
CheckpointFn = Callable[[Path, int], Awaitable[None] | None]


async def train_step(
    backend: TrainingBackend,
    batch: dict[str, Any],
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
    micro_batches = list(own_micro_batches(batch, micro_batch_size, micro_batch_tokens))
    prepared = {} if prepare is None else await prepare(micro_batches)
    found = [await train_micro_batches(backend, micro_batches) for _ in range(updates)]
    if updates == 1:
        return found[0] | prepared
    means = {key: sum(metrics[key] for metrics in found) / updates for key in found[-1]}
    return {**means, "step": found[-1]["step"], "lr": found[-1]["lr"], **prepared}


def own_micro_batches(
    batch: dict[str, Any], micro_batch_size: int | None, micro_batch_tokens: int | None
) -> Iterator[dict[str, Any]]:
    """This process's share of a step's `batch`: see `split_batch`."""
    return split_batch(
        batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
    )


async def train_micro_batches(backend: TrainingBackend, micro_batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """One optimizer step over this process's share of it: its loss and the backend's metrics."""
    pending = [backend.forward_backward(micro_batch) for micro_batch in micro_batches]
    update = backend.optim_step()
    losses = [(await future.result())["loss"] for future in pending]
    return {"loss": sum(losses), **await update.result()}


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
