"""Rewards with a time limit, in processes of their own: real ones, that hang, die and raise."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.rewards import RewardError, resolve
from rollouts.training.rewards.scoring import scoring
from rollouts.training.rewards.worker_pool import RewardWorkers
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager, RolloutError
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.types import REWARD_FAILURE, RolloutConfig, Sample

BY_TEXT = "tests.training.slow_rewards.by_text"
PATIENCE_S = 200.0


def sample(response: str) -> Sample:
    return Sample(prompt={"messages": [], "row": 7}, response=response)


@pytest.fixture(scope="module")
def workers() -> Iterator[RewardWorkers]:
    """Two processes; a time limit that a reward which does nothing keeps even on a busy machine."""
    with RewardWorkers(BY_TEXT, workers=2, timeout_s=2.0) as reward:
        yield reward


async def score(reward: Any, *responses: str) -> tuple[list[Any], list[Sample]]:
    samples = [sample(response) for response in responses]

    def call(one: Sample) -> Any:
        return lambda: reward(one)

    with anyio.fail_after(PATIENCE_S):
        return await gather_in_order([call(one) for one in samples]), samples


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which nobody waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.anyio
async def test_results_are_in_order_and_failures_are_no_results(workers: RewardWorkers) -> None:
    """Goal: values stand where their samples do; what hangs, dies or cannot be scored is None, and says why.

    Red with the timed-out worker put back (the next answer was the last one's), and with the death raised.
    """
    rewards, samples = await score(workers, "1 0.2", "hang", "0.5", "die", "none", "2")
    assert rewards == [1.0, None, 0.5, None, None, 2.0]
    failures = [one.metadata.get(REWARD_FAILURE) for one in samples]
    assert failures == [None, "reward_timeout", None, "reward_death", None, None]
    assert (await score(workers, "3", "4"))[0] == [3.0, 4.0]


@pytest.mark.anyio
async def test_workers_are_reused_and_no_more_than_asked_for() -> None:
    """Goal: `workers` processes for any number of samples, none of them this one. Red without the limiter."""
    with RewardWorkers(
        "tests.training.slow_rewards.process_id", workers=2, timeout_s=30.0
    ) as reward:
        ids, _ = await score(reward, *"abcdefgh")
        more, _ = await score(reward, *"abcdefgh")
        assert len({*ids, *more}) <= 2 and os.getpid() not in ids
        assert all(alive(int(pid)) for pid in {*ids, *more})
    assert not any(alive(int(pid)) for pid in {*ids, *more})


@pytest.mark.anyio
async def test_what_a_reward_raises_names_it_and_the_prompt(workers: RewardWorkers) -> None:
    """Goal: the user's own mistake, with its place. Red with the error's text left out of the reply."""
    with pytest.raises(
        RewardError,
        match=r"slow_rewards.by_text raised KeyError: 'x' \(.*slow_rewards.py:\d+\).*'row': 7",
    ):
        await score(workers, "raise x")
    with pytest.raises(
        RewardError, match="raised ValueError: could not convert string to float: 'much'"
    ):
        await score(workers, "text")
    assert (await score(workers, "1"))[0] == [1.0]


@pytest.mark.anyio
async def test_a_path_that_cannot_be_imported_is_told() -> None:
    """Goal: a worker that never came up says why, and does not hang. Red with the import outside the try."""
    missing = RewardWorkers("tests.training.no_such.f", workers=1, timeout_s=30.0)
    with missing, pytest.raises(RewardError, match=r"no module 'tests.training.no_such'"):
        await score(missing, "1")


@pytest.mark.anyio
async def test_cancellation_leaves_no_process(tmp_path: Path) -> None:
    """Goal: a cancelled call ends its worker and the worker's own child, and the pool goes on.

    Red without the kill in `_Call.end`: both were alive after.
    """
    note = tmp_path / "pids"
    with RewardWorkers(BY_TEXT, workers=1, timeout_s=1e6) as reward:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reward, sample(f"hang {note}"))
            with anyio.fail_after(PATIENCE_S):
                while not (note.exists() and note.read_text().count(" ")):
                    await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()
        pids = [int(pid) for pid in note.read_text().split()]
        assert len(pids) == 2
        deadline = time.monotonic() + PATIENCE_S
        while any(map(alive, pids)):
            assert time.monotonic() < deadline, "a process outlived the call"
            await anyio.sleep(0.02)
        assert (await score(reward, "1"))[0] == [1.0]


@pytest.mark.anyio
async def test_async_rewards_are_cut_off_in_this_process() -> None:
    """Goal: functions and instances alike. Red with instances taken for plain ones: no limit, the test hung."""
    for path, value in (("slow_async", 1.0), ("half", 0.5)):
        with scoring(f"tests.training.slow_rewards.{path}", workers=4, timeout_s=0.2) as reward:
            rewards, samples = await score(reward, "hang", "well")
        assert rewards == [None, value] and samples[0].metadata == {
            REWARD_FAILURE: "reward_timeout"
        }


def test_a_fast_reward_stays_in_this_process() -> None:
    """Goal: no process and no coroutine where none is asked for. Red with workers always started."""
    with scoring("tests.training.slow_rewards.process_id", workers=0, timeout_s=60.0) as reward:
        assert reward(sample("x")) == float(os.getpid())


def test_a_slow_one_in_this_process_is_no_result() -> None:
    """Goal: the limit means the same wherever a reward runs, though here it is seen only afterwards. Red without."""
    slow = sample("1 0.1")
    with scoring(BY_TEXT, workers=0, timeout_s=0.05) as reward:
        assert reward(slow) is None
    assert slow.metadata == {REWARD_FAILURE: "reward_timeout"}


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["by_text", "raises_async", "handed_on"])
async def test_what_a_reward_raises_in_this_process_names_it_too(name: str) -> None:
    """Goal: one line with reward, place and prompt, as from a worker. Red when it came out bare: a KeyError."""
    with (
        scoring(f"tests.training.slow_rewards.{name}", workers=0, timeout_s=30.0) as reward,
        pytest.raises(
            RewardError,
            match=rf"slow_rewards.{name} raised KeyError: 'x' \(.*slow_rewards.py:\d+\).*'row': 7",
        ) as caught,
    ):
        value = reward(sample("raise x"))
        await value
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["by_text", "raises_async", "handed_on"])
async def test_a_reward_that_exits_is_a_mistake_as_any(name: str, workers: RewardWorkers) -> None:
    """Goal: `sys.exit` in a reward is told with its place, here and in a worker. Red with Exception caught alone: the
    event loop ended, a thread of the trainer did not, and a run stood still until its time was up."""
    told = rf"slow_rewards.{name} raised SystemExit: 3 \(.*slow_rewards.py:\d+\).*'row': 7"
    with (
        scoring(f"tests.training.slow_rewards.{name}", workers=0, timeout_s=30.0) as reward,
        pytest.raises(RewardError, match=told),
    ):
        await score(reward, "exit 3")
    if name == "by_text":
        with pytest.raises(RewardError, match=told):
            await score(workers, "exit 3")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise ValueError('no key')", "ValueError: no key"),
        ("1 +", "SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(
    line: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: what a reward's module does when it is imported is the user's to mend: one sentence with the place. Red
    with Exception caught alone: `sys.exit` came through."""
    (tmp_path / "on_import_of_a_reward.py").write_text(f"{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    kind = {
        "import": "SystemExit: 0",
        "raise": "ValueError: no key",
        "1": "SyntaxError: invalid syntax",
    }[line.split(maxsplit=1)[0]]
    with pytest.raises(RewardError, match=rf"importing on_import_of_a_reward raised {kind}"):
        resolve("on_import_of_a_reward.reward")


@pytest.mark.anyio
async def test_a_plain_function_that_gives_a_coroutine_is_cut_off() -> None:
    """Goal: what is awaited has the limit, however it was made. Red (it hung) when only `async def` had it."""
    with scoring("tests.training.slow_rewards.handed_on", workers=0, timeout_s=0.2) as reward:
        rewards, samples = await score(reward, "hang", "well")
    assert rewards == [None, 1.0] and samples[0].metadata == {REWARD_FAILURE: "reward_timeout"}


@pytest.mark.anyio
async def test_a_batch_goes_on_without_the_groups_that_failed(workers: RewardWorkers) -> None:
    """Goal: the group is dropped and counted by cause; where none is left the error says so.

    Red with UNSCORABLE for all.
    """
    texts = {"a": ["1", "0"], "b": ["hang", "1"], "c": ["0.5", "die"], "d": ["1", "1"]}

    def generate(prompts: list[Any], *, seed: int) -> list[Sample]:
        said = [texts[prompt][index] for index, prompt in enumerate(prompts)]
        return [
            Sample(prompt=prompt, response=text) for prompt, text in zip(prompts, said, strict=True)
        ]

    config = RolloutConfig(
        batch_size=2,
        n_samples_per_prompt=2,
        over_sampling_factor=2.0,
        generate_fn=generate,
        reward_fn=workers,
    )
    batch = await AsyncRolloutManager(DataBuffer(list(texts)), config).generate_batch()
    assert sorted(batch.rewards) == [0.0, 1.0, 1.0, 1.0]
    assert batch.metadata["groups_dropped"] == {"reward_timeout": 1, "reward_death": 1}
    only = RolloutConfig(
        batch_size=1, n_samples_per_prompt=2, generate_fn=generate, reward_fn=workers, retries_max=0
    )
    with pytest.raises(RolloutError, match="reward_death dropped 1"):
        await AsyncRolloutManager(DataBuffer(["c"]), only).generate_batch()
