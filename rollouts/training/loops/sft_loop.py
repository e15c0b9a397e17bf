"""Supervised fine-tuning: batch → forward and backward → step → log → evaluate → checkpoint."""

import hashlib
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rollouts.training.backends.minimal import complete
from rollouts.training.loops.batching import collate, step_indices
from rollouts.training.loops.common import (
    CheckpointFn,
    Checkpoints,
    EvalFn,
    check_resume,
    check_steps,
    finish_step,
    log_step,
    own_micro_batches,
    train_micro_batches,
)
from rollouts.training.loops.prefetch import prefetch
from rollouts.training.loops.throughput import Throughput
from rollouts.training.metrics import MetricsLogger
from rollouts.training.model_limits import require_fit
from rollouts.training.seams import Batch, MinimalBackend
from rollouts.training.types import Sample, SFTTrainingConfig

PREFETCH_STEPS = 2  # batches ready beyond the one that trains: preparing one is far shorter than training on it


async def run_sft_training(
    backend: MinimalBackend,
    samples: Sequence[Sample],
    config: SFTTrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    seed: int | None = 0,
    pad_token_id: int = 0,
    resume: Mapping[str, Any] | None = None,
    eval_fn: EvalFn | None = None,
    eval_every: int = -1,
    on_checkpoint: CheckpointFn | None = None,
    peak_flops: float | None = None,
) -> list[dict[str, float]]:
    """Train on `samples` and return one dict per logged step. Steps count from 1; every rank makes the same call.

    The order is a pure function of (`seed`, epoch), or with seed None the samples' own; each step takes the next
    `config.batch_size` examples, going on into the next epoch, and its result depends neither on the ranks nor on how
    micro-batches are cut.
    `resume`: what `backend.load_checkpoint` returned; training goes on after its step, up to `config.num_steps`.
    `eval_fn(step)`, plain or async, runs on every rank each `eval_every` steps and after the last; the floats it
    returns are logged as "eval_…". A checkpoint is saved each `config.checkpoint_every` steps and after the last, while
    training goes on; once it is complete, `on_checkpoint(path, step)` is called on rank 0, as `metrics_logger` is. The
    caller finishes the logger.

    What is in each dict: docs/metrics.md. `peak_flops` is the FLOP/s of one rank's device, for "mfu"; None: what the
    maker states for the card.

    Raises ValueError for an example with nothing to train on, or that the model has no room for (a token id beyond its
    embeddings, more tokens than learned positions), for data that is not what `resume` was saved with, and where no
    step is left.
    """
    sizes = {"micro_batch_size": config.micro_batch_size, "micro_batch_tokens": config.micro_batch_tokens}
    sizes |= {"log_every": config.log_every, "checkpoint_every": config.checkpoint_every, "eval_every": eval_every}
    check_steps(config.num_steps, int(resume["step"]) if resume else 0, batch_size=config.batch_size, **sizes)
    _check_samples(samples)
    backend = complete(backend)
    require_fit(backend.model, samples)
    data = {"fingerprint": _fingerprint(samples), "seed": seed, "batch_size": config.batch_size}
    throughput = Throughput.of(backend, peak_flops)
    steps = range(check_resume(resume, data) + 1, config.num_steps + 1)
    prepare = partial(_prepare_step, samples, config, seed, pad_token_id, backend.collective)
    history: list[dict[str, float]] = []
    prefetched = prefetch(prepare, steps, depth=PREFETCH_STEPS)
    async with Checkpoints(backend, on_checkpoint) as checkpoints, prefetched as prepared:
        started = time.monotonic()
        async for step, batch in prepared:
            data_s = time.monotonic() - started
            metrics = await train_micro_batches(backend, batch.micro_batches)
            step_s = time.monotonic() - started
            metrics |= {"data_s": data_s, "train_s": step_s - data_s, "step_s": step_s}
            metrics |= throughput.metrics(batch.lengths, batch.trained_tokens, train_s=step_s - data_s, step_s=step_s)
            await finish_step(
                step,
                metrics,
                config,
                checkpoints,
                lambda: {"data": data},
                eval_fn=eval_fn,
                eval_every=eval_every,
                log=partial(log_step, history, metrics_logger, step),
            )
            started = time.monotonic()  # waiting for the next batch counts, what came after this step does not
    return history


@dataclass(frozen=True)
class _Step:
    micro_batches: list[Batch]  # this rank's
    trained_tokens: float  # on all ranks, as are `lengths`
    lengths: list[int]  # tokens of each example


def _prepare_step(  # noqa: PLR0917 — the last alone varies
    samples: Sequence[Sample],
    config: SFTTrainingConfig,
    seed: int | None,
    pad_token_id: int,
    collective: bool,
    step: int,
) -> _Step:
    """What step `step` (from 1) trains on: a function of its arguments and this process's rank."""
    chosen = [samples[index] for index in step_indices(len(samples), config.batch_size, step - 1, seed)]
    batch = collate([s.tokens for s in chosen], [s.loss_mask for s in chosen], pad_token_id=pad_token_id)
    sizes = config.micro_batch_size, config.micro_batch_tokens
    micro_batches = list(own_micro_batches(batch, *sizes, equal_counts=collective))
    return _Step(micro_batches, batch["tokens_global"], [len(sample.tokens) for sample in chosen])


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("run_sft_training: samples is empty, needs at least one")
    for index, sample in enumerate(samples):
        if not any(sample.loss_mask[1:]):
            raise ValueError(
                f"samples[{index}] has no trained token after position 0 ({len(sample.tokens)} tokens, prompt "
                f"{str(sample.prompt)[:80]!r}): its loss_mask is all 0; check the template, or leave the example out"
            )


def _fingerprint(samples: Sequence[Sample]) -> str:
    """Changes when any token, mask or the order of the samples does."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(array("q", [len(sample.tokens), *sample.tokens]).tobytes())
        digest.update(array("d", sample.loss_mask).tobytes())
    return digest.hexdigest()
