"""Prompts whose answers take long are trained as often as others, though more groups are started than a batch needs."""

from collections import Counter
from typing import Any

import anyio
import pytest

from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.types import RolloutConfig, Sample

PROMPTS = [f"p{index}" for index in range(6)]
SLOW = {"p1", "p4"}


@pytest.mark.anyio
async def test_who_finishes_last_is_trained_as_often() -> None:
    """Goal: with over-sampling, groups that finish late are in a batch, in prompt order, not left out for the quick
    ones: each prompt once an epoch. Red with a batch made of the first that finished, the others dropped."""

    async def generate(prompts: list[Any]) -> list[Sample]:
        for _ in range(50 if prompts[0] in SLOW else 0):
            await anyio.lowlevel.checkpoint()
        return [Sample(prompt=prompt, tokens=[1, 2], loss_mask=[0.0, 1.0]) for prompt in prompts]

    config = RolloutConfig(
        batch_size=2,
        n_samples_per_prompt=1,
        over_sampling_factor=2.0,
        generate_fn=generate,
        reward_fn=lambda sample: 1.0,
    )
    manager, taken = AsyncRolloutManager(DataBuffer(PROMPTS, seed=3), config), []
    for _ in range(9):
        taken += [sample.prompt for sample in (await manager.generate_batch()).samples]
    assert taken == DataBuffer(PROMPTS, seed=3).get_prompts(18)
    assert set(Counter(taken).values()) == {3}
