"""The frozen reference: not trained, not moved by a resume, and what the trainer makes of the config's loss fields."""

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from base_config import CISPO, GSPO, PPO, Config
from rollouts.training.checkpoint import CheckpointError, Retention, read_metadata
from rollouts.training.loops.rl_loop import prepare_grpo_batch
from rollouts.training.loops.train_step import train_step
from rollouts.training.reference import as_reference, load_reference, weights_sha256
from rollouts.training.rl_losses import trained_sequences
from rollouts.worker.builders.backend import build_backend
from rollouts.worker.builders.loss import rl_loss, rl_training_config
from rollouts.worker.builders.model import reference_name
from tests.example_config import example_config, importance, kl, policy_loss, replace_at
from tests.training import tiny_task
from tests.training.test_policy_loss import inputs
from tests.training.tiny import PAD, rollout_batch, tiny_backend, tiny_model


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model that RL starts from."""
    directory = tmp_path_factory.mktemp("start")
    tiny_task.tiny_model().save_pretrained(directory)
    return directory


def kl_config(**changes: Any) -> Config:
    config = replace_at(example_config(), "rl.kl", kl())
    for field, value in changes.items():
        config = replace_at(config, f"rl.{field}", value)
    return config


def backend_of(config: Config, directory: Path, model_path: Path, *, resumes: bool = False) -> Any:
    return build_backend(
        config,
        "rl",
        checkpoint_dir=directory / "rl",
        model_path=str(model_path),
        tokenizer=tiny_task.tiny_tokenizer(),
        device=torch.device("cpu"),
        num_steps=8,
        reference=reference_name(config, "rl", str(model_path), resumes=resumes),
        retention=Retention(),
    )


async def steps(
    backend: Any, count: int, first: int = 0, micro_batch_size: int | None = None
) -> list[dict]:
    config = rl_training_config(kl_config().rl, count)
    metrics = []
    for seed in range(first, first + count):
        rollouts = rollout_batch(3, 4, seed)
        batch = prepare_grpo_batch(
            rollouts, rollouts.rewards, config, pad_token_id=PAD, temperature=0.7
        )
        metrics.append(await train_step(backend, batch, micro_batch_size))
    return metrics


def test_a_resumed_run_keeps_the_reference_it_began_with(tmp_path: Path, start: Path) -> None:
    """Goal: never re-anchored (NeMo-RL#3722): 2 + resume + 2 steps equal 4, loss and KL bit for bit.

    Red with the reference loaded from the checkpoint that is resumed: the KL starts over at 0. And it is exactly 0 at
    the first step (slime#780): red with the sampler's temperature not passed on to the reference.
    """
    config = kl_config()

    async def main() -> None:
        expected = await steps(backend_of(config, tmp_path / "whole", start), 4)
        assert expected[0]["kl_reference"] == 0.0
        assert expected[1]["kl_reference"] > 0.0
        first = backend_of(config, tmp_path / "half", start)
        found = await steps(first, 2)
        path = await first.save_checkpoint(2, {})
        assert read_metadata(path)["reference"]["name"] == str(start.resolve())
        second = backend_of(config, tmp_path / "half", path, resumes=True)
        await second.load_checkpoint(path)
        found += await steps(second, 2, first=2)
        assert found == expected

    anyio.run(main)


def test_another_reference_is_refused(tmp_path: Path, start: Path) -> None:
    """Goal: a reference whose weights changed on disk is noticed by its hash. Red with the check off."""
    config = kl_config()
    other = tmp_path / "other"
    tiny_task.tiny_model(seed=1).save_pretrained(other)

    async def main() -> None:
        first = backend_of(config, tmp_path, start)
        await steps(first, 1)
        path = await first.save_checkpoint(1, {})
        second = backend_of(kl_config(kl=kl(reference=str(other))), tmp_path, path, resumes=True)
        with pytest.raises(
            CheckpointError, match=r"penalty towards .*start.*; the reference is now .*other"
        ):
            await second.load_checkpoint(path)

    anyio.run(main)


def test_which_model_is_the_reference(tmp_path: Path, start: Path) -> None:
    """Goal: none for SFT or kl=None, the start by default, the named one if named, and an error where unknown.

    Red with model_path in place of the error.
    """
    assert reference_name(kl_config(), "sft", str(start), resumes=False) is None
    assert reference_name(kl_config(kl=None), "rl", str(start), resumes=False) is None
    assert reference_name(kl_config(), "rl", str(start), resumes=False) == str(start)
    assert (
        reference_name(kl_config(kl=kl(reference="/models/base")), "rl", str(start), resumes=True)
        == "/models/base"
    )

    async def without() -> Path:
        backend = backend_of(kl_config(kl=None), tmp_path, start)
        assert "kl_reference" not in (await steps(backend, 1))[0]
        return await backend.save_checkpoint(1, {})

    path = anyio.run(without)
    with pytest.raises(
        CheckpointError,
        match=r"trained without a KL reference, and rl.kl.coef=0.1 needs one: set rl\.",
    ):
        reference_name(kl_config(), "rl", str(path), resumes=True)


def test_the_reference_is_frozen_and_cut_with_the_step(tmp_path: Path) -> None:
    """Goal: its weights stay, whatever the micro-batches, which change nothing else either.

    Red with its parameters left to require gradients, and with sequences_global left out of the prepared batch.
    """
    loss_fn = rl_loss(
        kl_config(loss=policy_loss(entropy_coef=0.01, aggregation="sequence_mean_token_mean")).rl
    )
    results = []
    for micro_batch_size in (None, 1, 5):
        reference = as_reference(tiny_model(seed=3, dtype=torch.float64), "seed 3")
        options = {"loss_fn": loss_fn, "dtype": torch.float64, "reference": reference}
        backend = tiny_backend(tmp_path, **options)
        results.append(anyio.run(steps, backend, 3, 0, micro_batch_size))
        assert weights_sha256(reference.model) == reference.sha256
        assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a == pytest.approx(b, rel=1e-10)
    assert results[0][0]["kl_reference"] > 0


def test_the_hash_sees_a_single_weight(start: Path) -> None:
    """Goal: equal weights, equal hash; one changed weight, another. Red with only names and shapes hashed."""
    model = tiny_task.tiny_model()
    assert weights_sha256(model) == load_reference(str(start)).sha256
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 1e-6
    assert weights_sha256(model) != load_reference(str(start)).sha256


EFFECTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("loss", policy_loss(PPO), {}),
    ("loss", policy_loss(GSPO), {}),
    ("loss", policy_loss(CISPO), {}),
    ("loss.clip_low", 0.05, {"loss": policy_loss(PPO)}),
    ("loss.clip_high", 0.05, {"loss": policy_loss(PPO)}),
    ("loss.clip_low", 0.01, {"loss": policy_loss(GSPO)}),
    ("loss.clip_high", 0.01, {"loss": policy_loss(GSPO)}),
    ("loss.clip_low", 0.05, {"loss": policy_loss(CISPO)}),
    ("loss.clip_high", 0.05, {"loss": policy_loss(CISPO)}),
    ("loss.dual_clip", 1.3, {"loss": policy_loss(PPO)}),
    ("loss.importance", importance("token_truncate"), {}),
    ("loss.importance", importance("token_mask"), {}),
    ("loss.importance", importance("sequence_truncate"), {}),
    ("loss.importance", importance("sequence_mask"), {}),
    ("loss.importance.cap", 1.1, {"loss.importance": importance("token_truncate")}),
    ("loss.aggregation", "sequence_mean_token_sum", {}),
    ("loss.aggregation", "sequence_mean_token_mean", {}),
    ("loss.aggregation", "constant_length", {}),
    ("max_new_tokens", 9, {"loss.aggregation": "constant_length"}),
    ("kl", kl(), {}),
    ("kl.kind", "k1", {"kl": kl()}),
    ("kl.kind", "k2", {"kl": kl()}),
    ("loss.entropy_coef", 0.1, {}),
]


@pytest.mark.parametrize(("field", "value", "where"), EFFECTS, ids=str)
def test_every_loss_field_changes_the_loss(field: str, value: Any, where: dict[str, Any]) -> None:
    """Goal: each field of the config reaches the loss. Red with any one left out of `rl_loss`."""
    batch = inputs(seed=3)
    batch["advantages"] = torch.tensor([1.0, -1.0, -0.5], dtype=torch.float64)
    batch["old_log_probs"] = batch["old_log_probs"] * 1.2
    batch["sequences_global"] = trained_sequences(batch["loss_mask"])
    rl: Any = example_config().rl
    for path, setting in where.items():
        rl = replace_at(rl, path, setting)
    before = rl_loss(rl)(**batch)
    after = rl_loss(replace_at(rl, field, value))(**batch)
    assert abs(before.item() - after.item()) > 1e-6


@pytest.mark.parametrize(
    ("field", "value"), [("baseline", "leave_one_out"), ("loss.advantage_norm", "batch")]
)
def test_every_advantage_field_changes_the_batch(field: str, value: str) -> None:
    """Goal: they reach `compute_advantages`. Red with either left out of `rl_training_config`."""
    rollouts = rollout_batch(3, 4)
    rl = example_config().rl
    advantages = [
        prepare_grpo_batch(rollouts, rollouts.rewards, rl_training_config(changed, 1))["advantages"]
        for changed in (rl, replace_at(rl, field, value))
    ]
    assert (advantages[0] - advantages[1]).abs().max() > 1e-3
