"""Batches of groups: order, over-sampling, filtering, retries, resume. Every async test runs under asyncio and trio."""

import json
import random
from typing import Any

import anyio
import pytest

from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.filters import check_reward_nonzero_std
from rollouts.training.loops.rollout_metrics import rollout_metrics
from rollouts.training.rollout_gen.async_rollout_manager import (
    AsyncRolloutManager,
    RolloutError,
    group_seed,
)
from rollouts.training.rollout_gen.rollout_generation import generate_rollout_batches
from rollouts.training.types import RolloutConfig, Sample

PROMPTS = [f"p{index:02d}" for index in range(20)]


def echo(prompts: list[Any], *, seed: int = 0) -> list[Sample]:
    """Two tokens of prompt, one of response; the response says which copy it is and the seed."""
    return [
        Sample(
            prompt=p,
            response=f"{i}:{seed}",
            tokens=[1, 2, 3],
            loss_mask=[0.0, 0.0, 1.0],
            response_length=1,
        )
        for i, p in enumerate(prompts)
    ]


def by_copy(sample: Sample) -> float:
    return float(sample.response.split(":")[0])


def config(**changes: Any) -> RolloutConfig:
    values: dict[str, Any] = {
        "batch_size": 4,
        "n_samples_per_prompt": 3,
        "generate_fn": echo,
        "reward_fn": by_copy,
        "seed": 5,
    }
    return RolloutConfig(**{**values, "seed": 5, **changes})


def manager(**changes: Any) -> AsyncRolloutManager:
    return AsyncRolloutManager(DataBuffer(PROMPTS, seed=1), config(**changes))


def number(prompt: Any) -> int:
    return int(prompt[1:])


def prompts_of(batch: Any) -> list[Any]:
    return [sample.prompt for sample in batch.samples[::3]]


@pytest.mark.anyio
async def test_a_batch_is_flat_and_in_prompt_order() -> None:
    """Goal: the record the loop reads. Red when samples of different prompts were interleaved."""
    async with manager() as rollouts:
        batch = await rollouts.generate_batch()
    assert prompts_of(batch) == DataBuffer(PROMPTS, seed=1).get_prompts(4)
    assert batch.group_ids == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch.rewards == [0.0, 1.0, 2.0] * 4
    assert batch.tokens == [[1, 2, 3]] * 12 and batch.loss_masks == [[0.0, 0.0, 1.0]] * 12
    assert batch.response_lengths == [1] * 12
    assert batch.metadata == {
        "groups_started": 4,
        "groups_kept": 4,
        "groups_carried_in": 0,
        "groups_carried_over": 0,
        "groups_dropped": {},
        "rounds": 1,
    }


@pytest.mark.anyio
async def test_groups_run_in_parallel_and_keep_prompt_order() -> None:
    """Goal: traps.md, completion order mixes groups. Each group waits for the one after it to finish, so this ends only
    if all run at once, and finishes backwards. Red when results were appended as they came; hung when run one by one.
    """
    order = DataBuffer(PROMPTS, seed=1).get_prompts(4)
    done = {prompt: anyio.Event() for prompt in order}
    finished = []

    async def backwards(prompts: list[Any]) -> list[Sample]:
        position = order.index(prompts[0])
        if position + 1 < len(order):
            await done[order[position + 1]].wait()
        finished.append(prompts[0])
        done[prompts[0]].set()
        return echo(prompts)

    with anyio.fail_after(100):
        batch = await manager(generate_fn=backwards).generate_batch()
    assert finished == order[::-1] and prompts_of(batch) == order


@pytest.mark.anyio
async def test_over_sampling_carries_the_surplus_over() -> None:
    """Goal: ceil(4 x 1.6) = 7 groups started, 3 carried; the next batch takes them first. Red when dropped."""
    rollouts = manager(over_sampling_factor=1.6)
    stream = DataBuffer(PROMPTS, seed=1).get_prompts(20)
    first, second = await rollouts.generate_batch(), await rollouts.generate_batch()
    assert prompts_of(first) + prompts_of(second) == stream[:8]
    assert (first.metadata["groups_started"], first.metadata["groups_carried_over"]) == (7, 3)
    # ceil(1 x 1.6)
    assert (second.metadata["groups_carried_in"], second.metadata["groups_started"]) == (3, 2)


@pytest.mark.anyio
async def test_rewards_come_before_the_filter_and_what_it_drops_is_made_up_for() -> None:
    """Goal: traps.md, the filter ran before rewards existed. Red when it did (rewards were None)."""
    seen: list[list[float | None]] = []

    async def even(group: list[Sample]) -> bool:
        seen.append([sample.reward for sample in group])
        return number(group[0].prompt) % 2 == 0

    batch = await manager(filter_fn=even).generate_batch()
    stream = DataBuffer(PROMPTS, seed=1).get_prompts(20)
    assert prompts_of(batch) == [prompt for prompt in stream if number(prompt) % 2 == 0][:4]
    assert all(rewards == [0.0, 1.0, 2.0] for rewards in seen)
    assert batch.metadata["groups_dropped"] == {"even": batch.metadata["groups_started"] - 4}


@pytest.mark.anyio
async def test_retries_are_bounded_and_the_error_counts() -> None:
    """Goal: a filter that lets nothing through ends. Red (endless) without the bound."""

    def nothing_passes(group: list[Sample]) -> bool:
        return False

    with pytest.raises(
        RolloutError,
        match=r"0 of 4 groups after 3 rounds, 24 groups started: nothing_passes dropped 24",
    ):
        await manager(
            filter_fn=nothing_passes, retries_max=2, over_sampling_factor=2.0
        ).generate_batch()


@pytest.mark.anyio
async def test_what_to_do_fits_what_dropped_the_groups() -> None:
    """Goal: a reward that gives None is told to give numbers, not to pass a filter that nobody set. Red with one advice
    for all."""

    async def unsure(sample: Sample) -> float | None:
        return None

    with pytest.raises(
        RolloutError,
        match=r"unscorable dropped 4. The reward returned None for them. Fix: a reward",
    ):
        await manager(reward_fn=unsure, retries_max=0).generate_batch()


@pytest.mark.anyio
@pytest.mark.parametrize("error", [KeyError("tests"), SystemExit(3)])
async def test_a_filter_that_raises_is_named(error: BaseException) -> None:
    """Goal: as of a reward: which function, what, where, which prompt. Red with Exception caught alone: `sys.exit` came
    through."""

    def broken(group: list[Sample]) -> bool:
        raise error

    told = rf"filter_fn broken raised {type(error).__name__}: .*test_async_rollout_manager.py:\d+\) for the group of"
    with pytest.raises(RolloutError, match=told):
        await manager(filter_fn=broken).generate_batch()


@pytest.mark.anyio
async def test_what_cannot_be_scored_is_dropped_and_counted() -> None:
    """Goal: None means not scorable, never 0. Red when None became 0.0."""
    target = DataBuffer(PROMPTS, seed=1).get_prompts(1)[0]

    async def unsure(sample: Sample) -> float | None:
        return None if sample.prompt == target else 1.0

    batch = await manager(reward_fn=unsure).generate_batch()
    assert batch.metadata["groups_dropped"] == {"unscorable": 1}
    assert prompts_of(batch) == DataBuffer(PROMPTS, seed=1).get_prompts(5)[1:]


@pytest.mark.anyio
async def test_the_reward_function_of_the_call_wins() -> None:
    """Goal: generate_batch(reward_fn=...) as documented. Red when the config's was used."""
    batch = await manager().generate_batch(reward_fn=lambda sample: 7.0)
    assert batch.rewards == [7.0] * 12


@pytest.mark.anyio
async def test_seeds_depend_on_the_group_alone() -> None:
    """Goal: the same run again gives the same; another seed, or the next group, another. Red with one seed for all."""
    seeds: dict[int, list[int]] = {}
    for run_seed in (5, 5, 6):
        rollouts = manager(seed=run_seed)
        batches = [await rollouts.generate_batch() for _ in range(2)]
        found = [
            int(sample.response.split(":")[1]) for batch in batches for sample in batch.samples[::3]
        ]
        assert found == [group_seed(run_seed, number) for number in range(8)]
        assert seeds.setdefault(run_seed, found) == found
    assert len(set(seeds[5] + seeds[6])) == 16
    assert all(0 <= seed < 2**31 for seed in seeds[5])


@pytest.mark.anyio
async def test_a_saved_state_continues_with_exactly_the_same_batches() -> None:
    """Goal: exact resume, carried groups and all, through JSON. Red without the group counter, or the groups."""
    whole, first = manager(over_sampling_factor=1.6), manager(over_sampling_factor=1.6)
    expected = [await whole.generate_batch() for _ in range(6)]
    for _ in range(2):
        await first.generate_batch()
    resumed = AsyncRolloutManager(DataBuffer(PROMPTS), config(over_sampling_factor=1.6))
    resumed.load_state(json.loads(json.dumps(first.save_state())))
    assert [await resumed.generate_batch() for _ in range(4)] == expected[2:]


@pytest.mark.anyio
async def test_a_failed_batch_loses_no_prompt_and_its_error_comes_through() -> None:
    """Goal: the user's own exception, no group of groups, the others cancelled; afterwards all is as before.

    Red when an ExceptionGroup came out, when the buffer had moved on, and when the error had lost its cause.
    """
    failing = True
    cancelled: list[Any] = []

    async def generate(prompts: list[Any]) -> list[Sample]:
        if failing and prompts[0] == target:
            raise ZeroDivisionError("boom") from KeyError("why")
        if failing:
            try:
                await anyio.sleep_forever()
            finally:
                cancelled.append(prompts[0])
        return echo(prompts)

    rollouts = manager(generate_fn=generate, over_sampling_factor=1.6)
    failing = False
    await rollouts.generate_batch()
    state, target, failing = rollouts.save_state(), rollouts.buffer.prompts[0], True
    target = DataBuffer(PROMPTS, seed=1).get_prompts(9)[-1]
    with anyio.fail_after(100), pytest.raises(ZeroDivisionError, match="boom") as caught:
        await rollouts.generate_batch()
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(cancelled) == 1 and rollouts.save_state() == state
    failing = False
    assert (
        prompts_of(await rollouts.generate_batch())
        == DataBuffer(PROMPTS, seed=1).get_prompts(8)[4:]
    )


@pytest.mark.anyio
async def test_errors_at_the_same_time_are_told_together() -> None:
    """Goal: an engine that is down fails every group; one error is raised, with the rest in notes. Red as a group."""

    async def generate(prompts: list[Any]) -> list[Sample]:
        raise ConnectionError(f"{prompts[0]}: refused")

    with pytest.raises(ConnectionError) as caught:
        await manager(generate_fn=generate, batch_size=6).generate_batch()
    assert len(getattr(caught.value, "__notes__", [])) in (0, 4)  # as many as had begun


@pytest.mark.anyio
async def test_cancellation_from_outside_ends_it_and_loses_nothing() -> None:
    """Goal: structured: nothing runs on, the prompts come again. Red when the position was kept."""

    async def forever(prompts: list[Any]) -> list[Sample]:
        await anyio.sleep_forever()
        return []

    rollouts = manager(generate_fn=forever)
    with anyio.move_on_after(0.05) as scope:
        await rollouts.generate_batch()
    assert scope.cancelled_caught
    assert rollouts.buffer.get_prompts(4) == DataBuffer(PROMPTS, seed=1).get_prompts(4)


def earned(prompts: Any, reward: float) -> Any:
    """Samples that come with a reward, as an agent's episodes do."""
    samples = echo(prompts)
    for sample in samples:
        sample.reward = reward
    return samples


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"generate_fn": lambda prompts: echo(prompts)[:2]},
            "generate_fn returned 2 samples for 3 prompts",
        ),
        (
            {"generate_fn": lambda prompts: None},
            "generate_fn returned NoneType; needs a list of Sample",
        ),
        ({"generate_fn": lambda prompts: ["x"] * 3}, "needs a list of Sample"),
        (
            {"reward_fn": lambda sample: float("nan")},
            r"reward_fn returned nan for '0:.*'; needs a finite number or None",
        ),
        ({"reward_fn": lambda sample: "good"}, "reward_fn returned 'good'"),
        ({"reward_fn": lambda sample: 10**400}, r"reward_fn returned 1000.*prompt"),
        (
            {"reward_fn": None, "generate_fn": lambda prompts: earned(prompts, float("inf"))},
            r"environment\) returned inf for .*needs a finite number or None \(prompt",
        ),
        ({"reward_fn": None}, "no reward_fn, and generate_fn set no reward"),
    ],
)
async def test_what_a_user_function_returns_wrongly_is_named(
    changes: dict[str, Any], message: str
) -> None:
    """Goal: the function, the value, the need. Each was red without its check: NaN went on into the advantages."""
    with pytest.raises(ValueError, match=message):
        await manager(**changes).generate_batch()


@pytest.mark.parametrize(
    "changes",
    [
        {"generate_fn": None},
        {"batch_size": 0},
        {"n_samples_per_prompt": 0},
        {"over_sampling_factor": 0.9},
        {"retries_max": -1},
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict[str, Any]) -> None:
    """Goal: at construction, naming field and value. Red without the check: batch_size=0 gave empty batches."""
    (field, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{field}={value}"):
        manager(**changes)


def test_the_sync_generator_gives_the_same_batches() -> None:
    """Goal: for batch in generate_rollout_batches(buffer, config). Red when every batch made a manager of its own."""
    made = generate_rollout_batches(DataBuffer(PROMPTS, seed=1), config(over_sampling_factor=1.6))
    rollouts = manager(over_sampling_factor=1.6)
    assert [next(made) for _ in range(3)] == [anyio.run(rollouts.generate_batch) for _ in range(3)]


@pytest.mark.anyio
async def test_groups_without_contrast_are_counted_before_the_filter() -> None:
    """Goal: the share of all that were scored, though the batch holds the others. Red with the batch's own: 0."""

    def by_prompt(sample: Sample) -> float:
        return 0.3 if int(str(sample.prompt)[1:]) % 2 else random.Random(sample.response).random()

    async with manager(reward_fn=by_prompt, filter_fn=check_reward_nonzero_std) as rollouts:
        batch = await rollouts.generate_batch()
    dropped = sum(batch.metadata["groups_dropped"].values())
    assert rollout_metrics(batch, None)["groups_zero_std_frac"] == pytest.approx(
        dropped / (dropped + 4)
    )
