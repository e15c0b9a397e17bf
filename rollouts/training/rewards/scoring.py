"""A job's reward function with its time limit, in separate processes where it is slow. asyncio and trio alike.

A call that takes too long, or kills its process, gives None: not scorable, which drops its group and is counted as
`reward_timeout` or `reward_death`. An exception is the user's mistake and ends the run, naming reward and prompt.
"""

import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio

from rollouts.training.rewards.reward_fn import RewardError, resolve
from rollouts.training.rewards.worker_pool import RewardWorkers, mark_failed, raised
from rollouts.training.types import RewardFn, Sample
from rollouts.training.user_code import USER_ERRORS, describe


@contextlib.contextmanager
def scoring(dotted_path: str, *, workers: int, timeout_s: float) -> Iterator[RewardFn]:
    """Yield the reward function at `dotted_path`, as `RolloutConfig.reward_fn` takes it.

    An async one is cut off after `timeout_s` of a sample. So is a plain one in `workers` > 0 processes, which end with
    the context. With 0 it runs in this process and cannot be cut off: a call that took too long is found afterwards.
    Raises RewardError for a path that does not name a function.
    """
    function = resolve(dotted_path)
    if _is_async(function):
        yield _async_reward(dotted_path, function, timeout_s)
    elif workers == 0:
        yield _plain_reward(dotted_path, function, timeout_s)
    else:
        with RewardWorkers(dotted_path, workers=workers, timeout_s=timeout_s) as scored:
            yield scored


def _plain_reward(
    dotted_path: str, function: Callable[[Sample], Any], timeout_s: float
) -> RewardFn:
    """Return `function` with its time limit. It may also return something to be awaited, as a lambda can."""

    def reward(sample: Sample) -> Any:
        started = time.monotonic()
        with _naming(dotted_path, sample):
            value = function(sample)
        if inspect.isawaitable(value):
            return _in_time(value, dotted_path, sample, timeout_s)
        if time.monotonic() - started > timeout_s:
            mark_failed(sample, "reward_timeout")
            return None
        return value

    return reward


def _async_reward(
    dotted_path: str, function: Callable[[Sample], Any], timeout_s: float
) -> RewardFn:
    """Return the async `function` with its time limit, as a coroutine function."""

    async def reward(sample: Sample) -> float | None:
        with _naming(dotted_path, sample):
            value = function(sample)
        return await _in_time(value, dotted_path, sample, timeout_s)

    return reward


async def _in_time(
    value: Awaitable[Any], dotted_path: str, sample: Sample, timeout_s: float
) -> Any:
    with anyio.move_on_after(timeout_s), _naming(dotted_path, sample):
        return await value
    mark_failed(sample, "reward_timeout")
    return None


@contextlib.contextmanager
def _naming(dotted_path: str, sample: Sample) -> Iterator[None]:
    """Turn what the function raises into a RewardError that names it and the prompt."""
    try:
        yield
    except RewardError:  # complete as it is
        raise
    except USER_ERRORS as error:
        raise raised(dotted_path, describe(error), sample) from error


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )
