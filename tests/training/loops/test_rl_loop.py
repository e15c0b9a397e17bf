"""The RL loop: advantages, the prepared batch, sync, logs, resume. What samples is the policy, in this process."""

import json
import math
import random
from pathlib import Path

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollouts.training.loops import compute_advantages, prepare_grpo_batch, run_rl_training
from rollouts.training.loops.rollout_metrics import rollout_metrics
from rollouts.training.metrics import JSONLLogger
from rollouts.training.rewards import RewardError
from rollouts.training.rl_losses import grpo_loss, ppo_loss
from rollouts.training.types import RLTrainingConfig, RolloutBatch, Sample
from tests.training.tiny import EOS, PAD, VOCAB, rollout_batch, sft_samples, tiny_backend

TEMPERATURE = 0.8


class CountingBuffer:
    """Prompts of three tokens by number: as much of a DataBuffer as the loop uses."""

    def __init__(self) -> None:
        self.position = 0

    def get_prompts(self, count: int) -> list[str]:
        first, self.position = self.position, self.position + count
        return [f"{number}" for number in range(first, self.position)]

    def save_state(self) -> dict:
        return {"position": self.position}

    def load_state(self, state: dict) -> None:
        self.position = state["position"]


class PolicyEngine:
    """An engine that loads the directories it is pointed at; `paths` are their names, in order."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.model: torch.nn.Module | None = None

    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict:
        self.paths.append(Path(checkpoint_path).name)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint_path, dtype=torch.float32)
        return {"success": True}


class PolicyManager:
    """Groups of one-token answers sampled from the engine's weights; a pure function of the weights and the prompt."""

    def __init__(
        self, buffer: CountingBuffer, engine: PolicyEngine, groups: int = 4, group_size: int = 8
    ) -> None:
        self.buffer, self.engine, self.groups, self.group_size = buffer, engine, groups, group_size

    @torch.no_grad()
    async def generate_batch(self, reward_fn=None) -> RolloutBatch:
        samples = []
        for prompt in self.buffer.get_prompts(self.groups):
            rng = random.Random(prompt)
            ids = [rng.randrange(2, VOCAB) for _ in range(3)]
            logits = self.engine.model(input_ids=torch.tensor([ids])).logits[0, -1]
            log_probs = torch.log_softmax(logits / TEMPERATURE, -1)
            for _ in range(self.group_size):
                token = rng.choices(range(VOCAB), log_probs.exp().tolist())[0]
                sample = Sample(
                    prompt=prompt,
                    response=str(token),
                    tokens=[*ids, token],
                    loss_mask=[0.0, 0.0, 0.0, 1.0],
                    rollout_log_probs=[log_probs[token].item()],
                    metadata={
                        "weight_version": self.engine.paths[-1].removeprefix("version_"),
                        "finish_reason": "length",
                    },
                    response_length=1,
                )
                sample.reward = reward_fn(sample)
                samples.append(sample)
        return RolloutBatch(
            tokens=[s.tokens for s in samples],
            loss_masks=[s.loss_mask for s in samples],
            rewards=[s.reward for s in samples],
            response_lengths=[1] * len(samples),
            metadata={"groups_kept": self.groups, "groups_dropped": {"check_any_success": 2}},
            samples=samples,
            group_ids=[index // self.group_size for index in range(len(samples))],
        )


def likes_low_tokens(sample: Sample) -> float:
    return float(sample.tokens[-1] < VOCAB // 2)


def run(
    directory: Path,
    config: RLTrainingConfig,
    *,
    loss_fn=grpo_loss,
    resume=False,
    runtime="asyncio",
    engine=None,
    **options,
):
    backend = tiny_backend(directory / "rl", loss_fn=loss_fn, lr=2e-2, seed=99 if resume else 0)
    buffer, engine = CountingBuffer(), engine or PolicyEngine()
    manager = PolicyManager(buffer, engine)

    async def main():
        state = await backend.load_checkpoint(directory / "rl" / "latest") if resume else None
        return await run_rl_training(
            backend,
            buffer,
            manager,
            [engine],
            config,
            **{
                "reward_fn": likes_low_tokens,
                "temperature": TEMPERATURE,
                "resume": state,
                **options,
            },
        )

    return anyio.run(main, backend=runtime), backend, engine


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
@pytest.mark.parametrize("loss_fn", [grpo_loss, ppo_loss])
def test_it_learns_what_is_rewarded(tmp_path, loss_fn, runtime):
    """Goal: the reward rises, on fresh prompts each step. Red with the advantages' sign flipped."""
    config = RLTrainingConfig(num_steps=20, baseline="group_mean")
    metrics, _, engine = run(tmp_path, config, loss_fn=loss_fn, runtime=runtime)
    rewards = [record["reward_mean"] for record in metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    assert engine.paths == [f"version_{step:06d}" for step in range(21)]
    assert [path.name for path in (tmp_path / "rl" / "weights").iterdir()] == ["version_000020"]
    training = {
        "loss",
        "grad_norm",
        "lr",
        "entropy",
        "logp_diff_abs",
        "kl_sampler",
        "clip_fraction",
    }
    rollouts = {
        "reward_mean",
        "reward_std",
        "lag_max",
        "response_length_mean",
        "truncated_frac",
        "groups_kept",
    }
    times = {
        "tokens_per_s",
        "generate_s",
        "train_s",
        "sync_s",
        "step_s",
        "groups_dropped_check_any_success",
    }
    assert metrics[0]["groups_dropped"] == 2
    assert training | rollouts | times <= set(metrics[0])


def test_sampler_and_trainer_agree_on_policy(tmp_path):
    """Goal: at the sampler's temperature and weights |Δlogp| is rounding at every step (trl#4159, slime#780).

    Red with the temperature not passed on (0.1 and more), and with old log-probs shifted by one token.
    """
    metrics, _, _ = run(tmp_path, RLTrainingConfig(num_steps=3, baseline="group_mean"))
    assert max(record["logp_diff_abs"] for record in metrics) < 1e-6
    assert max(record["kl_sampler"] for record in metrics) < 1e-10
    assert {record["clip_fraction"] for record in metrics} == {0.0}
    assert {record["lag_max"] for record in metrics} == {0}


def test_sync_every_and_staleness(tmp_path):
    """Goal: weights go out every N steps and after the last, and the lag is seen. Red with the last one left out."""
    config = RLTrainingConfig(num_steps=5, sync_every=2, baseline="group_mean")
    metrics, backend, engine = run(tmp_path, config, weights_dir=tmp_path / "shared")
    assert engine.paths == [f"version_{step:06d}" for step in (0, 2, 4, 5)]
    assert [record["lag_max"] for record in metrics] == [0, 1, 0, 1, 0]
    assert [record["logp_diff_abs"] < 1e-6 for record in metrics] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert (tmp_path / "shared" / "version_000005").is_dir()
    for a, b in zip(engine.model.parameters(), backend.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_failed_sync_ends_the_run(tmp_path):
    """Goal: no step trains on weights an engine refused. Red with the result of the update ignored."""

    class Refusing(PolicyEngine):
        async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict:
            if self.paths:
                return {"success": False, "message": "no room"}
            return await super().update_weights_from_checkpoint(checkpoint_path)

    backend, buffer, engine = (
        tiny_backend(tmp_path, loss_fn=grpo_loss),
        CountingBuffer(),
        Refusing(),
    )
    with pytest.raises(Exception, match="no room"):
        anyio.run(
            lambda: run_rl_training(
                backend,
                buffer,
                PolicyManager(buffer, engine),
                [engine],
                RLTrainingConfig(num_steps=3),
                reward_fn=likes_low_tokens,
            )
        )
    assert backend.step == 1


def test_resume_is_bit_for_bit(tmp_path):
    """Goal: 2 + resume + 2 steps equal 4: prompts, samples, weights. Red with the buffer's state not restored."""
    options = {"baseline": "group_mean", "advantage_norm": "group_std"}
    expected, whole, _ = run(tmp_path / "whole", RLTrainingConfig(num_steps=4, **options))
    first, _, _ = run(tmp_path / "half", RLTrainingConfig(num_steps=2, **options))
    second, resumed, engine = run(
        tmp_path / "half", RLTrainingConfig(num_steps=4, **options), resume=True
    )
    assert engine.paths[0] == "version_000002"
    for key in ("loss", "reward_mean", "entropy", "grad_norm", "step"):
        assert [record[key] for record in first + second] == [record[key] for record in expected]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )


def test_every_sample_is_logged(tmp_path):
    """Goal: rollouts.jsonl holds each sample whole, to look at or train on again. Red with only the first group."""
    logger = JSONLLogger(tmp_path / "rollouts.jsonl", stage="rl")
    run(tmp_path, RLTrainingConfig(num_steps=2, baseline="group_mean"), rollouts_logger=logger)
    records = [json.loads(line) for line in logger.path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1] * 32 + [2] * 32
    record = records[0]
    assert record["tokens"][-1] == int(record["response"])
    assert (record["prompt"], record["group"], record["weight_version"], record["stage"]) == (
        "0",
        0,
        "000000",
        "rl",
    )
    assert record["reward"] == likes_low_tokens(
        Sample("", tokens=record["tokens"], loss_mask=[0.0] * 4)
    )
    group = records[:8]
    mean = sum(record["reward"] for record in group) / 8
    assert [record["advantage"] for record in group] == pytest.approx(
        [r["reward"] - mean for r in group]
    )
    assert all(math.isfinite(record["rollout_log_probs"][0]) for record in records)


def test_the_trainer_s_log_probs_are_beside_the_sampler_s(tmp_path):
    """Goal: of weights that did not change since they sampled both are the same, token by token; of older ones each
    step's mean difference is the one that was logged. A step that fails has its samples all the same, without them.
    Red with the log-probs of another step, and with the samples logged after a step alone."""
    logger = JSONLLogger(tmp_path / "rollouts.jsonl")
    config = RLTrainingConfig(num_steps=3, baseline="group_mean", sync_every=2, micro_batch_size=5)
    metrics, _, _ = run(tmp_path, config, rollouts_logger=logger)
    records = [json.loads(line) for line in logger.path.read_text().splitlines()]
    for step, metric in enumerate(metrics, start=1):
        pairs = [
            (record["trainer_log_probs"][0], record["rollout_log_probs"][0])
            for record in records
            if record["step"] == step
        ]
        differences = [abs(trainer - sampler) for trainer, sampler in pairs]
        assert sum(differences) / 32 == pytest.approx(metric["logp_diff_abs"], abs=1e-6)
        assert (max(differences) < 2e-6) == (step != 2)

    def fails(logits, labels, loss_mask):
        raise FloatingPointError("no number")

    failed = JSONLLogger(tmp_path / "failed.jsonl")
    with pytest.raises(FloatingPointError):
        run(tmp_path / "failed", config, loss_fn=fails, rollouts_logger=failed)
    records = [json.loads(line) for line in failed.path.read_text().splitlines()]
    assert [record["trainer_log_probs"] for record in records] == [None] * 32


def test_evaluation_and_checkpoints_come_when_due(tmp_path):
    """Goal: before the first step, every N, after the last, on that step's weights. Red with the sync after it."""
    seen = []
    saved = []
    engine = PolicyEngine()
    metrics, _, _ = run(
        tmp_path,
        RLTrainingConfig(num_steps=3, baseline="group_mean", checkpoint_every=2),
        engine=engine,
        eval_fn=lambda step: seen.append((step, engine.paths[-1])) or {"exact_match": 0.5},
        eval_every=2,
        on_checkpoint=lambda path, step: saved.append((path.name, step)),
    )
    assert seen == [(step, f"version_{step:06d}") for step in (0, 2, 3)]
    assert [record.get("eval_exact_match") for record in metrics] == [None, 0.5, 0.5]
    assert saved == [("step_000002", 2), ("step_000003", 3)]


def test_prepared_batch_aligns_everything_to_tokens():
    """Goal: log-prob t belongs to token t (prime-rl#1525, trl#3681). Red with old_log_probs starting one too early."""
    rollouts = rollout_batch(2, 2)
    config = RLTrainingConfig(num_steps=1, baseline="group_mean")
    batch = prepare_grpo_batch(
        rollouts, rollouts.rewards, config, pad_token_id=PAD, temperature=0.7, clip_range=0.1
    )
    for row, sample in enumerate(rollouts.samples):
        length, start = len(sample.tokens), len(sample.tokens) - sample.response_length
        assert batch["input_ids"][row, :length].tolist() == sample.tokens
        assert batch["loss_mask"][row].tolist()[:length] == sample.loss_mask
        assert sample.tokens[-1] == EOS
        assert batch["loss_mask"][row, length - 1] == 1.0
        old = batch["old_log_probs"][row]
        assert old[start:length].tolist() == pytest.approx(sample.rollout_log_probs)
        assert not old[:start].any()
        assert not old[length:].any()
    assert (batch["temperature"], batch["clip_range"]) == (0.7, 0.1)
    assert batch["tokens_global"] == sum(rollouts.response_lengths)
    assert batch["advantages"].tolist() == pytest.approx(
        compute_advantages(rollouts.rewards, "group_mean", group_ids=[0, 0, 1, 1])
    )


def test_prepared_batch_without_log_probs_has_none():
    """Goal: a hand-made RolloutBatch works, with no log-probs made up for it. Red with zeros in their place."""
    samples = sft_samples(2)
    rollouts = RolloutBatch(
        [s.tokens for s in samples], [s.loss_mask for s in samples], [1.0, 0.0], [1, 1]
    )
    assert "old_log_probs" not in prepare_grpo_batch(
        rollouts, rollouts.rewards, RLTrainingConfig(num_steps=1)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.rewards.pop(), "needs one of each per sample, and at least one"),
        (
            lambda b: b.samples.__setitem__(0, sft_samples(1)[0]),
            "3 of 4 samples have rollout_log_probs",
        ),
        (
            lambda b: [mask.__setitem__(slice(None), [0.0] * len(mask)) for mask in b.loss_masks],
            "no trained token in 4",
        ),
    ],
)
def test_rollouts_that_do_not_fit_are_named(change, message):
    """Goal: a broken batch is an error, never a shorter one. Red with zip() without strict and no checks."""
    rollouts = rollout_batch(2, 2)
    change(rollouts)
    with pytest.raises(ValueError, match=message):
        prepare_grpo_batch(rollouts, rollouts.rewards, RLTrainingConfig(num_steps=1))


def test_rollout_metrics():
    """Goal: truncation and lag are read from what the engine said. Red with finish_reason compared as text alone."""
    rollouts = rollout_batch(2, 2)
    rollouts.rewards = [0.0, 1.0, 1.0, 1.0]
    rollouts.samples[0].metadata = {
        "weight_version": "3",
        "finish_reason": {"type": "length", "length": 8},
    }
    rollouts.samples[1].metadata = {"weight_version": "default", "finish_reason": "length"}
    for sample in rollouts.samples[2:]:
        sample.metadata = {"weight_version": "5", "finish_reason": {"type": "stop"}}
    metrics = rollout_metrics(rollouts, steps_applied=5)
    assert metrics["reward_mean"] == 0.75
    assert metrics["reward_std"] == pytest.approx(math.sqrt(3) / 4)
    assert (metrics["truncated_frac"], metrics["lag_max"]) == (0.5, 2)
    assert (metrics["groups_kept"], metrics["groups_dropped"]) == (2, 0)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1e200, -1e39])
def test_a_reward_that_float32_cannot_hold_names_its_prompt(reward):
    """Goal: which prompt and response, before anything is trained. Red without the check: a loss of NaN, or inf."""
    rollouts = rollout_batch(2, 2)
    rollouts.samples[1].prompt, rollouts.samples[1].response = "how many?", "many"
    with pytest.raises(
        RewardError, match=r"reward (nan|inf|1e\+200|-1e\+39) of 'many'.*prompt how many\?"
    ):
        prepare_grpo_batch(
            rollouts, [0.0, reward, 0.0, 1.0], RLTrainingConfig(num_steps=1), pad_token_id=PAD
        )
