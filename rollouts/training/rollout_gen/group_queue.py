"""`GroupQueue`: the groups that were started and are in no batch yet, in prompt order, and the position of the prompts.

State alone: it generates nothing, and every call returns at once.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rollouts.data_formats.row import DataError
from rollouts.training.advantages import has_contrast
from rollouts.training.seams import PromptSource
from rollouts.training.types import Prompt, RolloutBatch, RolloutConfig, Sample

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
    """Too few groups passed the filter within the retries (the message counts the reasons), or the filter raised."""


@dataclass
class PendingGroup:
    """A group, from the moment its prompt is taken until a batch has it."""

    number: int  # of all groups ever started
    prompt: Prompt
    before: dict[str, Any]  # the position of the prompts before this one was taken
    started_at: float  # time.monotonic()
    samples: Group | None = None  # once generated, scored and kept


@dataclass
class BatchCounts:
    """What happened since the last batch was popped."""

    carried_in: int  # groups that were ready then
    started: int = 0
    rounds: int = 0
    scored: int = 0  # groups, before any filter
    flat: int = 0  # those of them without contrast
    dropped: Counter[str] = field(default_factory=Counter)  # by reason


class GroupQueue:
    """The pending groups of a manager. Each batch is the first `config.batch_size` of them that were kept.

    `groups_started` counts all groups ever started: it numbers them, and so gives them their seeds.
    """

    def __init__(self, prompts: PromptSource, config: RolloutConfig) -> None:
        self.groups_started = 0
        self._prompts = prompts
        self._config = config
        # in prompt order: running ones, and kept ones that no batch has yet
        self._groups: list[PendingGroup] = []
        self._unfinished = (
            0  # groups that the loaded state left running: they are started first, all at once
        )
        self._counts = BatchCounts(carried_in=0)

    @property
    def ready(self) -> int:
        """Return how many groups were kept and are in no batch yet."""
        return sum(group.samples is not None for group in self._groups)

    @property
    def running(self) -> int:
        """Return how many groups were started and have not finished."""
        return sum(group.samples is None for group in self._groups)

    @property
    def missing(self) -> int:
        """Return how many groups the next batch lacks, if all that run were dropped."""
        return max(0, self._config.batch_size - self.ready)

    @property
    def rounds(self) -> int:
        """Return how many rounds were started for the next batch."""
        return self._counts.rounds

    @property
    def has_batch(self) -> bool:
        """Return whether `pop_batch` has a batch."""
        head = self._groups[: self._config.batch_size]
        return len(head) == self._config.batch_size and all(
            group.samples is not None for group in head
        )

    def start_round(self, missing: int) -> list[PendingGroup]:
        """Take the prompts of a round: ceil(missing x over_sampling_factor)."""
        return self._start(math.ceil(missing * self._config.over_sampling_factor))

    def start_unfinished(self) -> list[PendingGroup]:
        """Take the prompts that the loaded state left unfinished: as many as were running then, at once."""
        count, self._unfinished = self._unfinished, 0
        return self._start(count) if count else []

    def _start(self, count: int) -> list[PendingGroup]:
        groups = []
        for _ in range(count):
            before = self._position()
            (prompt,) = self._prompts.get_prompts(1)
            groups.append(PendingGroup(self.groups_started, prompt, before, time.monotonic()))
            self.groups_started += 1
        self._groups += groups
        self._counts.rounds += 1
        self._counts.started += count
        return groups

    def count_scored(self, rewards: Sequence[float]) -> None:
        """Count a group that was scored, before any filter."""
        self._counts.scored += 1
        self._counts.flat += not has_contrast(rewards)

    def keep(self, group: PendingGroup, samples: Group) -> None:
        """Make a group that was started ready."""
        group.samples = samples

    def drop(self, group: PendingGroup, reason: str) -> None:
        """Remove a group that was started."""
        self._counts.dropped[reason] += 1
        self._groups.remove(group)

    def pop_batch(self) -> tuple[RolloutBatch, list[PendingGroup]]:
        """Return the next batch and its groups: the first `batch_size` in prompt order. Only when `has_batch`."""
        assert self.has_batch
        size = self._config.batch_size
        popped, self._groups = self._groups[:size], self._groups[size:]
        counts = self._counts
        metadata: dict[str, Any] = {
            "groups_started": counts.started,
            "groups_carried_in": counts.carried_in,
            "rounds": counts.rounds,
            "groups_carried_over": self.ready,
            "groups_dropped": dict(counts.dropped),
        }
        # else the batch itself tells
        if counts.scored and (counts.dropped or counts.carried_in or self.ready):
            metadata["groups_zero_std_frac"] = counts.flat / counts.scored
        self._reset_counts()
        return _flatten(
            [group.samples for group in popped if group.samples is not None], metadata
        ), popped

    def check_rounds(self, rounds: int) -> None:
        """Raise RolloutError if no round may follow the `rounds` that were made for the same batch."""
        if rounds > self._config.retries_max:
            raise RolloutError(_too_few(self.ready, rounds, self._counts, self._config))

    # --- going back, and resuming ---

    def snapshot(self) -> tuple[dict[str, Any], list[PendingGroup], int]:
        """Return what `go_back` needs."""
        return self._position(), list(self._groups), self._unfinished

    def go_back(self, snapshot: tuple[dict[str, Any], list[PendingGroup], int]) -> None:
        """Undo all since `snapshot`: the same prompts come again."""
        position, self._groups, self._unfinished = snapshot
        self._go_to(position)
        self._reset_counts()

    def forget_running(self) -> None:
        """Undo the start of the groups that still run, once they were cancelled: their prompts come again."""
        self.load_state(self.save_state())

    def save_state(self) -> dict[str, Any]:
        """Return the position of the prompts, the number of groups, and the kept ones. JSON-able where prompts are.

        Unfinished groups, and all started after the oldest of them, are not saved. A resumed run takes their prompts
        again, all at once ("again" says how many).
        """
        finished = next(
            (at for at, group in enumerate(self._groups) if group.samples is None),
            len(self._groups),
        )
        carried = [group.samples or [] for group in self._groups[:finished]]
        position = (
            self._groups[finished].before if finished < len(self._groups) else self._position()
        )
        again = self._unfinished + self.groups_started - position["groups_started"]
        return {
            **position,
            "again": again,
            "carried": [[asdict(sample) for sample in group] for group in carried],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with exactly the batches that would have come. Raises DataError for another data set's state."""
        if "buffer" not in state:
            raise DataError(
                "the saved state has no position of prompts: it is of a run on saved rollouts. Resume as that run "
                "began."
            )
        self._go_to(state)
        now, number = time.monotonic(), state["groups_started"]
        carried = [[Sample(**sample) for sample in group] for group in state["carried"]]
        self._groups = [
            PendingGroup(number, group[0].prompt, self._position(), now, group) for group in carried
        ]
        self._unfinished = state.get("again", 0)  # states of older runs have none
        self._reset_counts()

    def _position(self) -> dict[str, Any]:
        return {"buffer": self._prompts.save_state(), "groups_started": self.groups_started}

    def _go_to(self, position: dict[str, Any]) -> None:
        self._prompts.load_state(position["buffer"])
        self.groups_started = position["groups_started"]

    def _reset_counts(self) -> None:
        self._counts = BatchCounts(carried_in=self.ready)


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


def _too_few(kept: int, rounds: int, counts: BatchCounts, config: RolloutConfig) -> str:
    most = counts.dropped.most_common()
    reasons = ", ".join(f"{name} dropped {count}" for name, count in most) or "nothing was dropped"
    return (
        f"{kept} of {config.batch_size} groups after {rounds} round{'s' if rounds > 1 else ''}, {counts.started} "
        f"groups started: {reasons}. {_FIXES.get(most[0][0] if most else '', _FIX_OF_FILTERS)}"
    )
