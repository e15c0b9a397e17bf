"""Supervised fine-tuning: batch → forward and backward → step → log → evaluate → checkpoint."""

import hashlib
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from rollouts.training import distributed
from rollouts.training.backends.protocol import TrainingBackend
from rollouts.training.loops.batching import collate, step_indices
from rollouts.training.loops.common import CheckpointFn, EvalFn, call, check_resume, due, train_step
from rollouts.training.loops.throughput import Throughput
from rollouts.training.metrics import MetricsLogger
from rollouts.training.types import Sample, SFTTrainingConfig


async def run_sft_training(
    backend: TrainingBackend,
    samples: Sequence[Sample],
    config: SFTTrainingConfig,
    metrics_logger: MetricsLogger | None = None,
    *,
    seed: int = 0,
    pad_token_id: int = 0,
    resume: Mapping[str, Any] | None = None,
    eval_fn: EvalFn | None = None,
    eval_every: int = -1,
    on_checkpoint: CheckpointFn | None = None,
    peak_flops: float | None = None,
) -> list[dict[str, float]]:
    """Train on `samples` and return one dict per logged step. Steps count from 1; every rank makes the same call.

    The order is a pure function of (`seed`, epoch); each step takes the next `config.batch_size` examples, going on
    into the next epoch, and its result depends neither on the ranks nor on how micro-batches are cut.
    `resume`: what `backend.load_checkpoint` returned; training goes on after its step, up to `config.num_steps`.
    `eval_fn(step)`, plain or async, runs on every rank each `eval_every` steps and after the last; the floats it
    returns are logged as "eval_…". A checkpoint is written each `config.checkpoint_every` steps and after the last;
    `on_checkpoint(path, step)` is then called on rank 0, as `metrics_logger` is. The caller finishes the logger.

    What is in each dict: docs/metrics.md. `peak_flops` is the FLOP/s of one rank's device, for "mfu"; None: what the
    maker states for the card.

    Raises ValueError for an example with nothing to train on, or data that is not what `resume` was saved with.
    """
    _check_samples(samples)
    data = {"fingerprint": _fingerprint(samples), "seed": seed, "batch_size": config.batch_size}
    throughput = Throughput.of(backend, peak_flops)
    history = []
    for step in range(check_resume(resume, data) + 1, config.num_steps + 1):
        started = time.monotonic()
        chosen = [samples[index] for index in step_indices(len(samples), config.batch_size, step - 1, seed)]
        batch = collate([s.tokens for s in chosen], [s.loss_mask for s in chosen], pad_token_id=pad_token_id)
        data_s = time.monotonic() - started
        metrics = await train_step(backend, batch, config.micro_batch_size, config.micro_batch_tokens)
        step_s = time.monotonic() - started
        lengths = [len(sample.tokens) for sample in chosen]
        metrics |= {"data_s": data_s, "train_s": step_s - data_s, "step_s": step_s}
        metrics |= throughput.metrics(lengths, batch["tokens_global"], train_s=step_s - data_s, step_s=step_s)
        if eval_fn is not None and due(step, eval_every, config.num_steps):
            metrics |= {f"eval_{key}": value for key, value in (await call(eval_fn, step) or {}).items()}
        if due(step, config.log_every, config.num_steps):
            history.append(metrics)
            if metrics_logger is not None and distributed.rank() == 0:
                metrics_logger.log(metrics, step=step)
        if due(step, config.checkpoint_every, config.num_steps):
            path = await backend.save_checkpoint(step, metrics, extra={"data": data})
            if on_checkpoint is not None and distributed.rank() == 0:
                await call(on_checkpoint, path, step)
    return history


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
