"""AsyncRolloutManager: prompts in, batches of scored and filtered groups out. Structured concurrency, asyncio or trio.

A group is one prompt's samples. Order is always prompt order, never completion order, and a round waits for its slowest
group: dropping whoever finishes last would starve long answers.
"""

import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any

from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.types import Prompt, RewardFn, RolloutBatch, RolloutConfig, Sample

Group = list[Sample]
UNSCORABLE = "unscorable"  # the drop reason of a group for which the reward function returned None


class RolloutError(RuntimeError):
    """Not enough groups passed the filter within the retries. The message counts what each filter dropped."""


class AsyncRolloutManager:
    """Makes batches of exactly `config.batch_size` groups out of a buffer's prompts.

    A plain `generate_fn`, `reward_fn` or `filter_fn` runs in the caller's thread, one prompt after another; async ones
    run in parallel over prompts. Given the seeds, batches do not depend on timing.
    """

    def __init__(self, buffer: DataBuffer, config: RolloutConfig) -> None:
        _check(config)
        self.buffer = buffer
        self.config = config
        self._carried: list[Group] = []  # finished groups that passed the filter and were not needed yet
        self._groups_started = 0  # ever: numbers the groups, and so their seeds

    async def __aenter__(self) -> "AsyncRolloutManager":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end: no task outlives the `generate_batch` that started it."""

    async def generate_batch(self, reward_fn: RewardFn | None = None) -> RolloutBatch:
        """Exactly `batch_size` groups: carried-over ones first, then new ones, each in prompt order.

        Each round starts ceil(missing x over_sampling_factor) groups; rewards come first, then the filter. `reward_fn`
        stands in for the config's. Raises RolloutError after `retries_max` more rounds than one, ValueError for what a
        user function returned wrongly, and whatever one raises. On any error, and when cancelled, the buffer and the
        carried groups are as before the call.
        """
        before = self._position(), list(self._carried)
        try:
            return await self._generate_batch(reward_fn or self.config.reward_fn)
        except BaseException:
            self._restore(*before)
            raise

    def save_state(self) -> dict[str, Any]:
        """JSON-able where prompts and metadata are: buffer position, group counter, carried groups."""
        return {**self._position(), "carried": [[asdict(sample) for sample in group] for group in self._carried]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with exactly the batches that would have come. Raises DataError for another data set's state."""
        self._restore(state, [[Sample(**sample) for sample in group] for group in state["carried"]])

    def _position(self) -> dict[str, Any]:
        return {"buffer": self.buffer.save_state(), "groups_started": self._groups_started}

    def _restore(self, position: dict[str, Any], carried: list[Group]) -> None:
        self.buffer.load_state(position["buffer"])
        self._groups_started = position["groups_started"]
        self._carried = carried

    async def _generate_batch(self, reward_fn: RewardFn | None) -> RolloutBatch:
        config = self.config
        kept, self._carried = self._carried, []
        counts = {"groups_started": 0, "groups_carried_in": len(kept), "rounds": 0}
        dropped: Counter[str] = Counter()
        while len(kept) < config.batch_size:
            if counts["rounds"] > config.retries_max:
                raise RolloutError(_too_few(len(kept), counts["groups_started"], dropped, config))
            groups = await self._run_round(config.batch_size - len(kept), reward_fn)
            counts["groups_started"] += len(groups)
            counts["rounds"] += 1
            for group in groups:
                reason = await self._drop_reason(group)
                if reason is None:
                    kept.append(group)
                else:
                    dropped[reason] += 1
        self._carried = kept[config.batch_size :]
        counts["groups_carried_over"] = len(self._carried)
        return _flatten(kept[: config.batch_size], {**counts, "groups_dropped": dict(dropped)})

    async def _run_round(self, missing: int, reward_fn: RewardFn | None) -> list[Group]:
        """Generate and score ceil(missing x factor) groups at once; in prompt order."""
        prompts = self.buffer.get_prompts(math.ceil(missing * self.config.over_sampling_factor))
        first = self._groups_started
        self._groups_started += len(prompts)

        async def run(index: int) -> Group:
            group = await self._generate_group(prompts[index], first + index)
            await _score(group, reward_fn)
            return group

        return await gather_in_order([partial(run, index) for index in range(len(prompts))])

    async def _generate_group(self, prompt: Prompt, number: int) -> Group:
        config = self.config
        generate_fn, wanted = config.generate_fn, config.n_samples_per_prompt
        assert generate_fn is not None  # _check
        extra = {"seed": group_seed(config.seed, number)} if _takes_seed(generate_fn) else {}
        group = await _call(generate_fn, [prompt] * wanted, **extra)
        if not isinstance(group, list) or not all(isinstance(sample, Sample) for sample in group):
            raise ValueError(f"generate_fn returned {type(group).__name__}; needs a list of Sample")
        if len(group) != wanted:
            raise ValueError(f"generate_fn returned {len(group)} samples for {wanted} prompts; needs one for each")
        return group

    async def _drop_reason(self, group: Group) -> str | None:
        """Why the group is left out, None to keep it."""
        if any(sample.reward is None for sample in group):
            return UNSCORABLE
        filter_fn = self.config.filter_fn
        if filter_fn is None or await _call(filter_fn, group):
            return None
        return getattr(filter_fn, "__name__", type(filter_fn).__name__)


def group_seed(seed: int, group_number: int) -> int:
    """31 bits, a function of the run's seed and the group's number alone; neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group_number}".encode()).digest()[:4], "big") >> 1


def _check(config: RolloutConfig) -> None:
    checks = (
        (config.generate_fn is not None, "generate_fn=None: needs a function of a list of prompts"),
        (config.batch_size >= 1, f"batch_size={config.batch_size}: needs >= 1"),
        (config.n_samples_per_prompt >= 1, f"n_samples_per_prompt={config.n_samples_per_prompt}: needs >= 1"),
        (config.over_sampling_factor >= 1, f"over_sampling_factor={config.over_sampling_factor}: needs >= 1"),
        (config.retries_max >= 0, f"retries_max={config.retries_max}: needs >= 0"),
    )
    problems = [message for ok, message in checks if not ok]
    if problems:
        raise ValueError("RolloutConfig: " + "; ".join(problems))


def _takes_seed(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    return any(parameter.name == "seed" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


async def _score(group: Group, reward_fn: RewardFn | None) -> None:
    """Set each sample's reward. Without a reward function the samples must have come with one."""
    if reward_fn is None:
        if any(sample.reward is None for sample in group):
            raise ValueError("no reward_fn, and generate_fn set no reward; give one to RolloutConfig or generate_batch")
        return
    rewards: list[Any] = [reward_fn(sample) for sample in group]
    if any(map(inspect.isawaitable, rewards)):  # a task for each costs more than most plain rewards do
        rewards = await gather_in_order([partial(_awaited, reward) for reward in rewards])
    for sample, reward in zip(group, rewards, strict=True):
        if reward is not None and not _is_finite_number(reward):
            raise ValueError(
                f"reward_fn returned {reward!r} for {sample.response[:80]!r}; needs a finite number or None"
            )
        sample.reward = None if reward is None else float(reward)


def _is_finite_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


async def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a plain or an async function."""
    return await _awaited(function(*arguments, **keywords))


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _flatten(groups: list[Group], counts: dict[str, Any]) -> RolloutBatch:
    samples = [sample for group in groups for sample in group]
    return RolloutBatch(
        tokens=[sample.tokens for sample in samples],
        loss_masks=[sample.loss_mask for sample in samples],
        rewards=[sample.reward for sample in samples if sample.reward is not None],
        response_lengths=[sample.response_length for sample in samples],
        metadata={**counts, "groups_kept": len(groups)},
        samples=samples,
        group_ids=[index for index, group in enumerate(groups) for _ in group],
    )


def _too_few(kept: int, started: int, dropped: Counter[str], config: RolloutConfig) -> str:
    reasons = ", ".join(f"{name} dropped {count}" for name, count in dropped.most_common()) or "nothing was dropped"
    return (
        f"{kept} of {config.batch_size} groups after {config.retries_max + 1} rounds, {started} groups started: "
        f"{reasons}. "
        "Fix: a filter that lets more through, prompts the model sometimes gets right, or larger "
        "over_sampling_factor / retries_max."
    )
