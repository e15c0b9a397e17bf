"""The work on one group: generate its samples, score them, filter it. Calls the user's functions, plain or async."""

import hashlib
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from rollouts.training.rewards.reward_fn import finite_or_none
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.rollout_gen.group_queue import UNSCORABLE, Group, RolloutError
from rollouts.training.types import (
    REWARD_FAILURE,
    FilterFn,
    Prompt,
    RewardFn,
    RolloutConfig,
    Sample,
)
from rollouts.training.user_code import USER_ERRORS, describe


def start_generating(config: RolloutConfig, prompt: Prompt, number: int) -> Any:
    """Call `generate_fn` for the group with this number, and return what it returns: samples, or what to await."""
    assert config.generate_fn is not None, "the manager has checked its config"
    extra = {"seed": group_seed(config.seed, number)} if _takes_seed(config.generate_fn) else {}
    return config.generate_fn([prompt] * config.n_samples_per_prompt, **extra)


def checked_group(config: RolloutConfig, group: Any) -> Group:
    """Return the samples that `generate_fn` made. Raises ValueError for anything else, or too few or many."""
    wanted = config.n_samples_per_prompt
    if not isinstance(group, list) or not all(isinstance(sample, Sample) for sample in group):
        raise ValueError(f"generate_fn returned {type(group).__name__}; needs a list of Sample")
    if len(group) != wanted:
        raise ValueError(
            f"generate_fn returned {len(group)} samples for {wanted} prompts; needs one for each"
        )
    return group


def group_seed(seed: int, group_number: int) -> int:
    """Return 31 bits: a function of the run's seed and the group's number alone; neighbours share nothing."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed}:{group_number}".encode()).digest()[:4], "big") >> 1
    )


async def score(group: Group, reward_fn: RewardFn | None) -> None:
    """Set each sample's reward. Without a reward function the samples must have come with one."""
    if reward_fn is None:
        if any(sample.reward is None for sample in group):
            raise ValueError(
                "no reward_fn, and generate_fn set no reward; give one to RolloutConfig or generate_batch"
            )
        for sample in group:
            finite_or_none(sample.reward, sample, source="generate_fn (an agent's environment)")
        return
    rewards: list[Any] = [reward_fn(sample) for sample in group]
    # a task for each costs more than most plain rewards do
    if any(map(inspect.isawaitable, rewards)):
        rewards = await gather_in_order([partial(_awaited, reward) for reward in rewards])
    for sample, reward in zip(group, rewards, strict=True):
        sample.reward = finite_or_none(reward, sample)


def unscorable_reason(group: Group) -> str | None:
    """Return why a sample of the group has no reward; None if all have one."""
    unscored = [sample for sample in group if sample.reward is None]
    if not unscored:
        return None
    reason: str = unscored[0].metadata.get(REWARD_FAILURE, UNSCORABLE)
    return reason


async def filter_reason(group: Group, filter_fn: FilterFn | None) -> str | None:
    """Return the name of the filter if it drops the group, else None. Raises RolloutError if it raises."""
    if filter_fn is None:
        return None
    name = getattr(filter_fn, "__name__", type(filter_fn).__name__)
    try:
        return None if await _call(filter_fn, group) else name
    except USER_ERRORS as error:
        prompt = str(group[0].prompt)[:200]
        raise RolloutError(
            f"filter_fn {name} raised {describe(error)} for the group of prompt {prompt}"
        ) from error


def _takes_seed(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    return any(
        parameter.name == "seed" or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )


async def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a plain or an async function."""
    return await _awaited(function(*arguments, **keywords))


async def _awaited(value: Any | Awaitable[Any]) -> Any:
    return await value if inspect.isawaitable(value) else value
