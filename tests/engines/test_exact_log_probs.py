"""The engine's log-probs and the trainer's: not nearly the same, the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from rollouts.training.backends import create_pytorch_backend
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops import run_rl_training
from rollouts.training.rl_losses import ppo_loss
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.rollout_gen.engine_generate import make_generate_fn
from rollouts.training.types import RLTrainingConfig, RolloutConfig, Sample
from rollouts.training.weight_sync import SGLangEngine
from tests.engines.serving import make_model, serving

STEPS = 3


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vowels(sample: Sample) -> float:
    return float(sum(letter in "aeiou" for letter in sample.response))


@pytest.mark.parametrize("kind", ["qwen2-tied", "mistral-sliding"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_to_the_sampler_is_exactly_zero(
    kind: str, temperature: float, tmp_path: Path, one_thread: None
) -> None:
    """Goal: ppo_kl of an on-policy step is 0.0, not 1e-14, at the first step and after each sync (slime#780).

    Red without the scoring pass: |Δlogp| was 1e-7 on average.
    """
    model = make_model(kind, tmp_path / "model", seed=0, spread=1.0)
    backend = create_pytorch_backend(model, tmp_path / "checkpoints", "cpu", 1e-2, loss_fn=ppo_loss)
    roles = "{% for m in messages %}{{ m.content }}{% endfor %}"
    backend._saver.tokenizer.chat_template = roles + "{% if add_generation_prompt %} {% endif %}"

    async def main(url: str) -> list[dict[str, Any]]:
        engine = SGLangEngine(url)
        generate_fn = make_generate_fn(
            [engine], backend._saver.tokenizer, max_new_tokens=40, temperature=temperature
        )
        config = RolloutConfig(
            batch_size=5, n_samples_per_prompt=4, generate_fn=generate_fn, reward_fn=vowels
        )
        buffer = DataBuffer(
            ["ab", "hello there", "what is it?", "a much longer prompt", "x"] * 3, seed=0
        )
        async with AsyncRolloutManager(buffer, config) as manager:
            return await run_rl_training(
                backend,
                buffer,
                manager,
                [engine],
                RLTrainingConfig(num_steps=STEPS, baseline="group_mean", micro_batch_tokens=300),
                temperature=temperature,
                clip_range=0.2,
            )

    with serving(model) as url:
        metrics = anyio.run(main, url)
    assert [(record["logp_diff_abs"], record["kl_sampler"]) for record in metrics] == [
        (0.0, 0.0)
    ] * STEPS
    assert len({record["logp"] for record in metrics}) == STEPS and metrics[0]["grad_norm"] > 0
