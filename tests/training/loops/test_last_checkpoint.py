"""The last evaluation of a stage may die: of memory, of time, of a signal. What was trained is on the disk by then."""

import functools
from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.training import checkpoint
from rollouts.training.loops import run_rl_training, run_sft_training
from rollouts.training.rl_losses import grpo_loss, sft_loss
from rollouts.training.types import RLTrainingConfig, SFTTrainingConfig
from tests.training.tiny import PAD, sft_samples, tiny_backend
from tests.training.two_ranks import Buffer, Manager

STEPS = 3


class Rows:
    """A metrics logger that keeps rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, metrics: Any, step: int) -> None:
        self.rows.append((step, dict(metrics)))

    def finish(self) -> None:
        """Nothing is pending."""


async def run(stage: str, directory: Path, logger: Rows, eval_fn: Any) -> None:
    """Three steps, an evaluation after each, a checkpoint after the second and the last."""
    options: dict[str, Any] = {"eval_fn": eval_fn, "eval_every": 1, "pad_token_id": PAD}
    backend = tiny_backend(directory, loss_fn=sft_loss if stage == "sft" else grpo_loss)
    if stage == "sft":
        config = SFTTrainingConfig(num_steps=STEPS, batch_size=2, log_every=1, checkpoint_every=2)
        await run_sft_training(backend, sft_samples(6), config, logger, **options)
    else:
        rl = RLTrainingConfig(
            num_steps=STEPS, baseline="group_mean", log_every=1, checkpoint_every=2
        )
        buffer = Buffer()
        await run_rl_training(
            backend, buffer, Manager(buffer), [], rl, metrics_logger=logger, **options
        )


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_last_evaluation_may_die(stage: str, tmp_path: Path) -> None:
    """Goal: the checkpoint of the last step is complete, `latest`, before that step is evaluated, so that whatever ends
    the evaluation leaves it; the step's own metrics are logged too. Earlier ones hold their evaluation.

    Red with the last one saved after the evaluation, as the others are: `latest` is step 2.
    """
    directory, logger, seen = tmp_path / stage, Rows(), []

    def evaluate(step: int) -> dict[str, float]:
        if step == STEPS:
            # as a SIGKILL here would leave it
            seen.append(checkpoint.read_metadata(directory / "latest")["step"])
            raise MemoryError("the answers need more than there is")
        return {"score": float(step)}

    with pytest.raises(MemoryError):
        anyio.run(functools.partial(run, stage, directory, logger, evaluate))
    assert seen == [STEPS]
    assert checkpoint.read_metadata(directory / "latest")["step"] == STEPS
    trained = [(step, row.get("eval_score")) for step, row in logger.rows if step]
    assert trained == [(1, 1.0), (2, 2.0), (3, None)]
    before = checkpoint.read_metadata(directory / "step_000002")
    assert before["metrics"]["eval_score"] == 2.0
