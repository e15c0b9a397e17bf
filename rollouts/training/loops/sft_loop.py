"""Supervised fine-tuning: batch → forward and backward → step → log → evaluate → checkpoint."""

import hashlib
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rollouts.training.backends.minimal import complete
from rollouts.training.loops.after_step import AfterStep, CheckpointFn, EvalFn, Hooks
from rollouts.training.loops.batching import collate, step_indices
from rollouts.training.loops.prefetch import prefetch
from rollouts.training.loops.throughput import Throughput
from rollouts.training.loops.train_step import check_steps, own_micro_batches, train_micro_batches
from rollouts.training.metrics import MetricsLogger
from rollouts.training.model_limits import require_fit
from rollouts.training.seams import Batch, MinimalBackend, TrainingBackend
from rollouts.training.types import Sample, SFTTrainingConfig

PREFETCH_STEPS = (
    2  # batches ready beyond the one that trains: preparing one is far shorter than training on it
)


@dataclass(frozen=True)
class SFTSteps:
    """The steps that the loop takes, and the order of the examples."""

    config: SFTTrainingConfig
    seed: int | None = 0  # of every epoch's order; None: the samples' own
    pad_token_id: int = 0
    resume: Mapping[str, Any] | None = (
        None  # what `load_checkpoint` returned; the loop continues after its step
    )
    peak_flops: float | None = (
        None  # FLOP/s of one rank's device, for "mfu"; None: what the maker states for the card
    )


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
    `resume`: what `backend.load_checkpoint` returned; training continues after its step, up to `config.num_steps`.
    `eval_fn(step)`, plain or async, runs on every rank each `eval_every` steps and after the last; the floats it
    returns are logged as "eval_…". A checkpoint is saved each `config.checkpoint_every` steps and after the last, while
    training goes on; once it is complete, `on_checkpoint(path, step)` is called on rank 0, as `metrics_logger` is. The
    caller finishes the logger.

    The keys of each dict: docs/reference/metrics.md. `peak_flops` is the FLOP/s of one rank's device, for "mfu"; None:
    what the maker states for the card.

    Raises ValueError for an example with nothing to train on, or that the model has no room for (a token id beyond its
    embeddings, more tokens than learned positions), for data that is not what `resume` was saved with, and where no
    step is left.
    """
    steps = SFTSteps(config, seed, pad_token_id, resume, peak_flops)
    hooks = Hooks(
        log=metrics_logger, evaluate=eval_fn, eval_every=eval_every, on_checkpoint=on_checkpoint
    )
    return await run_sft(complete(backend), samples, steps, hooks)


async def run_sft(
    backend: TrainingBackend, samples: Sequence[Sample], steps: SFTSteps, hooks: Hooks
) -> list[dict[str, float]]:
    """Train on `samples` and return one dict per logged step: see `run_sft_training`."""
    config = steps.config
    _check(steps, hooks)
    _check_samples(samples)
    require_fit(backend.model, samples)
    data = {
        "fingerprint": _fingerprint(samples),
        "seed": steps.seed,
        "batch_size": config.batch_size,
    }
    throughput = Throughput.of_backend(backend, steps.peak_flops)
    left = range(_check_resume(steps.resume, data) + 1, config.num_steps + 1)
    prefetched = prefetch(
        partial(_prepare_step, samples, steps, backend.collective), left, depth=PREFETCH_STEPS
    )
    async with (
        AfterStep(backend, config, hooks, lambda: {"data": data}) as after,
        prefetched as prepared,
    ):
        started = time.monotonic()
        async for step, batch in prepared:
            data_s = time.monotonic() - started
            metrics = await train_micro_batches(backend, batch.micro_batches)
            step_s = time.monotonic() - started
            metrics |= {"data_s": data_s, "train_s": step_s - data_s, "step_s": step_s}
            metrics |= throughput.metrics(
                batch.lengths, batch.trained_tokens, train_s=step_s - data_s, step_s=step_s
            )
            await after.finish(step, metrics)
            if after.stopped:
                break
            # waiting for the next batch counts; evaluation and saving do not
            started = time.monotonic()
    return after.history


@dataclass(frozen=True)
class _Step:
    micro_batches: list[Batch]  # this rank's
    trained_tokens: float  # on all ranks, as are `lengths`
    lengths: list[int]  # tokens of each example


def _prepare_step(samples: Sequence[Sample], steps: SFTSteps, collective: bool, step: int) -> _Step:
    """Return what step `step` (from 1) trains on: a function of the arguments and this process's rank."""
    config = steps.config
    chosen = [
        samples[index]
        for index in step_indices(len(samples), config.batch_size, step - 1, steps.seed)
    ]
    batch = collate(
        [s.tokens for s in chosen], [s.loss_mask for s in chosen], pad_token_id=steps.pad_token_id
    )
    sizes = config.micro_batch_size, config.micro_batch_tokens
    micro_batches = list(own_micro_batches(batch, *sizes, equal_counts=collective))
    return _Step(micro_batches, batch["tokens_global"], [len(sample.tokens) for sample in chosen])


def _check(steps: SFTSteps, hooks: Hooks) -> None:
    config = steps.config
    check_steps(
        config.num_steps,
        int(steps.resume["step"]) if steps.resume else 0,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        eval_every=hooks.eval_every,
    )


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
    """Return a digest that changes when any token, mask or the order of the samples does."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(array("q", [len(sample.tokens), *sample.tokens]).tobytes())
        digest.update(array("d", sample.loss_mask).tobytes())
    return digest.hexdigest()


def _check_resume(resume: Mapping[str, Any] | None, data: Mapping[str, Any]) -> int:
    """Return the step to continue after: 0 without `resume`, else the checkpoint's, if the data is the same.

    The order of examples depends on what `data` describes. Raises ValueError naming each entry that changed.
    """
    if resume is None:
        return 0
    saved = resume["extra"].get("data")
    if saved is None:
        raise ValueError(
            f"the checkpoint of step {resume['step']} was not written by this loop: it has no data cursor"
        )
    changed = [
        f"{key}={data[key]!r}, the checkpoint has {saved.get(key)!r}"
        for key in data
        if data[key] != saved.get(key)
    ]
    if changed:
        raise ValueError(
            f"cannot resume after step {resume['step']}: {'; '.join(changed)}. Resume with what the run began with, or "
            "start a new run from the checkpoint's weights."
        )
    return int(resume["step"])
