"""Reinforcement learning: generate → score → advantage → loss → step → sync → log → checkpoint."""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch

from rollouts.training import distributed
from rollouts.training.advantages import compute_advantages, has_contrast, mean, standard_deviation
from rollouts.training.backends.minimal import complete
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.loops.batching import collate, pad
from rollouts.training.loops.common import (
    CheckpointFn,
    Checkpoints,
    EvalFn,
    PrepareFn,
    call,
    check_steps,
    due,
    finish_step,
    log_step,
    train_step,
)
from rollouts.training.loops.throughput import Throughput
from rollouts.training.loops.value_step import add_value_advantages
from rollouts.training.metrics import MetricsLogger
from rollouts.training.replay import sample_records
from rollouts.training.rewards.common import RewardError
from rollouts.training.rl_losses import ClipRange, trained_sequences
from rollouts.training.rollout_gen.rollout_stream import open_stream
from rollouts.training.seams import Batch, MinimalBackend, TrainingBackend
from rollouts.training.types import RewardFn, RLTrainingConfig, RolloutBatch, Sample
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.training.weights.publish import WeightPublisher

REWARD_MAX = 1e30  # sums and squares of a step's advantages stay within float32's range of 3e38


async def run_rl_training(
    backend: MinimalBackend,
    buffer: Any,
    rollout_manager: Any,
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
    `weights_dir` is where these weights stand for the engines to load (default: `weights` beside the checkpoints), or
    `weight_sync`, of `engines`, says how they get there; the caller closes it.
    `temperature` is the sampler's; `clip_range` reaches losses that take one. `rollouts_logger` gets every sample.
    `resume`, `eval_fn`, `eval_every`, `on_checkpoint`, `peak_flops`: as in `run_sft_training`, `eval_fn` on rank 0
    only, and before the first step too (step 0): the engines then serve the weights that training starts from. Raises
    StepsError where no step is left.
    """
    sizes = {"micro_batch_size": config.micro_batch_size, "micro_batch_tokens": config.micro_batch_tokens}
    steps_done = int(resume["step"]) if resume else 0
    sizes |= {"log_every": config.log_every, "checkpoint_every": config.checkpoint_every, "eval_every": eval_every}
    sizes |= {"sync_every": config.sync_every}
    check_steps(config.num_steps, steps_done, updates_per_batch=config.updates_per_batch, **sizes)
    backend = complete(backend)
    first = _restore(buffer, rollout_manager, resume)
    pool = EnginePool.of(engines)
    weights = weight_sync or WeightPublisher(backend, pool, DiskDelivery(backend, weights_dir))
    await weights.publish(first)
    if eval_fn is not None and first == 0 and distributed.rank() == 0:
        await call(eval_fn, 0)
    options: dict[str, Any] = {"pad_token_id": pad_token_id, "temperature": temperature, "clip_range": clip_range}
    estimate = _value_estimator(backend, config)
    throughput = Throughput.of(backend, peak_flops)
    history: list[dict[str, float]] = []
    stream = open_stream(rollout_manager, reward_fn, pool, first, config)
    async with Checkpoints(backend, on_checkpoint) as checkpoints, stream as rollouts:
        for step in range(first + 1, config.num_steps + 1):
            clock = [time.monotonic()]
            prepared = None
            if distributed.rank() == 0:
                prepared = _prepare(await rollouts.next_batch(), step, config, rollouts_logger, options)
            batch, metrics = await _from_rank_0(prepared)
            clock.append(time.monotonic())
            sync_follows = due(step, config.sync_every, config.num_steps)
            await weights.sleep(weights=sync_follows)
            metrics |= await train_step(
                backend,
                batch,
                config.micro_batch_size,
                config.micro_batch_tokens,
                prepare=estimate,
                updates=config.updates_per_batch,
            )
            clock.append(time.monotonic())
            if sync_follows:
                async with rollouts.updating(step):
                    await weights.publish(step)
            else:
                await weights.wake()
            times = _times([*clock, time.monotonic()])
            lengths = batch["attention_mask"].sum(1).tolist()
            seconds = {key: times[key] for key in ("train_s", "step_s")}
            metrics["optimizer_steps"] = metrics["step"]
            metrics |= times | throughput.metrics(
                lengths, batch["tokens_global"], passes=config.updates_per_batch, **seconds
            )
            await finish_step(
                step,
                metrics,
                config,
                checkpoints,
                partial(_state, buffer, rollout_manager),
                eval_fn=eval_fn if distributed.rank() == 0 else None,
                eval_every=eval_every,
                log=partial(log_step, history, metrics_logger, step),
            )
    distributed.barrier()  # the other ranks wait for the last evaluation
    return history


def _prepare(
    rollouts: RolloutBatch,
    step: int,
    config: RLTrainingConfig,
    logger: MetricsLogger | None,
    options: Mapping[str, Any],
) -> tuple[Batch, dict[str, float]]:
    """The batch of a step, and the metrics of its rollouts; the samples are logged."""
    batch = prepare_grpo_batch(rollouts, rollouts.rewards, config, **options)
    if logger is not None:
        advantages = batch["advantages"].tolist() if "advantages" in batch else None
        log_samples(logger, rollouts, advantages, step, options["temperature"])
    return batch, rollout_metrics(rollouts, step - 1)


async def _from_rank_0(prepared: Any) -> Any:
    """`prepared` of rank 0 on every rank. Waits in a thread: rank 0's event loop goes on with what is generated."""
    if distributed.world_size() == 1:
        return prepared
    return await anyio.to_thread.run_sync(distributed.broadcast_object, prepared)


def prepare_grpo_batch(
    batch: RolloutBatch,
    rewards: Sequence[float],
    config: RLTrainingConfig,
    *,
    pad_token_id: int = 0,
    temperature: float = 1.0,
    clip_range: ClipRange | None = None,
) -> Batch:
    """The whole step's batch for a backend: `collate`'s, "sequences_global", "advantages" [B], "temperature", and where
    they are known "old_log_probs" [B, T], the sampler's, aligned to tokens (0 outside the response), and "clip_range".
    With baseline "value" it has "rewards" [B] in place of advantages, which take the value head's estimates.

    Raises ValueError when the parts of `batch` do not fit each other, or nothing in it is trained on.
    """
    counts = {"tokens": len(batch.tokens), "loss_masks": len(batch.loss_masks), "rewards": len(rewards)}
    if len(set(counts.values())) != 1 or not batch.tokens:
        raise ValueError(f"rollout batch: needs one of each per sample, and at least one; it has {counts}")
    prepared = collate(batch.tokens, batch.loss_masks, pad_token_id=pad_token_id)
    if not prepared["tokens_global"]:
        raise ValueError(f"rollout batch: no trained token in {len(batch.tokens)} samples: were all responses empty?")
    _check_rewards(rewards, batch.samples)
    prepared["temperature"] = temperature
    prepared |= _scores(rewards, batch.group_ids or None, config)
    prepared["sequences_global"] = trained_sequences(prepared["loss_mask"])
    known = [sample.rollout_log_probs is not None for sample in batch.samples]
    if any(known):
        if not all(known) or len(known) != len(batch.tokens):
            raise ValueError(f"rollout batch: {sum(known)} of {len(batch.tokens)} samples have rollout_log_probs")
        prepared["old_log_probs"] = _aligned_log_probs(batch.samples, prepared["input_ids"].shape[1])
    if clip_range is not None:
        prepared["clip_range"] = clip_range
    return prepared


def _check_rewards(rewards: Sequence[float], samples: Sequence[Sample]) -> None:
    """Raises RewardError naming the prompt of a reward that float32, in which losses are computed, cannot hold."""
    for place, reward in enumerate(rewards):
        if not abs(reward) <= REWARD_MAX:  # NaN is not either
            sample = samples[place] if place < len(samples) else Sample(prompt=f"of sample {place}")
            raise RewardError(
                f"reward {reward} of {sample.response[:80]!r}: needs a magnitude of {REWARD_MAX:g} at most (prompt "
                f"{str(sample.prompt)[:200]})"
            )


def _scores(rewards: Sequence[float], group_ids: Sequence[int] | None, config: RLTrainingConfig) -> Batch:
    if config.baseline == "value":
        return {"rewards": torch.tensor(rewards, dtype=torch.float32)}
    advantages = compute_advantages(rewards, config.baseline, group_ids=group_ids, norm=config.advantage_norm)
    return {"advantages": torch.tensor(advantages, dtype=torch.float32)}


def _value_estimator(backend: TrainingBackend, config: RLTrainingConfig) -> PrepareFn | None:
    if config.baseline != "value":
        return None
    if config.advantage_norm not in ("none", "batch"):
        raise ValueError(f"advantage_norm={config.advantage_norm!r}: with baseline='value' it is 'none' or 'batch'")
    return partial(
        add_value_advantages,
        backend,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        norm=config.advantage_norm,
    )


def rollout_metrics(batch: RolloutBatch, steps_applied: int | None) -> dict[str, float]:
    """What a step's rollouts were like; "lag_mean" and "lag_max": how many optimizer steps old the oldest weights were
    that sampled a token of them, where `steps_applied` have been taken by now (None: nothing is trained, and there is
    no lag); "partial_frac": the share of samples that more than one version sampled.

    The numbers of `batch.metadata` (groups started, kept, dropped) come along under their own names, counts by filter
    as `<key>_<filter>` beside their sum.
    """
    metrics: dict[str, float] = {
        "groups_zero_std_frac": _zero_std_frac(batch),  # of what was kept, where the batch does not know of all
        "reward_mean": mean(batch.rewards),
        "reward_std": standard_deviation(batch.rewards, ddof=0),
        "response_length_mean": statistics.fmean(batch.response_lengths),
    }
    reasons = [sample.metadata.get("finish_reason") for sample in batch.samples]
    if reasons:
        metrics["truncated_frac"] = sum(map(_is_length, reasons)) / len(reasons)
    oldest = [version for version in map(_oldest_version, batch.samples) if version is not None]
    if oldest and steps_applied is not None:
        metrics |= {"lag_mean": steps_applied - statistics.fmean(oldest), "lag_max": steps_applied - min(oldest)}
        metrics["partial_frac"] = sum("weight_versions" in sample.metadata for sample in batch.samples) / len(oldest)
    for key, value in batch.metadata.items():
        if isinstance(value, Mapping):  # groups_dropped: by filter, and their sum
            metrics |= {key: sum(value.values()), **{f"{key}_{name}": count for name, count in value.items()}}
        elif isinstance(value, (int, float)):
            metrics[key] = value
    return metrics


def _zero_std_frac(batch: RolloutBatch) -> float:
    groups: dict[int, list[float]] = {}
    for group, reward in zip(batch.group_ids or [0] * len(batch.rewards), batch.rewards, strict=True):
        groups.setdefault(group, []).append(reward)
    return sum(not has_contrast(rewards) for rewards in groups.values()) / len(groups)


def _oldest_version(sample: Sample) -> int | None:
    """Steps that the first weights which sampled a token of it were trained for; None for another kind of name."""
    spans = sample.metadata.get("weight_versions")
    version = spans[0]["version"] if spans else sample.metadata.get("weight_version")
    return int(version) if version is not None and str(version).isdigit() else None


def _aligned_log_probs(samples: Sequence[Sample], width: int) -> torch.Tensor:
    rows = [[0.0] * (len(s.tokens) - s.response_length) + list(s.rollout_log_probs or ()) for s in samples]
    return pad(rows, width, 0.0, torch.float32)


def _is_length(reason: Any) -> bool:
    return reason == "length" or (isinstance(reason, Mapping) and reason.get("type") == "length")


def _times(clock: Sequence[float]) -> dict[str, float]:
    generate_s, train_s, sync_s = (end - start for start, end in itertools.pairwise(clock))
    return {"generate_s": generate_s, "train_s": train_s, "sync_s": sync_s, "step_s": clock[-1] - clock[0]}


def log_samples(
    logger: MetricsLogger, batch: RolloutBatch, advantages: Sequence[float] | None, step: int, temperature: float
) -> None:
    """Every sample of a step with what training on it again would need."""
    for record in sample_records(batch, advantages, temperature):
        logger.log(record, step=step)


def _state(buffer: Any, rollout_manager: Any) -> dict[str, Any]:
    """Where the prompts and the rollouts stand; a replay has no buffer."""
    if distributed.rank() != 0:
        return {}
    parts = {"buffer": buffer, "rollout_manager": rollout_manager}
    state = {name: part.save_state() for name, part in parts.items() if hasattr(part, "save_state")}
    if "buffer" in state.get("rollout_manager", {}):  # which may have taken prompts ahead that are to come again
        state["buffer"] = state["rollout_manager"]["buffer"]
    return state


def _restore(buffer: Any, rollout_manager: Any, resume: Mapping[str, Any] | None) -> int:
    if resume is None:
        return 0
    state = resume["extra"]
    if not {"buffer", "rollout_manager"} & set(state):
        raise ValueError(f"the checkpoint of step {resume['step']} was not written by this loop: it has no data cursor")
    for name, part in (("buffer", buffer), ("rollout_manager", rollout_manager)):
        if hasattr(part, "load_state"):
            if name not in state:
                raise ValueError(
                    f"the checkpoint of step {resume['step']} has no state of a {name}: it was saved by a run that "
                    "sampled otherwise (from an engine, or from saved rollouts). Resume as that run began."
                )
            part.load_state(state[name])
    return int(resume["step"])
