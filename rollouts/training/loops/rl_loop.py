"""Reinforcement learning: generate → score → advantage → loss → step → publish → log → checkpoint."""

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread

from rollouts.training import distributed
from rollouts.training.advantages import compute_advantages
from rollouts.training.backends.minimal import complete
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.loops.after_step import AfterStep, CheckpointFn, EvalFn, Hooks, call
from rollouts.training.loops.rollout_batch import BatchOptions, prepare_grpo_batch
from rollouts.training.loops.rollout_metrics import rollout_metrics
from rollouts.training.loops.sample_log import SampleLog, trainer_log_probs
from rollouts.training.loops.throughput import Throughput
from rollouts.training.loops.train_step import PrepareFn, check_steps, due, train_step
from rollouts.training.loops.value_step import add_value_advantages
from rollouts.training.metrics import MetricsLogger
from rollouts.training.rl_losses import ClipRange
from rollouts.training.rollout_gen.rollout_stream import open_rollouts
from rollouts.training.seams import (
    Batch,
    MinimalBackend,
    PromptSource,
    RolloutManager,
    RolloutSource,
    TrainingBackend,
)
from rollouts.training.types import RewardFn, RLTrainingConfig, RolloutBatch
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.training.weights.publish import WeightPublisher

__all__ = ["RLSteps", "compute_advantages", "prepare_grpo_batch", "run_rl", "run_rl_training"]


@dataclass(frozen=True)
class RLSteps:
    """The steps that the loop takes, and how rollouts become the batch of one."""

    config: RLTrainingConfig
    batches: BatchOptions = field(default_factory=BatchOptions)
    resume: Mapping[str, Any] | None = (
        None  # what `load_checkpoint` returned; the loop continues after its step
    )
    peak_flops: float | None = (
        None  # FLOP/s of one rank's device, for "mfu"; None: what the maker states for the card
    )


async def run_rl_training(
    backend: MinimalBackend,
    buffer: PromptSource | None,
    rollout_manager: RolloutManager | None,
    engines: EnginePool | Sequence[object],
    config: RLTrainingConfig,
    *,
    metrics_logger: MetricsLogger | None = None,
    reward_fn: RewardFn | None = None,
    weights_dir: Path | str | None = None,
    rollouts_logger: MetricsLogger | None = None,
    temperature: float = 1.0,
    clip_range: ClipRange | None = None,
    pad_token_id: int = 0,
    resume: Mapping[str, Any] | None = None,
    eval_fn: EvalFn | None = None,
    eval_every: int = -1,
    on_checkpoint: CheckpointFn | None = None,
    peak_flops: float | None = None,
    weight_sync: WeightPublisher | None = None,
) -> list[dict[str, float]]:
    """Train on what the engines sample and return one dict per logged step. Steps count from 1.

    To train on saved rollouts, without an engine: `replay.ReplayRollouts` as `rollout_manager`, no `buffer` (None), and
    `engines` []. Rank 0 alone generates, scores, logs and evaluates; the others get the prepared step from it and may
    pass None for `buffer`, `rollout_manager`, `engines` and the functions. The engines get the trainer's weights before
    the first step and every `config.sync_every` steps, and after the last; the version is the number of steps applied.
    The engines load these weights from `weights_dir` (default: `weights` beside the checkpoints); `weight_sync`, of
    `engines`, publishes them in another way, and the caller closes it.
    `temperature` is the sampler's; `clip_range` reaches losses that take one. `rollouts_logger` gets every sample.
    `resume`, `eval_fn`, `eval_every`, `on_checkpoint`, `peak_flops`: as in `run_sft_training`, `eval_fn` on rank 0
    only, and before the first step too (step 0): the engines then serve the weights that training starts from. Raises
    StepsError where no step is left.
    """
    batches = BatchOptions(pad_token_id, temperature, clip_range)
    steps = RLSteps(config, batches, resume, peak_flops)
    hooks = Hooks(metrics_logger, rollouts_logger, eval_fn, eval_every, on_checkpoint)
    _check(steps, hooks)
    whole = complete(backend)
    pool = EnginePool.of(engines)
    weights = weight_sync or WeightPublisher(whole, pool, DiskDelivery(whole, weights_dir))
    async with open_rollouts(
        rollout_manager, config, pool, buffer=buffer, reward_fn=reward_fn
    ) as rollouts:
        return await run_rl(whole, rollouts, weights, steps, hooks)


async def run_rl(
    backend: TrainingBackend,
    rollouts: RolloutSource | None,
    weights: WeightPublisher | None,
    steps: RLSteps,
    hooks: Hooks,
) -> list[dict[str, float]]:
    """Train on `rollouts` and return one dict per logged step: what `run_rl_training` does, of parts that are open.

    Rank 0 alone has `rollouts`, and every rank makes the call. `weights` None: no engine samples.
    """
    config = steps.config
    _check(steps, hooks)
    first = _restore(rollouts, steps.resume)
    hooks = hooks if distributed.rank() == 0 else replace(hooks, evaluate=None)
    async with _updating(rollouts, first):
        if weights is not None:
            await weights.publish(first)
        if hooks.evaluate is not None and first == 0:
            await call(hooks.evaluate, 0)
    estimate = _value_estimator(backend, config)
    throughput = Throughput.of_backend(backend, steps.peak_flops)
    state = partial(dict[str, Any]) if rollouts is None else rollouts.save_state
    async with AfterStep(backend, config, hooks, state) as after:
        for step in range(first + 1, config.num_steps + 1):
            clock = [time.monotonic()]
            found = None if rollouts is None else await rollouts.next_batch()
            batch, metrics = await _from_rank_0(
                None if found is None else _prepared(found, step, steps)
            )
            samples = SampleLog(hooks.log_samples, found, batch, step)
            clock.append(time.monotonic())
            publishes = due(step, config.sync_every, config.num_steps)
            if weights is not None:
                await weights.sleep(weights=publishes)
            metrics |= await _train(backend, samples, config, estimate)
            clock.append(time.monotonic())
            samples.write(await trainer_log_probs(backend, batch, config))
            clock.append(time.monotonic())
            if publishes:
                async with _updating(rollouts, step):
                    if weights is not None:
                        await weights.publish(step)
            elif weights is not None:
                await weights.wake()
            metrics["optimizer_steps"] = metrics["step"]
            metrics |= _speed(
                throughput, batch, [*clock, time.monotonic()], config.updates_per_batch
            )
            await after.finish(step, metrics)
            if after.stopped:
                break
    distributed.barrier()  # the other ranks wait for the last evaluation
    return after.history


async def _train(
    backend: TrainingBackend,
    samples: SampleLog,
    config: RLTrainingConfig,
    estimate: PrepareFn | None,
) -> dict[str, float]:
    """Take the updates of a step. The samples of one that fails are logged, as they are."""
    try:
        return await train_step(
            backend,
            samples.batch,
            config.micro_batch_size,
            config.micro_batch_tokens,
            prepare=estimate,
            updates=config.updates_per_batch,
        )
    except BaseException:
        samples.write()
        raise


def _check(steps: RLSteps, hooks: Hooks) -> None:
    config = steps.config
    check_steps(
        config.num_steps,
        int(steps.resume["step"]) if steps.resume else 0,
        updates_per_batch=config.updates_per_batch,
        micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        eval_every=hooks.eval_every,
        sync_every=config.sync_every,
    )


def _restore(rollouts: RolloutSource | None, resume: Mapping[str, Any] | None) -> int:
    """Return the step to continue after, with `rollouts` where they were then."""
    if resume is None:
        return 0
    if rollouts is not None:
        if not resume["extra"]:
            raise ValueError(
                f"the checkpoint of step {resume['step']} was not written by this loop: no data cursor"
            )
        rollouts.load_state(resume["extra"])
    return int(resume["step"])


def _updating(rollouts: RolloutSource | None, version: int) -> AbstractAsyncContextManager[None]:
    return nullcontext() if rollouts is None else rollouts.updating(version)


def _prepared(found: RolloutBatch, step: int, steps: RLSteps) -> tuple[Batch, dict[str, float]]:
    """Return the batch of a step, and the metrics of its rollouts."""
    options = steps.batches
    batch = prepare_grpo_batch(
        found,
        found.rewards,
        steps.config,
        pad_token_id=options.pad_token_id,
        temperature=options.temperature,
        clip_range=options.clip_range,
    )
    return batch, rollout_metrics(found, step - 1)


async def _from_rank_0(
    prepared: tuple[Batch, dict[str, float]] | None,
) -> tuple[Batch, dict[str, float]]:
    """Return rank 0's `prepared` on every rank. Waits in a thread: rank 0's event loop continues to generate."""
    if distributed.world_size() > 1:
        prepared = await anyio.to_thread.run_sync(distributed.broadcast_object, prepared)
    assert prepared is not None, "rank 0 has rollouts"
    return prepared


def _value_estimator(backend: TrainingBackend, config: RLTrainingConfig) -> PrepareFn | None:
    if config.baseline != "value":
        return None
    if config.advantage_norm not in ("none", "batch"):
        raise ValueError(
            f"advantage_norm={config.advantage_norm!r}: with baseline='value' it is 'none' or 'batch'"
        )
    return partial(
        add_value_advantages,
        backend,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        norm=config.advantage_norm,
    )


def _speed(
    throughput: Throughput, batch: Batch, clock: Sequence[float], updates: int
) -> dict[str, float]:
    """Return how long the parts of a step took, and the rates that follow. `clock`: its begin and the parts' ends."""
    generate_s, train_s, _, sync_s = (end - start for start, end in itertools.pairwise(clock))
    step_s = clock[-1] - clock[0]
    lengths = batch["attention_mask"].sum(1).tolist()
    rates = throughput.metrics(
        lengths, batch["tokens_global"], passes=updates, train_s=train_s, step_s=step_s
    )
    return {
        "generate_s": generate_s,
        "train_s": train_s,
        "sync_s": sync_s,
        "step_s": step_s,
        **rates,
    }
