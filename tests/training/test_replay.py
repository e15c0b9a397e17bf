"""Saved rollouts: read back as they were, trained on again without an engine, and written without training."""

import json
import math
from pathlib import Path

import anyio
import pytest
import torch

from rollouts.data_formats.row import DataError
from rollouts.training.loops import collect_rollouts, run_rl_training
from rollouts.training.loops.rollout_metrics import log_samples
from rollouts.training.metrics import JSONLLogger
from rollouts.training.replay import ReplayRollouts
from rollouts.training.rl_losses import ppo_loss
from rollouts.training.types import RLTrainingConfig, RolloutBatch
from tests.training.loops.test_rl_loop import (
    TEMPERATURE,
    CountingBuffer,
    PolicyEngine,
    PolicyManager,
    likes_low_tokens,
    run,
)
from tests.training.tiny import rollout_batch, tiny_backend

METADATA = {
    "weight_version": "7",
    "finish_reason": {"type": "length", "length": 4},
    "prompt_id": "ab",
}
COLLIDING = {
    "reward": "mine",
    "step": -1,
    "time": 0,
    "metadata": {"a": [1, None]},
    "group": "x",
    "ключ": "значение",
}


def write(path: Path, batches: list[RolloutBatch], first_step: int = 1) -> Path:
    logger = JSONLLogger(path, stage="rl")
    for step, batch in enumerate(batches, start=first_step):
        log_samples(logger, batch, [0.5] * len(batch.samples), step, TEMPERATURE)
    logger.finish()
    return path


def replay_of(path: Path) -> ReplayRollouts:
    return ReplayRollouts(path, temperature=TEMPERATURE)


def read_all(path: Path, count: int | None = None) -> list[RolloutBatch]:
    source = replay_of(path)
    return [
        anyio.run(source.generate_batch) for _ in range(len(source) if count is None else count)
    ]


def test_samples_read_back_exactly(tmp_path):
    """Goal: tokens, masks, log-probs to the last bit, rewards, groups, versions, whatever metadata is called.

    Red with metadata written beside our own fields: a metadata "reward" or "step" is lost.
    """
    batches = [rollout_batch(2, 3, seed=1), rollout_batch(3, 2, seed=2)]
    for sample in batches[0].samples:
        sample.prompt = {
            "messages": [{"role": "user", "content": "žluť \u2028 \U0001f600"}],
            "answer": "1",
        }
        sample.metadata = {**METADATA, **COLLIDING}
    batches[0].rewards[0] = batches[0].samples[0].reward = 0.1 + 0.2
    batches[0].samples[1].rollout_log_probs[0] = -5e-324
    batches[1].samples[0].rollout_log_probs = None
    batches[1].samples[1].metadata = {}
    for found, batch in zip(
        read_all(write(tmp_path / "rollouts.jsonl", batches)), batches, strict=True
    ):
        assert found.samples == batch.samples
        assert (found.tokens, found.loss_masks, found.rewards) == (
            batch.tokens,
            batch.loss_masks,
            batch.rewards,
        )
        assert (found.response_lengths, found.group_ids) == (
            batch.response_lengths,
            batch.group_ids,
        )


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
def test_a_replay_reproduces_the_run_bit_for_bit(tmp_path, runtime):
    """Goal: the run's own rollouts, from the same start, give its losses and its weights, also resumed half-way.

    Red with the groups' ids not restored (other advantages), and with the state of the replay left out of checkpoints.
    """
    config = RLTrainingConfig(
        num_steps=4, sync_every=2, baseline="group_mean", advantage_norm="group_std"
    )
    logger = JSONLLogger(tmp_path / "rollouts.jsonl")
    expected, live, _ = run(
        tmp_path / "live", config, loss_fn=ppo_loss, runtime=runtime, rollouts_logger=logger
    )

    def replay(directory: Path, num_steps: int, *, resume: bool = False):
        backend = tiny_backend(directory, loss_fn=ppo_loss, lr=2e-2, seed=99 if resume else 0)

        async def main():
            state = await backend.load_checkpoint(directory / "latest") if resume else None
            source = replay_of(logger.path)
            steps = RLTrainingConfig(
                num_steps=num_steps, baseline="group_mean", advantage_norm="group_std"
            )
            return await run_rl_training(
                backend, None, source, [], steps, temperature=TEMPERATURE, resume=state
            )

        return anyio.run(main, backend=runtime), backend

    whole, backend = replay(tmp_path / "whole", 4)
    first, _ = replay(tmp_path / "half", 2)
    second, resumed = replay(tmp_path / "half", 4, resume=True)
    for key in (
        "loss",
        "grad_norm",
        "reward_mean",
        "entropy",
        "logp_diff_abs",
        "clip_fraction",
        "lag_max",
        "lag_mean",
    ):
        assert [record[key] for record in whole] == [record[key] for record in expected], key
        assert [record[key] for record in first + second] == [record[key] for record in expected], (
            key
        )
    for a, b, c in zip(*(b.model.parameters() for b in (live, backend, resumed)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_checkpoint_of_a_replay_is_no_checkpoint_of_a_live_run(tmp_path):
    """Goal: a run is resumed as it began, or the error says so. Red with a missing state passed over."""
    path = write(tmp_path / "rollouts.jsonl", [rollout_batch(2, 2)])
    backend = tiny_backend(tmp_path / "rl", loss_fn=ppo_loss)
    anyio.run(
        lambda: run_rl_training(backend, None, replay_of(path), [], RLTrainingConfig(num_steps=1))
    )
    state = anyio.run(backend.load_checkpoint, tmp_path / "rl" / "latest")
    buffer, engine = CountingBuffer(), PolicyEngine()
    manager = PolicyManager(buffer, engine)
    with pytest.raises(
        ValueError,
        match="the checkpoint has no state of a buffer: it was saved by a run that sampled otherwise",
    ):
        anyio.run(
            lambda: run_rl_training(
                backend, buffer, manager, [], RLTrainingConfig(num_steps=2), resume=state
            )
        )


def test_it_goes_round_and_can_be_scored_anew(tmp_path):
    """Goal: epochs over saved rollouts; another reward, plain or async. Red with StopIteration at the end."""
    path = write(tmp_path / "rollouts.jsonl", [rollout_batch(1, 2, seed=seed) for seed in (1, 2)])
    tokens = [batch.tokens for batch in read_all(path, 5)]
    assert tokens[:2] == tokens[2:4] and tokens[4] == tokens[0] != tokens[1]

    async def by_length(sample) -> float:
        return sample.response_length

    for reward_fn in (by_length, lambda sample: sample.response_length):
        batch = anyio.run(replay_of(path).generate_batch, reward_fn)
        assert batch.rewards == [float(n) for n in batch.response_lengths]


def test_a_resumed_runs_last_word_counts(tmp_path):
    """Goal: what a killed run wrote after its last checkpoint is superseded, torn or not. Red with the first kept."""
    path = tmp_path / "rollouts.jsonl"
    old, new = rollout_batch(2, 2, seed=1), [rollout_batch(2, 2, seed=seed) for seed in (2, 3)]
    write(path, [old, old, old])
    path.write_bytes(path.read_bytes()[:-20])
    write(path, new, first_step=2)
    assert [batch.tokens for batch in read_all(path)] == [old.tokens, new[0].tokens, new[1].tokens]


def edit(path: Path, line: int, change) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = change(lines[line - 1])
    path.write_text("\n".join(lines) + "\n")


def without(key: str):
    def change(line: str) -> str:
        return json.dumps({name: value for name, value in json.loads(line).items() if name != key})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), r"rollouts.jsonl: cannot be read: No such file"),
        (lambda path: path.write_text(""), r"rollouts.jsonl: holds no rollouts"),
        (
            lambda path: path.write_text('{"step": 1, "loss": 2}\n'),
            r":1: no line of a rollouts.jsonl",
        ),
        (lambda path: path.write_text("[1]\n"), r":1: no line of a rollouts.jsonl"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            r":8: step 2 has 3 of its 4 samples.*take the lines",
        ),
        (lambda path: edit(path, 6, lambda line: ""), r":6: step 2 has 3 of its 4"),
        (lambda path: edit(path, 3, without("group")), r":3: has no 'group'; needs a line"),
        (
            lambda path: edit(path, 3, lambda line: line.replace('"tokens": [', '"tokens": [1, ')),
            r":3: no sample",
        ),
        (
            lambda path: edit(
                path, 1, lambda line: line.replace('"reward": ', '"reward": null, "was": ')
            ),
            r":1: no sample",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, change, message):
    """Goal: file, line and fix; never a step that lacks samples. Red with torn lines passed over, and no count."""
    path = write(tmp_path / "rollouts.jsonl", [rollout_batch(2, 2, seed=seed) for seed in (1, 2)])
    change(path)
    with pytest.raises(DataError, match=message):
        read_all(path)


def test_log_probs_that_were_not_finite_are_refused(tmp_path):
    """Goal: JSON's null never becomes a number. Red without the check: a TypeError out of torch, of no line."""
    batch = rollout_batch(1, 2)
    batch.samples[1].rollout_log_probs[0] = math.nan
    with pytest.raises(
        DataError, match=r":2: no sample that can be trained on: rollout_log_probs holds null"
    ):
        read_all(write(tmp_path / "rollouts.jsonl", [batch]))


def test_another_temperature_is_refused(tmp_path):
    """Goal: saved log-probs are compared only with those at their own temperature (trl#4159). Red unchecked."""
    path = write(tmp_path / "rollouts.jsonl", [rollout_batch(1, 2)])
    with pytest.raises(
        DataError, match=r":1: was sampled at temperature 0.8, and is to be trained on at 1.0"
    ):
        anyio.run(ReplayRollouts(path, temperature=1.0).generate_batch)


def test_another_file_under_the_cursor_is_refused(tmp_path):
    """Goal: a file swapped before a resume is noticed (NeMo-RL#2519). Red with the fingerprint not compared."""
    sources = [
        replay_of(write(tmp_path / name, [rollout_batch(1, 2, seed=seed)]))
        for name, seed in (("a.jsonl", 1), ("b.jsonl", 2))
    ]
    with pytest.raises(DataError, match="holds other rollouts"):
        sources[1].load_state(sources[0].save_state())


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
def test_rollouts_without_training(tmp_path, runtime):
    """Goal: what was generated and scored is in the file, and trains later as if it had come live.

    Red with the rewards not applied before the samples are written.
    """
    buffer, engine = CountingBuffer(), PolicyEngine()
    tiny_backend(tmp_path / "start", seed=3).model.save_pretrained(tmp_path / "version_0")
    anyio.run(engine.update_weights_from_checkpoint, str(tmp_path / "version_0"))
    manager = PolicyManager(buffer, engine)
    logger, metrics_logger = (
        JSONLLogger(tmp_path / "rollouts.jsonl"),
        JSONLLogger(tmp_path / "metrics.jsonl"),
    )
    evaluated: list[int] = []

    async def main():
        return await collect_rollouts(
            manager,
            3,
            logger,
            temperature=TEMPERATURE,
            reward_fn=likes_low_tokens,
            metrics_logger=metrics_logger,
            eval_fn=evaluated.append,
        )

    metrics = anyio.run(main, backend=runtime)
    batches = read_all(logger.path)
    assert [batch.rewards for batch in batches] == [
        [likes_low_tokens(s) for s in batch.samples] for batch in batches
    ]
    assert [record["reward_mean"] for record in metrics] == [
        sum(batch.rewards) / 32 for batch in batches
    ]
    assert (len(metrics), evaluated, len(metrics_logger.path.read_text().splitlines())) == (
        3,
        [0],
        3,
    )
    assert not {"lag_max", "lag_mean", "loss"} & set(metrics[0])
    again = PolicyManager(CountingBuffer(), engine)
    assert anyio.run(again.generate_batch, likes_low_tokens).samples == batches[0].samples
