"""Rollouts without training: generate → score → write, to look at or to train on later (`replay`)."""

import time

from rollouts.training.loops.after_step import EvalFn, call
from rollouts.training.loops.rollout_metrics import log_samples, rollout_metrics
from rollouts.training.loops.train_step import check_steps
from rollouts.training.metrics import MetricsLogger
from rollouts.training.seams import RolloutManager
from rollouts.training.types import RewardFn


async def collect_rollouts(
    rollout_manager: RolloutManager,
    num_steps: int,
    rollouts_logger: MetricsLogger,
    *,
    temperature: float = 1.0,
    reward_fn: RewardFn | None = None,
    metrics_logger: MetricsLogger | None = None,
    eval_fn: EvalFn | None = None,
) -> list[dict[str, float]]:
    """Write `num_steps` batches of `rollout_manager` to `rollouts_logger`; return one dict of metrics for each.

    `temperature` is the one that the manager samples at. The engines serve what they serve: nothing is trained and no
    weights are published. `eval_fn(0)` is called first. One process calls this, not every rank of a trainer. The caller
    finishes the loggers.
    """
    check_steps(num_steps)
    if eval_fn is not None:
        await call(eval_fn, 0)
    history = []
    for step in range(1, num_steps + 1):
        started = time.monotonic()
        rollouts = await rollout_manager.generate_batch(reward_fn=reward_fn)
        elapsed = time.monotonic() - started
        log_samples(rollouts_logger, rollouts, None, step, temperature)
        metrics = rollout_metrics(rollouts, None)
        tokens_per_s = sum(map(len, rollouts.tokens)) / elapsed
        metrics |= {"generate_s": elapsed, "step_s": elapsed, "tokens_per_s": tokens_per_s}
        history.append(metrics)
        if metrics_logger is not None:
            metrics_logger.log(metrics, step=step)
    return history
