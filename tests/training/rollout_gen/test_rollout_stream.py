"""Batches made ahead of training: the bound on the lag, order, determinism, failures, resuming. asyncio and trio.

A world without a model: `World.version` stands for the engine's weights, and sampling takes as long as a test wants.
"""

import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.rollout_gen import rollout_stream
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager, RolloutError
from rollouts.training.rollout_gen.rollout_stream import open_rollouts
from rollouts.training.types import RLTrainingConfig, RolloutBatch, RolloutConfig, Sample

PROMPTS = [f"p{index:02d}" for index in range(20)]
BATCH = 3
FAIL_S = 100


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stream_of_prompts(count: int) -> list[str]:
    return DataBuffer(PROMPTS, seed=1).get_prompts(count)


async def no_pause() -> None:
    return None


class World:
    """An engine whose weights are a number, under a manager; every sample says which weights began and ended it."""

    def __init__(
        self, *, seed: int = 0, pause: Callable[[], Awaitable[None]] | None = None, **config: Any
    ) -> None:
        self.version = 0
        self.running = 0
        rng = random.Random(seed)

        async def wait() -> None:
            for _ in range(rng.choice([0, 1, 5, 40])):
                await anyio.lowlevel.checkpoint()

        self.pause = pause or wait
        config = {
            "batch_size": BATCH,
            "n_samples_per_prompt": 2,
            "generate_fn": self.generate,
            **config,
        }
        config.setdefault("reward_fn", lambda sample: float(sample.metadata["seed"] % 7))
        self.manager = AsyncRolloutManager(DataBuffer(PROMPTS, seed=1), RolloutConfig(**config))

    async def generate(self, prompts: list[Any], *, seed: int) -> list[Sample]:
        began = self.version
        self.running += 1
        try:
            await self.pause()
        finally:
            self.running -= 1
        metadata = {"seed": seed, "began": began, "ended": self.version}
        return [
            Sample(
                prompt=p,
                tokens=[1, 2],
                loss_mask=[0.0, 1.0],
                response_length=1,
                metadata=dict(metadata),
            )
            for p in prompts
        ]

    async def train(
        self,
        steps: int,
        lag: int,
        *,
        first: int = 0,
        num_steps: int | None = None,
        after_step: Callable[[int], None] | None = None,
        train_pause: Callable[[], Awaitable[None]] = no_pause,
        **options: Any,
    ) -> list[RolloutBatch]:
        """The batches of `steps` steps, each followed by an update where it is due."""
        config = RLTrainingConfig(num_steps=num_steps or steps, policy_lag_steps_max=lag, **options)
        self.version = first
        batches = []
        with anyio.fail_after(FAIL_S):
            async with open_rollouts(self.manager, config, EnginePool.of([])) as rollouts:
                async with rollouts.updating(first):
                    pass
                for step in range(first + 1, steps + 1):
                    batches.append(await rollouts.next_batch())
                    await train_pause()
                    if step % config.sync_every == 0:
                        async with rollouts.updating(step):
                            self.version = step
                    # so that after_step finds some groups running, and some finished
                    for _ in range(step % 4 * 5):
                        await anyio.lowlevel.checkpoint()
                    if after_step is not None:
                        after_step(step)
        return batches


def even_seeds(group: list[Sample]) -> bool:
    return group[0].metadata["seed"] % 2 == 0


def prompts_of(batches: list[RolloutBatch]) -> list[Any]:
    return [sample.prompt for batch in batches for sample in batch.samples[::2]]


def versions_of(batch: RolloutBatch) -> set[int]:
    return {sample.metadata["began"] for sample in batch.samples}


@pytest.mark.anyio
@pytest.mark.parametrize(("lag", "sync_every"), [(1, 1), (2, 1), (3, 2)])
async def test_without_in_flight_updates_the_weights_of_every_batch_are_known(
    lag: int, sync_every: int
) -> None:
    """Goal: whatever takes how long, batch t is sampled whole with the oldest weights that the lag allows, in prompt
    order: the run is a function of the seeds. Red when an update did not wait for what runs, and with a reach of one
    step more.
    """
    for seed in range(5):
        batches = await World(seed=seed).train(8, lag, sync_every=sync_every)
        assert prompts_of(batches) == stream_of_prompts(8 * BATCH)
        for step, batch in enumerate(batches, start=1):
            synced = [
                version for version in range(0, step, sync_every) if step - 1 - version <= lag
            ]
            assert versions_of(batch) == {min(synced)}, (step, versions_of(batch))
            assert all(
                sample.metadata["began"] == sample.metadata["ended"] for sample in batch.samples
            )


@pytest.mark.anyio
@pytest.mark.parametrize(
    "filters", [{}, {"filter_fn": even_seeds, "retries_max": 60, "over_sampling_factor": 1.5}]
)
async def test_timing_changes_nothing(filters: dict[str, Any]) -> None:
    """Goal: with filters, rounds and over-sampling too, samples and their weights do not depend on what takes how long.

    Red when groups were started whenever one was missing, and not only in rounds.
    """
    found = []
    for seed in range(6):
        rng = random.Random(100 + seed)

        async def train_pause(rng: random.Random = rng) -> None:
            for _ in range(rng.choice([0, 10, 200])):
                await anyio.lowlevel.checkpoint()

        batches = await World(seed=seed, **filters).train(7, 1, train_pause=train_pause)
        found.append(
            [[(s.prompt, s.reward, s.metadata) for s in batch.samples] for batch in batches]
        )
    assert all(one == found[0] for one in found)


@pytest.mark.anyio
@pytest.mark.parametrize("lag", [1, 2, 4])
async def test_in_flight_updates_keep_the_bound_and_the_order(lag: int) -> None:
    """Goal: under updates that wait for nothing no sample is older than the bound, none is overtaken, and some were
    sampled by several versions. Red when groups were started for one step more than the bound.
    """
    crossed = 0
    for seed in range(5):
        batches = await World(seed=seed).train(12, lag, in_flight_updates=True)
        assert prompts_of(batches) == stream_of_prompts(12 * BATCH)
        for step, batch in enumerate(batches, start=1):
            assert step - 1 - min(versions_of(batch)) <= lag
        crossed += sum(
            s.metadata["began"] < s.metadata["ended"] for batch in batches for s in batch.samples
        )
    assert crossed > 0


@pytest.mark.anyio
async def test_lag_0_is_the_plain_loop() -> None:
    """Goal: nothing is begun before it is asked for, and the batches are `generate_batch`'s. Red with a lag of 1."""
    filters = {"filter_fn": even_seeds, "retries_max": 60, "over_sampling_factor": 1.5}
    world, plain = World(**filters), World(**filters)
    started: list[int] = []
    batches = await world.train(
        5, 0, after_step=lambda step: started.append(world.manager.queue.groups_started)
    )
    expected = []
    for step in range(5):
        plain.version = step
        expected.append(await plain.manager.generate_batch())
    assert batches == expected
    assert world.manager.save_state() == plain.manager.save_state()


@pytest.mark.anyio
async def test_training_goes_on_while_the_next_batch_is_generated() -> None:
    """Goal: overlap, without a clock: step 3's groups, and only these, are running while step 2 trains.

    Red with lag 0, where nothing ever runs meanwhile.
    """
    gate = anyio.Event()
    seen: list[int] = []

    async def pause() -> None:
        if world.version == 1:
            await gate.wait()

    async def train_pause() -> None:
        if world.version == 1:
            await anyio.wait_all_tasks_blocked()
            seen.append(world.running)
            gate.set()

    world = World(pause=pause)
    await world.train(4, 1, train_pause=train_pause)
    assert seen == [BATCH]


@pytest.mark.anyio
async def test_a_long_answer_is_waited_for_and_not_overtaken() -> None:
    """Goal: tinker-cookbook#822, whoever takes long is not starved: the first group's answer comes last and still
    stands first in batch 1, with later ones long since there. Red when `take` took the first that had finished.
    """
    numbers = iter(range(1000))
    others = anyio.Event()

    async def pause() -> None:
        number = next(numbers)
        if number == 2 * BATCH - 1:  # all of two batches have begun
            others.set()
        if number == 0:
            await others.wait()
            await anyio.wait_all_tasks_blocked()

    batches = await World(pause=pause).train(3, 1)
    assert prompts_of(batches) == stream_of_prompts(3 * BATCH)


@pytest.mark.anyio
async def test_a_failure_comes_to_the_trainer_as_itself() -> None:
    """Goal: the user's own exception with its cause, at the next batch; the others are cancelled. Red as a group."""
    calls = iter(range(1000))

    async def pause() -> None:
        if next(calls) == 2 * BATCH:
            raise ZeroDivisionError("boom") from KeyError("why")

    world = World(pause=pause)
    with pytest.raises(ZeroDivisionError, match="boom") as caught:
        await world.train(6, 1)
    assert isinstance(caught.value.__cause__, KeyError)
    assert world.running == world.manager.queue.running == 0


@pytest.mark.anyio
async def test_a_failure_of_training_ends_generation_and_loses_no_prompt() -> None:
    """Goal: structured: the trainer's own error comes out, nothing runs on, and the manager stands before what had
    not been trained on. Red without the roll-back: the next prompts were skipped.
    """

    async def forever() -> None:
        if world.version == 1:
            await anyio.sleep_forever()

    async def fail() -> None:
        if world.version == 1:
            raise FloatingPointError("nan")

    world = World(pause=forever)
    with pytest.raises(FloatingPointError, match="nan"):
        await world.train(6, 1, train_pause=fail)
    assert world.running == world.manager.queue.running == 0
    world.pause = no_pause
    assert (
        prompts_of([await world.manager.generate_batch()])
        == stream_of_prompts(3 * BATCH)[2 * BATCH :]
    )


@pytest.mark.anyio
@pytest.mark.parametrize("in_flight_updates", [False, True])
async def test_cancelling_from_outside_leaves_nothing_running(in_flight_updates: bool) -> None:
    """Goal: structured cancellation, wherever it strikes. Red when the producer was not cancelled (it never ended)."""
    world = World(pause=anyio.sleep_forever)
    with anyio.move_on_after(0.05) as scope:
        await world.train(3, 1, in_flight_updates=in_flight_updates)
    assert scope.cancelled_caught and world.running == world.manager.queue.running == 0
    assert world.manager.buffer.get_prompts(BATCH) == stream_of_prompts(BATCH)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "filters", [{}, {"filter_fn": even_seeds, "retries_max": 60, "over_sampling_factor": 1.7}]
)
async def test_a_saved_state_goes_on_exactly(filters: dict[str, Any]) -> None:
    """Goal: from the state after any step, through JSON, exactly the batches that would have come: carried groups as
    they were, running ones sampled again. Red when running groups were left out of the state, and when they were begun
    in rounds of another size.
    """
    states: dict[int, str] = {}
    whole = World(seed=3, **filters)

    def save(step: int) -> None:
        states[step] = json.dumps(whole.manager.save_state())

    expected = await whole.train(8, 2, after_step=save)
    for step, state in states.items():
        resumed = World(seed=50 + step, **filters)
        resumed.manager.load_state(json.loads(state))
        found = await resumed.train(8, 2, first=step)
        assert [batch.samples for batch in found] == [batch.samples for batch in expected[step:]]


@pytest.mark.anyio
async def test_a_saved_state_under_in_flight_updates_skips_and_repeats_no_prompt() -> None:
    """Goal: NeMo-RL#3599. Red when the buffer's own position was saved, which is ahead of the trainer."""
    states: dict[int, str] = {}
    whole = World(seed=4)
    await whole.train(
        8,
        3,
        in_flight_updates=True,
        after_step=lambda s: states.update({s: json.dumps(whole.manager.save_state())}),
    )
    for step, state in states.items():
        resumed = World(seed=9)
        resumed.manager.load_state(json.loads(state))
        batches = await resumed.train(8, 3, first=step, in_flight_updates=True)
        assert prompts_of(batches) == stream_of_prompts(8 * BATCH)[step * BATCH :]


@pytest.mark.anyio
async def test_rewards_overlap_with_generation() -> None:
    """Goal: an async reward of one group runs while another group is still sampled. Red (a deadlock) when rewards
    waited for all groups of the round.
    """
    scored = anyio.Event()
    numbers = iter(range(1000))

    async def pause() -> None:
        if next(numbers) == 0:
            await scored.wait()

    async def reward(sample: Sample) -> float:
        scored.set()
        return 1.0

    assert len(await World(pause=pause, reward_fn=reward).train(2, 1)) == 2


@pytest.mark.anyio
async def test_retries_are_bounded() -> None:
    """Goal: a filter that lets nothing through ends the run with the counts. Red (endless) without the bound."""

    def nothing_passes(group: list[Sample]) -> bool:
        return False

    with pytest.raises(
        RolloutError,
        match=r"0 of 3 groups after 3 rounds, 18 groups started: nothing_passes dropped 18",
    ):
        await World(filter_fn=nothing_passes, retries_max=2).train(4, 1)


@pytest.mark.anyio
async def test_ages_are_told() -> None:
    """Goal: how old samples are when they are trained on. Red with the ages of the batch before."""
    (first, second) = await World().train(2, 1, train_pause=lambda: anyio.sleep(0.02))
    for batch in (first, second):
        assert 0 <= batch.metadata["age_s_mean"] <= batch.metadata["age_s_max"] < 30
    assert second.metadata["age_s_mean"] > 0.02


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("manager", "options", "message"),
    [
        (
            object(),
            {},
            "policy_lag_steps_max=1: needs an AsyncRolloutManager to generate ahead with, got object",
        ),
        (None, {"sync_every": 2}, "policy_lag_steps_max=1: needs 0, or >= sync_every=2"),
    ],
)
async def test_a_lag_that_cannot_be_is_refused(
    manager: Any, options: dict[str, Any], message: str
) -> None:
    """Goal: a message before anything starts. Red without the checks: an AttributeError, and a run that hangs."""
    config = RLTrainingConfig(num_steps=4, policy_lag_steps_max=1, **options)
    with pytest.raises(ValueError, match=message):
        async with open_rollouts(manager or World().manager, config, EnginePool.of([])):
            pass


@pytest.mark.anyio
@pytest.mark.parametrize("lag", [0, 1])
async def test_what_runs_at_the_engines_is_aborted_on_the_way_out(lag: int) -> None:
    """Goal: an engine that cannot see that its client is gone is told, within a time, and never after a run that ended
    well. Red without the call, and when it was made at every end.
    """
    aborted: list[str] = []

    class Engine:
        async def abort(self) -> None:
            await anyio.lowlevel.checkpoint()
            aborted.append("all")

    config = RLTrainingConfig(num_steps=1, policy_lag_steps_max=lag)

    async def one_batch(world: World) -> None:
        async with open_rollouts(world.manager, config, EnginePool.of([Engine()])) as rollouts:
            async with rollouts.updating(0):
                pass
            await rollouts.next_batch()

    await one_batch(World())
    assert aborted == []
    with anyio.CancelScope() as scope:

        async def pause() -> None:
            scope.cancel()  # once one is generated
            await anyio.sleep_forever()

        await one_batch(World(pause=pause))
    assert aborted == ["all"]


@pytest.mark.anyio
async def test_an_engine_that_hangs_keeps_no_other_from_being_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: all engines are told at once, within the time. Red when one was told after another."""
    monkeypatch.setattr(rollout_stream, "ABORT_TIMEOUT_S", 0.2)
    aborted: list[str] = []

    class Engine:
        async def abort(self) -> None:
            aborted.append("healthy")

    class Hanging:
        async def abort(self) -> None:
            await anyio.sleep_forever()

    with pytest.raises(ZeroDivisionError):
        async with open_rollouts(
            World().manager, RLTrainingConfig(num_steps=1), EnginePool.of([Hanging(), Engine()])
        ):
            raise ZeroDivisionError
    assert aborted == ["healthy"]
