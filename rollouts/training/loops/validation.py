"""Validation loss over held-out examples. Every example counts once: the last partial batch is kept."""

import math
from collections.abc import Sequence

from rollouts.training import distributed
from rollouts.training.backends.minimal import complete
from rollouts.training.evaluation import ALL_TASKS, by_task, task_of
from rollouts.training.loops.batching import blank_batch, collate
from rollouts.training.model_limits import require_fit
from rollouts.training.seams import TrainingBackend
from rollouts.training.types import Sample


async def validation_loss(
    backend: TrainingBackend,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    batches_max: int = -1,
    pad_token_id: int = 0,
) -> dict[str, float]:
    """Return {"loss", "tokens", "examples"}: the backend's loss, averaged over all trained tokens of `samples`.

    `batch_size` examples per rank and forward pass; at most `batches_max` batches over all ranks (-1: all). Every rank
    calls this with the same samples. Raises ValueError when there is nothing to evaluate.
    """
    chunks = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    chunks = chunks if batches_max == -1 else chunks[:batches_max]
    loss_sum, tokens, examples = 0.0, 0.0, 0
    own = chunks[distributed.rank() :: distributed.world_size()]
    backend = complete(backend)
    # all ranks run the same number of forward passes; an empty chunk runs a blank batch
    if backend.collective:
        own += [[]] * (math.ceil(len(chunks) / distributed.world_size()) - len(own))
    for chunk in own:
        rows = chunk or chunks[0]
        batch = collate(
            [s.tokens for s in rows], [s.loss_mask for s in rows], pad_token_id=pad_token_id
        )
        if backend.collective and not (chunk and batch["tokens_global"]):
            batch = blank_batch({**batch, "tokens_global": 1.0})
        if batch["tokens_global"]:
            result = await backend.forward(batch).result()
            loss_sum += result["loss"] * result["tokens"]
            tokens += result["tokens"]
        examples += len(chunk)
    loss_sum, tokens, examples_all = distributed.all_reduce_floats(
        [loss_sum, tokens, float(examples)]
    )
    if not tokens:
        raise ValueError(
            f"validation_loss: no trained token in {len(samples)} samples, batches_max={batches_max}"
        )
    return {"loss": loss_sum / tokens, "tokens": tokens, "examples": examples_all}


async def validation_losses(
    backend: TrainingBackend,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    batches_max: int = -1,
    pad_token_id: int = 0,
) -> dict[str, dict[str, float]]:
    """Return the `validation_loss` of each task, after "all", the mean over the tokens of every task.

    At most `batches_max` x `batch_size` samples are taken, from the front (-1: all). Every rank calls this with the
    same samples.
    """
    if batches_max != -1:
        samples = samples[: batches_max * batch_size]
    backend = complete(backend)
    require_fit(backend.model, samples)
    groups = by_task(samples, [task_of(sample) for sample in samples])
    whole = groups.pop(ALL_TASKS)
    options = {"batch_size": batch_size, "pad_token_id": pad_token_id}
    if not groups:
        return {ALL_TASKS: await validation_loss(backend, whole, **options)}
    losses = {
        task: await validation_loss(backend, of_task, **options) for task, of_task in groups.items()
    }
    tokens = sum(result["tokens"] for result in losses.values())
    loss = sum(result["loss"] * result["tokens"] for result in losses.values()) / tokens
    return {ALL_TASKS: {"loss": loss, "tokens": tokens, "examples": float(len(samples))}, **losses}
