"""AsyncRolloutManager: prompts in, batches of scored and filtered groups out. Structured concurrency, asyncio or trio.

A group is one prompt's samples. Order is always prompt order, never completion order, and a round waits for its slowest
group: dropping whoever finishes last would starve long answers.
"""

import hashlib
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any

from rollouts.training.advantages import has_contrast
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.rewards.reward_fn import finite_or_none
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.types import REWARD_FAILURE, Prompt, RewardFn, RolloutBatch, RolloutConfig, Sample
from rollouts.training.user_code import USER_ERRORS, describe

Group = list[Sample]
UNSCORABLE = "unscorable"  # the drop reason of a group for which the reward function returned None

_FIX_OF_FILTERS = (
    "Fix: a filter that lets more through, prompts the model sometimes gets right, or larger over_sampling_factor / "
    "retries_max."
)
_FIXES = {  # by what dropped most
    UNSCORABLE: "The reward returned None for them. Fix: a reward that returns a number for each answer.",
    "reward_timeout": "Fix: a larger limits.reward_timeout_s, more rl.reward.workers, or a quicker reward.",
    "reward_death": "The reward's process was killed. Fix: a reward of less memory, or fewer rl.reward.workers.",
}


class RolloutError(RuntimeError):
    """Not enough groups passed the filter within the retries (the message counts what dropped them), or it raised."""


@dataclass
class PendingGroup:
    """A group, from the moment its prompt is taken until a batch has it."""

    number: int  # of all groups ever started
    prompt: Prompt
    before: dict[str, Any]  # where the prompts stood before this one was taken
    started_at: float  # time.monotonic()
    samples: Group | None = None  # once generated, scored and kept


class AsyncRolloutManager:
    """Makes batches of exactly `config.batch_size` groups out of a buffer's prompts.

    A plain `generate_fn`, `reward_fn` or `filter_fn` runs in the caller's thread, one prompt after another; async ones
    run in parallel over prompts. Given the seeds, batches do not depend on timing. `rollout_stream` makes batches ahead
    of their use, with `begin`, `finish`, `take` and `roll_back`.
    """

    def __init__(self, buffer: DataBuffer, config: RolloutConfig) -> None:
        _check(config)
        self.buffer = buffer
        self.config = config
        self._line: list[PendingGroup] = []  # in prompt order: what runs, and what was kept and is not in a batch yet
        self._groups_started = 0  # ever: numbers the groups, and so their seeds
        self._again = 0  # groups that a saved state left unfinished: they are started first, all at once
        self._reset_counts()

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
        before = self._position(), list(self._line), self._again
        try:
            while self.ready < self.config.batch_size:
                self.check_rounds(self._rounds)
                groups = self.begin_again() or self.begin(self.config.batch_size - self.ready)
                await gather_in_order([partial(self.finish, group, reward_fn) for group in groups])
            return self.take()[0]
        except BaseException:
            position, self._line, self._again = before
            self._go_to(position)
            self._reset_counts()
            raise

    # --- a batch, step by step ---

    @property
    def ready(self) -> int:
        """Groups that were kept and are in no batch yet."""
        return sum(group.samples is not None for group in self._line)

    @property
    def running(self) -> int:
        """Groups that were started and have not finished."""
        return sum(group.samples is None for group in self._line)

    @property
    def head_is_ready(self) -> bool:
        """Whether `take` has a batch."""
        head = self._line[: self.config.batch_size]
        return len(head) == self.config.batch_size and all(group.samples is not None for group in head)

    def begin(self, missing: int) -> list[PendingGroup]:
        """Take the prompts of a round: ceil(missing x over_sampling_factor)."""
        return self._begin(math.ceil(missing * self.config.over_sampling_factor))

    def begin_again(self) -> list[PendingGroup]:
        """Take the prompts that the loaded state had left unfinished: as many as were running at once then."""
        count, self._again = self._again, 0
        return self._begin(count) if count else []

    def _begin(self, count: int) -> list[PendingGroup]:
        self._rounds += 1
        groups = []
        for _ in range(count):
            before = self._position()
            (prompt,) = self.buffer.get_prompts(1)
            groups.append(PendingGroup(self._groups_started, prompt, before, time.monotonic()))
            self._groups_started += 1
        self._line += groups
        self._started += count
        return groups

    async def finish(self, group: PendingGroup, reward_fn: RewardFn | None = None) -> None:
        """Generate, score and filter a group that was begun; `ready` or dropped afterwards."""
        generating = self._generate(group.prompt, group.number)
        samples = self._checked(await generating if inspect.isawaitable(generating) else generating)
        await _score(samples, reward_fn or self.config.reward_fn)
        reason = await self._drop_reason(samples)
        if reason is None:
            group.samples = samples
        else:
            self._dropped[reason] += 1
            self._line.remove(group)

    def take(self) -> tuple[RolloutBatch, list[PendingGroup]]:
        """The next batch and its groups: the first `batch_size` in prompt order. Only when `head_is_ready`."""
        assert self.head_is_ready
        taken, self._line = self._line[: self.config.batch_size], self._line[self.config.batch_size :]
        counts = {
            "groups_started": self._started,
            "groups_carried_in": self._carried_in,
            "rounds": self._rounds,
            "groups_carried_over": self.ready,
            "groups_dropped": dict(self._dropped),
        }
        if self._scored and (self._dropped or self._carried_in or self.ready):  # else the batch itself tells
            counts["groups_zero_std_frac"] = self._flat / self._scored
        self._reset_counts()
        return _flatten([group.samples for group in taken if group.samples is not None], counts), taken

    def check_rounds(self, rounds: int) -> None:
        """Raise RolloutError when no round more may follow on `rounds` for the same batches."""
        if rounds > self.config.retries_max:
            raise RolloutError(_too_few(self.ready, rounds, self._started, self._dropped, self.config))

    def roll_back(self) -> None:
        """As if what still runs had not been started: its prompts come again. For when it was cancelled."""
        self.load_state(self.save_state())

    # --- resuming ---

    def save_state(self) -> dict[str, Any]:
        """JSON-able where prompts and metadata are: buffer position, group counter, carried groups.

        Groups that still run, and what was started after the first of them, are not in it: they come again, started
        at once as they were ("again").
        """
        finished = next((at for at, group in enumerate(self._line) if group.samples is None), len(self._line))
        carried = [group.samples or [] for group in self._line[:finished]]
        position = self._line[finished].before if finished < len(self._line) else self._position()
        again = self._again + self._groups_started - position["groups_started"]
        return {**position, "again": again, "carried": [[asdict(sample) for sample in group] for group in carried]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with exactly the batches that would have come. Raises DataError for another data set's state."""
        self._go_to(state)
        now, number = time.monotonic(), state["groups_started"]
        carried = [[Sample(**sample) for sample in group] for group in state["carried"]]
        self._line = [PendingGroup(number, group[0].prompt, self._position(), now, group) for group in carried]
        self._again = state.get("again", 0)  # states of older runs have none
        self._reset_counts()

    def _position(self) -> dict[str, Any]:
        return {"buffer": self.buffer.save_state(), "groups_started": self._groups_started}

    def _go_to(self, position: dict[str, Any]) -> None:
        self.buffer.load_state(position["buffer"])
        self._groups_started = position["groups_started"]

    def _reset_counts(self) -> None:
        """Counts are of a batch: from the one before to it."""
        self._carried_in = self.ready
        self._started = self._rounds = 0
        self._scored = self._flat = 0  # groups, and those of them without contrast, before any filter
        self._dropped: Counter[str] = Counter()

    def _generate(self, prompt: Prompt, number: int) -> Any:
        """Call the plain or async `generate_fn`."""
        generate_fn = self.config.generate_fn
        assert generate_fn is not None  # _check
        extra = {"seed": group_seed(self.config.seed, number)} if _takes_seed(generate_fn) else {}
        return generate_fn([prompt] * self.config.n_samples_per_prompt, **extra)

    def _checked(self, group: Any) -> Group:
        """Return what `generate_fn` gave. Raises ValueError unless it is a Sample for each prompt."""
        wanted = self.config.n_samples_per_prompt
        if not isinstance(group, list) or not all(isinstance(sample, Sample) for sample in group):
            raise ValueError(f"generate_fn returned {type(group).__name__}; needs a list of Sample")
        if len(group) != wanted:
            raise ValueError(f"generate_fn returned {len(group)} samples for {wanted} prompts; needs one for each")
        return group

    async def _drop_reason(self, group: Group) -> str | None:
        """Why the group is left out, None to keep it."""
        unscored = [sample for sample in group if sample.reward is None]
        if unscored:
            return unscored[0].metadata.get(REWARD_FAILURE, UNSCORABLE)
        self._scored += 1
        self._flat += not has_contrast([sample.reward for sample in group if sample.reward is not None])
        filter_fn = self.config.filter_fn
        if filter_fn is None:
            return None
        name = getattr(filter_fn, "__name__", type(filter_fn).__name__)
        try:
            return None if await _awaited(filter_fn(group)) else name
        except USER_ERRORS as error:
            prompt = str(group[0].prompt)[:200]
            raise RolloutError(f"filter_fn {name} raised {describe(error)} for the group of prompt {prompt}") from error


def group_seed(seed: int, group_number: int) -> int:
    """31 bits, a function of the run's seed and the group's number alone; neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group_number}".encode()).digest()[:4], "big") >> 1


def _check(config: RolloutConfig) -> None:
    checks = (
        (config.generate_fn is not None, "generate_fn=None: needs a function of a list of prompts"),
        (config.batch_size >= 1, f"batch_size={config.batch_size}: needs >= 1"),
        (config.n_samples_per_prompt >= 1, f"n_samples_per_prompt={config.n_samples_per_prompt}: needs >= 1"),
        (
            1 <= config.over_sampling_factor < math.inf,
            f"over_sampling_factor={config.over_sampling_factor}: needs >= 1",
        ),
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
        for sample in group:
            finite_or_none(sample.reward, sample, source="generate_fn (an agent's environment)")
        return
    rewards: list[Any] = [reward_fn(sample) for sample in group]
    if any(map(inspect.isawaitable, rewards)):  # a task for each costs more than most plain rewards do
        rewards = await gather_in_order([partial(_awaited, reward) for reward in rewards])
    for sample, reward in zip(group, rewards, strict=True):
        sample.reward = finite_or_none(reward, sample)


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


def _too_few(kept: int, rounds: int, started: int, dropped: Counter[str], config: RolloutConfig) -> str:
    most = dropped.most_common()
    reasons = ", ".join(f"{name} dropped {count}" for name, count in most) or "nothing was dropped"
    return (
        f"{kept} of {config.batch_size} groups after {rounds} round{'s' if rounds > 1 else ''}, {started} groups "
        f"started: {reasons}. {_FIXES.get(most[0][0] if most else '', _FIX_OF_FILTERS)}"
    )
