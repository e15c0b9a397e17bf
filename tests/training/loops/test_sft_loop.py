"""The SFT loop: order, epochs, accumulation, logging, evaluation, checkpoints, exact resume even after a kill."""

import json
import math
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
import torch

from rollouts.training.checkpoint import latest_checkpoint
from rollouts.training.loops import run_sft_training, validation_loss, validation_losses
from rollouts.training.loops.batching import step_indices
from rollouts.training.metrics import JSONLLogger
from rollouts.training.rl_losses import sft_loss
from rollouts.training.types import Sample, SFTTrainingConfig
from tests.training.tiny import PAD, sft_samples, tiny_backend, tiny_model

REPOSITORY = Path(__file__).resolve().parents[3]
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import anyio
from rollouts.training.checkpoint import latest_checkpoint
from rollouts.training.loops import run_sft_training
from rollouts.training.types import SFTTrainingConfig
from tests.training.tiny import sft_samples, tiny_backend

directory, kill_at = Path(sys.argv[1]), int(sys.argv[2])

async def main():
    backend = tiny_backend(directory, seed=0)
    newest = latest_checkpoint(directory)
    resume = None if newest is None else await backend.load_checkpoint(newest)
    def maybe_die(step):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    config = SFTTrainingConfig(num_steps=6, batch_size=4, log_every=1, checkpoint_every=2, micro_batch_size=3)
    await run_sft_training(backend, sft_samples(10), config, seed=7, resume=resume, eval_fn=maybe_die, eval_every=1)

anyio.run(main)
"""


def run(backend, samples, config, **options) -> list[dict]:
    return anyio.run(
        lambda: run_sft_training(backend, samples, config, **{"pad_token_id": PAD, **options})
    )


def parameters(backend) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in backend.model.parameters()]


@pytest.mark.parametrize("runtime", ["asyncio", "trio"])
def test_it_learns_logs_and_checkpoints(tmp_path, runtime):
    """Goal: the documented call ends with a lower loss, its log, and the last step's checkpoint, under both runtimes.

    Red with `checkpoint_every=-1` read as never: the final step is not saved.
    """
    backend = tiny_backend(tmp_path / "sft")
    logger = JSONLLogger(tmp_path, stage="sft")
    config = SFTTrainingConfig(num_steps=25, batch_size=8, log_every=10)
    saved: list[tuple[Path, int]] = []

    async def on_checkpoint(path: Path, step: int) -> None:
        saved.append((path, step))

    async def main():
        return await run_sft_training(
            backend, sft_samples(16), config, logger, on_checkpoint=on_checkpoint
        )

    metrics = anyio.run(main, backend=runtime)
    assert [record["step"] for record in metrics] == [10, 20, 25]
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    logged = [json.loads(line) for line in logger.path.read_text().splitlines()]
    assert [
        {k: v for k, v in record.items() if k not in ("time", "stage")} for record in logged
    ] == metrics
    assert {"loss", "lr", "grad_norm", "trained_tokens", "tokens_per_s", "step_s"} <= set(
        metrics[0]
    )
    assert saved == [(tmp_path / "sft" / "step_000025", 25)]
    assert latest_checkpoint(tmp_path / "sft") == saved[0][0]


def test_order_is_every_example_once_an_epoch_and_a_pure_function():
    """Goal: epochs are reshuffled permutations; steps run on across their ends. Red with the epoch left out."""
    taken = [index for step in range(6) for index in step_indices(10, 5, step, seed=3)]
    epochs = [taken[:10], taken[10:20], taken[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    uneven = [index for step in range(5) for index in step_indices(10, 4, step, seed=3)]
    assert uneven == taken[:20]
    assert step_indices(10, 5, 0, seed=4) != taken[:5]
    assert (
        sorted(step_indices(3, 7, 0, seed=0)) == [0, 0, 0, 1, 1, 2, 2]
        or len(step_indices(3, 7, 0, seed=0)) == 7
    )


def test_without_a_seed_every_epoch_keeps_the_samples_own_order():
    """Goal: a curriculum stays one. Red when None seeded a shuffle like any other value."""
    assert [index for step in range(4) for index in step_indices(4, 3, step, seed=None)] == [
        0,
        1,
        2,
        3,
    ] * 3


def test_a_step_takes_batch_size_examples_whatever_the_micro_batch(tmp_path):
    """Goal: batch_size is examples per step, accumulated. Red with micro_batch_size taken as the step's size."""
    results = []
    for micro_batch_size in (None, 3, 1):
        backend = tiny_backend(tmp_path, dtype=torch.float64)
        config = SFTTrainingConfig(
            num_steps=3, batch_size=8, log_every=1, micro_batch_size=micro_batch_size
        )
        metrics = run(backend, sft_samples(20), config, seed=1)
        results.append(([record["loss"] for record in metrics], parameters(backend)))
        assert [record["trained_tokens"] for record in metrics] == expected_trained_tokens(8)
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-12)
        for a, b in zip(weights, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def expected_trained_tokens(batch_size: int) -> list[float]:
    samples = sft_samples(20)
    return [
        sum(sum(samples[i].loss_mask) for i in step_indices(20, batch_size, step, seed=1))
        for step in range(3)
    ]


def test_resume_is_bit_for_bit(tmp_path):
    """Goal: 3 + resume + 3 steps equal 6 (NeMo-RL#3599), in loss and weights. Red with the order restarted at 0."""
    samples = sft_samples(10)
    whole = tiny_backend(tmp_path / "whole")
    expected = run(
        whole, samples, SFTTrainingConfig(num_steps=6, batch_size=4, log_every=1), seed=7
    )
    half = tiny_backend(tmp_path / "half")
    first = run(half, samples, SFTTrainingConfig(num_steps=3, batch_size=4, log_every=1), seed=7)

    resumed = tiny_backend(tmp_path / "half", seed=99)
    state = anyio.run(resumed.load_checkpoint, tmp_path / "half" / "latest")
    config = SFTTrainingConfig(num_steps=6, batch_size=4, log_every=1)
    second = run(resumed, samples, config, seed=7, resume=state)
    assert [record["loss"] for record in first + second] == [record["loss"] for record in expected]
    assert all(
        torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True)
    )
    with pytest.raises(ValueError, match="of step 6 and num_steps=6: no step is left"):
        run(resumed, samples, config, seed=7, resume={**state, "step": 6})


@pytest.mark.parametrize("change", ["samples", "seed", "batch_size"])
def test_resume_with_other_data_is_refused(tmp_path, change):
    """Goal: a data set swapped under the cursor is noticed (NeMo-RL#2519). Red with the fingerprint not compared."""
    backend = tiny_backend(tmp_path)
    run(backend, sft_samples(10), SFTTrainingConfig(num_steps=1, batch_size=4), seed=7)
    state = anyio.run(backend.load_checkpoint, tmp_path / "latest")
    samples = sft_samples(10, seed=1) if change == "samples" else sft_samples(10)
    config = SFTTrainingConfig(num_steps=2, batch_size=5 if change == "batch_size" else 4)
    name = "fingerprint" if change == "samples" else change
    with pytest.raises(ValueError, match=f"cannot resume after step 1: {name}="):
        run(backend, samples, config, seed=8 if change == "seed" else 7, resume=state)


def test_resume_after_a_kill_is_bit_for_bit(tmp_path):
    """Goal: killed with SIGKILL at step 5 and started again, the last checkpoint is the undisturbed run's.

    Red with the checkpoint's optimizer state not loaded, and with the resumed order starting over.
    """

    def start(directory: Path, kill_at: int) -> int:
        command = [sys.executable, "-c", KILLED_RUN, str(directory), str(kill_at)]
        return subprocess.run(command, cwd=REPOSITORY, check=False, timeout=200).returncode

    assert [start(tmp_path / "killed", kill_at) for kill_at in (5, -1)] == [-9, 0]
    # a process of its own too: equal bits need equal threads
    assert start(tmp_path / "whole", -1) == 0
    killed = (tmp_path / "killed" / "latest" / "model.safetensors").read_bytes()
    assert killed == (tmp_path / "whole" / "latest" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").glob("step_*")) == [
        "step_000002",
        "step_000004",
        "step_000006",
    ]


def test_evaluation_and_checkpoints_come_when_due(tmp_path):
    """Goal: every N steps and after the last. Red with `step % every` alone: the last step is left out."""
    backend = tiny_backend(tmp_path)
    evaluated = []

    async def eval_fn(step: int) -> dict[str, float]:
        evaluated.append(step)
        return {"loss": float(step)}

    config = SFTTrainingConfig(num_steps=5, batch_size=2, log_every=1, checkpoint_every=3)
    metrics = run(backend, sft_samples(4), config, eval_fn=eval_fn, eval_every=2)
    assert evaluated == [2, 4, 5]
    assert [record.get("eval_loss") for record in metrics] == [None, 2.0, None, 4.0, 5.0]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000003", "step_000005"]


def test_an_example_with_nothing_to_train_on_is_named(tmp_path):
    """Goal: an all-zeros mask stops the run and names its row (Megatron-Bridge#3359). Red with the check off."""
    samples = sft_samples(3)
    samples[1] = Sample(prompt="what?", tokens=[3, 4], loss_mask=[1.0, 0.0])
    with pytest.raises(
        ValueError,
        match=r"samples\[1\] has no trained token after position 0 \(2 tokens, prompt 'what",
    ):
        run(tiny_backend(tmp_path), samples, SFTTrainingConfig(num_steps=1, batch_size=2))
    with pytest.raises(ValueError, match="samples is empty"):
        run(tiny_backend(tmp_path), [], SFTTrainingConfig(num_steps=1, batch_size=2))


def test_validation_loss_counts_every_token_once(tmp_path):
    """Goal: the token mean over all examples, the last partial batch included (NeMo-RL#618, rllm#870).

    Red with the mean of the batches' losses, and with the partial batch dropped.
    """
    backend = tiny_backend(tmp_path, dtype=torch.float64)
    samples = sft_samples(7)
    result = anyio.run(lambda: validation_loss(backend, samples, batch_size=3, pad_token_id=PAD))
    model = tiny_model(dtype=torch.float64)
    total = 0.0
    for sample in samples:
        ids = torch.tensor([sample.tokens])
        mask = torch.tensor([sample.loss_mask])
        total += sft_loss(model(input_ids=ids).logits, ids, mask, tokens_global=1.0).item()
    tokens = sum(sum(sample.loss_mask) for sample in samples)
    assert result == pytest.approx(
        {"loss": total / tokens, "tokens": tokens, "examples": 7}, abs=1e-12
    )
    some = anyio.run(lambda: validation_loss(backend, samples, batch_size=3, batches_max=1))
    assert some["examples"] == 3
    assert math.isfinite(some["loss"])
    with pytest.raises(ValueError, match="no trained token in 0 samples"):
        anyio.run(lambda: validation_loss(backend, [], batch_size=3))


def test_validation_losses_by_task(tmp_path):
    """Goal: each task's own mean over its tokens, and theirs together. Red with the mean of the tasks' means.

    Red also with batches_max applied to each task in place of the whole.
    """
    backend = tiny_backend(tmp_path, dtype=torch.float64)
    samples = sft_samples(9, seed=1)
    for index, sample in enumerate(samples):
        sample.metadata["task"] = "long" if index % 3 else "short"
    found = anyio.run(lambda: validation_losses(backend, samples, batch_size=2, pad_token_id=PAD))
    expected = {
        "all": samples,
        "long": [sample for sample in samples if sample.metadata["task"] == "long"],
        "short": samples[::3],
    }
    assert (
        list(found) == ["all", "long", "short"]
        and found["long"]["tokens"] != found["short"]["tokens"]
    )
    for task, of_task in expected.items():
        alone = anyio.run(lambda: validation_loss(backend, of_task, batch_size=9, pad_token_id=PAD))  # noqa: B023
        assert found[task] == pytest.approx(alone, abs=1e-12)
    some = anyio.run(
        lambda: validation_losses(backend, samples, batch_size=2, batches_max=2, pad_token_id=PAD)
    )
    assert {task: result["examples"] for task, result in some.items()} == {
        "all": 4,
        "long": 2,
        "short": 2,
    }
    one = anyio.run(
        lambda: validation_losses(backend, samples[::3], batch_size=2, pad_token_id=PAD)
    )
    assert list(one) == ["all"]
