"""AsyncRolloutManager: prompts in, batches of scored and filtered groups out. Structured concurrency, asyncio or trio.

A group is one prompt's samples. Order is always prompt order, never completion order, and a round waits for its slowest
group: dropping the groups that finish last would starve long answers.
"""

import inspect
import math
from functools import partial
from types import TracebackType
from typing import Any

from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.rollout_gen.group_queue import GroupQueue, PendingGroup, RolloutError
from rollouts.training.rollout_gen.group_work import (
    checked_group,
    filter_reason,
    group_seed,
    score,
    start_generating,
    unscorable_reason,
)
from rollouts.training.seams import PromptSource
from rollouts.training.types import RewardFn, RolloutBatch, RolloutConfig

__all__ = ["AsyncRolloutManager", "RolloutError", "group_seed"]


class AsyncRolloutManager:
    """Makes batches of exactly `config.batch_size` groups out of a buffer's prompts.

    A plain `generate_fn`, `reward_fn` or `filter_fn` runs in the caller's thread, one prompt after another; async ones
    run in parallel over prompts. Given the seeds, batches do not depend on timing. `rollout_stream` makes batches ahead
    of their use, with `queue` and `finish`.
    """

    def __init__(self, buffer: PromptSource, config: RolloutConfig) -> None:
        _check(config)
        self.buffer = buffer
        self.config = config
        self.queue = GroupQueue(buffer, config)

    async def __aenter__(self) -> "AsyncRolloutManager":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Do nothing: no task outlives the `generate_batch` that started it."""

    async def generate_batch(self, reward_fn: RewardFn | None = None) -> RolloutBatch:
        """Return exactly `batch_size` groups: carried-over ones first, then new ones, each in prompt order.

        Each round starts ceil(missing x over_sampling_factor) groups; rewards come first, then the filter. `reward_fn`
        replaces the config's. Raises RolloutError after `retries_max` more rounds than one, ValueError for a wrong
        value of a user's function, and whatever one raises. On any error, and when cancelled, the buffer and the
        carried groups are as before the call.
        """
        queue, before = self.queue, self.queue.snapshot()
        try:
            while queue.missing:
                queue.check_rounds(queue.rounds)
                groups = queue.start_unfinished() or queue.start_round(queue.missing)
                await gather_in_order([partial(self.finish, group, reward_fn) for group in groups])
            return queue.pop_batch()[0]
        except BaseException:
            queue.go_back(before)
            raise

    async def finish(self, group: PendingGroup, reward_fn: RewardFn | None = None) -> None:
        """Generate, score and filter a group that was started. Afterwards it is ready, or dropped."""
        made = start_generating(self.config, group.prompt, group.number)
        samples = checked_group(self.config, await made if inspect.isawaitable(made) else made)
        await score(samples, reward_fn or self.config.reward_fn)
        reason = unscorable_reason(samples)
        if reason is None:
            self.queue.count_scored(
                [sample.reward for sample in samples if sample.reward is not None]
            )
            reason = await filter_reason(samples, self.config.filter_fn)
        if reason is None:
            self.queue.keep(group, samples)
        else:
            self.queue.drop(group, reason)

    def save_state(self) -> dict[str, Any]:
        """Return what a resumed run continues from: see `GroupQueue.save_state`."""
        return self.queue.save_state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with exactly the batches that would have come. Raises DataError for another data set's state."""
        self.queue.load_state(state)


def _check(config: RolloutConfig) -> None:
    checks = (
        (config.generate_fn is not None, "generate_fn=None: needs a function of a list of prompts"),
        (config.batch_size >= 1, f"batch_size={config.batch_size}: needs >= 1"),
        (
            config.n_samples_per_prompt >= 1,
            f"n_samples_per_prompt={config.n_samples_per_prompt}: needs >= 1",
        ),
        (
            1 <= config.over_sampling_factor < math.inf,
            f"over_sampling_factor={config.over_sampling_factor}: needs >= 1",
        ),
        (config.retries_max >= 0, f"retries_max={config.retries_max}: needs >= 0"),
    )
    problems = [message for ok, message in checks if not ok]
    if problems:
        raise ValueError("RolloutConfig: " + "; ".join(problems))
