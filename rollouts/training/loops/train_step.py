"""The steps of both loops: how many are left, what one of them trains on, and how often something is due."""

from collections.abc import Awaitable, Callable, Iterable, Iterator

from rollouts.training import distributed
from rollouts.training.loops.batching import split_batch
from rollouts.training.seams import Batch, TrainingBackend

PrepareFn = Callable[[list[Batch]], Awaitable[dict[str, float]]]


class StepsError(ValueError):
    """Steps or sizes that leave no work. The message has both numbers and the fix."""


def check_steps(num_steps: int, first: int = 0, **sizes: int | None) -> None:
    """Raise StepsError unless steps are left after `first`, and each of `sizes` that is not None is at least 1.

    Of those named "…_every" -1 is allowed too: only after the last step.
    """
    whole = {"num_steps": num_steps, **sizes}
    problems = [
        f"{name}={size!r}: needs a whole number"
        for name, size in whole.items()
        if type(size) in (bool, float)
    ]
    if problems:
        raise StepsError("; ".join(problems))
    last_alone = {
        name for name, size in sizes.items() if name.endswith("_every") and name != "sync_every"
    }
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
    """Take `updates` optimizer steps over a whole step's `batch`, the same on every rank; return loss and metrics.

    `prepare` gets this rank's micro-batches first, may add to them, and returns metrics. Of several updates "step" and
    "lr" are the last one's, the other numbers their means.
    """
    micro_batches = list(
        own_micro_batches(
            batch, micro_batch_size, micro_batch_tokens, equal_counts=backend.collective
        )
    )
    prepared = {} if prepare is None else await prepare(micro_batches)
    found = [await train_micro_batches(backend, micro_batches) for _ in range(updates)]
    if updates == 1:
        return found[0] | prepared
    means = {key: sum(metrics[key] for metrics in found) / updates for key in found[-1]}
    return {**means, "step": found[-1]["step"], "lr": found[-1]["lr"], **prepared}


def own_micro_batches(
    batch: Batch,
    micro_batch_size: int | None,
    micro_batch_tokens: int | None,
    *,
    equal_counts: bool,
) -> Iterator[Batch]:
    """Return this process's share of a step's `batch`: see `split_batch`."""
    return split_batch(
        batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        equal_counts=equal_counts,
    )


async def train_micro_batches(
    backend: TrainingBackend, micro_batches: Iterable[Batch]
) -> dict[str, float]:
    """Take one optimizer step over this process's share of it; return its loss and the backend's metrics."""
    micro_batches = list(micro_batches)
    backend.expect(len(micro_batches))
    pending = [backend.forward_backward(micro_batch) for micro_batch in micro_batches]
    update = backend.optim_step()
    # the first that failed says why
    losses = [(await future.result()).get("loss", 0.0) for future in pending]
    return {"loss": sum(losses), **await update.result()}


def due(step: int, every: int, last: int) -> bool:
    """Return whether an action of each `every` steps (-1: only after the last) is due after `step`, from 1."""
    return step == last or (every > 0 and step % every == 0)
