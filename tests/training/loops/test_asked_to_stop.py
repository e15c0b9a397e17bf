"""A loop that is asked to stop saves the step it has done, and ends there."""

import functools
from pathlib import Path

import anyio
import pytest

from rollouts.training import checkpoint
from rollouts.training.backends.minimal import complete
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.loops.after_step import Hooks
from rollouts.training.loops.rl_loop import RLSteps, run_rl
from rollouts.training.loops.sft_loop import SFTSteps, run_sft
from rollouts.training.rl_losses import grpo_loss, sft_loss
from rollouts.training.rollout_gen.rollout_stream import open_rollouts
from rollouts.training.types import RLTrainingConfig, SFTTrainingConfig
from tests.training.tiny import PAD, sft_samples, tiny_backend
from tests.training.two_ranks import Buffer, Manager


async def run(stage: str, directory: Path, hooks: Hooks) -> list[dict[str, float]]:
    """Five steps; of themselves they save after the last alone."""
    backend = complete(tiny_backend(directory, loss_fn=sft_loss if stage == "sft" else grpo_loss))
    if stage == "sft":
        config = SFTTrainingConfig(num_steps=5, batch_size=2, log_every=1, checkpoint_every=-1)
        return await run_sft(backend, sft_samples(6), SFTSteps(config, pad_token_id=PAD), hooks)
    rl = RLTrainingConfig(num_steps=5, baseline="group_mean", log_every=1, checkpoint_every=-1)
    buffer = Buffer()
    async with open_rollouts(
        Manager(buffer), rl, EnginePool.of([]), buffer=buffer, reward_fn=None
    ) as rollouts:
        return await run_rl(backend, rollouts, None, RLSteps(rl), hooks)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_step_under_way_is_saved(stage: str, tmp_path: Path) -> None:
    """Goal: asked during its third step, the stage logs and saves that step, complete before it returns, and takes no
    fourth one. Red without the break: five steps."""
    directory, asked, saved = tmp_path / stage, iter([False, False, True]), []
    hooks = Hooks(
        on_checkpoint=lambda path, step: saved.append(step), stop=lambda: next(asked, False)
    )
    history = anyio.run(functools.partial(run, stage, directory, hooks))
    assert len(history) == 3 and saved == [3]
    assert checkpoint.read_metadata(directory / "latest")["step"] == 3
