"""The reward function that the config names, with its time limit and processes."""

import contextlib
from collections.abc import Iterator

from rollouts.config import Config
from rollouts.training import distributed
from rollouts.training.rewards.scoring import scoring
from rollouts.training.types import RewardFn


@contextlib.contextmanager
def open_reward(config: Config) -> Iterator[RewardFn | None]:
    """Yield the reward function, on rank 0; None where an environment rewards, or nothing is sampled."""
    reward = config.rl.reward if config.rl is not None else None
    if distributed.rank() != 0 or not config.uses_engine or reward is None:
        yield None
        return
    with scoring(
        reward.fn, workers=reward.workers, timeout_s=config.limits.reward_timeout_s
    ) as reward_fn:
        yield reward_fn
