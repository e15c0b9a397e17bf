"""A user's own backend, with the four methods of the public protocol and no more."""

import pathlib
from typing import Any

import anyio
import pytest

from rollouts.training.backends.minimal import LackingMethodError, complete
from rollouts.training.loops import run_rl_training, run_sft_training
from rollouts.training.rl_losses import grpo_loss
from rollouts.training.types import RLTrainingConfig, SFTTrainingConfig
from tests.training.tiny import PAD, sft_samples, tiny_backend
from tests.training.two_ranks import Buffer, Manager


class FourMethods:
    """As documented: no `extra` for checkpoints, no model to look at."""

    def __init__(self, directory: pathlib.Path, **options: Any) -> None:
        self._inner = tiny_backend(directory, **options)
        self.saved: list[int] = []

    def forward_backward(self, batch: dict) -> Any:
        return self._inner.forward_backward(batch)

    def optim_step(self) -> Any:
        return self._inner.optim_step()

    async def save_checkpoint(self, step: int, metrics: dict) -> pathlib.Path:
        self.saved.append(step)
        return await self._inner.save_checkpoint(step, metrics)

    async def load_checkpoint(self, path: pathlib.Path) -> dict:
        return await self._inner.load_checkpoint(path)


def test_four_methods_train_as_a_complete_backend_does(tmp_path: pathlib.Path) -> None:
    """Goal: SFT and RL run on the documented protocol alone, with the same losses. Red with `expect` taken for granted,
    and with `extra` handed to a save_checkpoint that takes none."""
    sft = SFTTrainingConfig(
        num_steps=3, batch_size=4, log_every=1, checkpoint_every=2, micro_batch_size=2
    )
    rl = RLTrainingConfig(num_steps=2, baseline="group_mean", micro_batch_size=3)

    async def train(backend: Any, for_rl: Any) -> list[float]:
        found = await run_sft_training(backend, sft_samples(8), sft, pad_token_id=PAD)
        found += await run_rl_training(
            for_rl, Buffer(), Manager(Buffer()), [], rl, pad_token_id=PAD
        )
        return [row["loss"] for row in found]

    own, own_rl = FourMethods(tmp_path / "a"), FourMethods(tmp_path / "b", loss_fn=grpo_loss)
    whole = tiny_backend(tmp_path / "c"), tiny_backend(tmp_path / "d", loss_fn=grpo_loss)
    assert anyio.run(train, own, own_rl) == pytest.approx(anyio.run(train, *whole), rel=1e-6)
    assert own.saved == [2, 3] and own_rl.saved == [2]


def test_what_a_backend_lacks_is_named_where_it_is_needed(tmp_path: pathlib.Path) -> None:
    """Goal: the message has the class, the method and where to read on. Red with a bare getattr."""
    backend = complete(FourMethods(tmp_path))
    assert not backend.has_log_probs and not backend.collective and backend.device.type == "cpu"
    with pytest.raises(
        LackingMethodError,
        match="FourMethods lacks save_weights, which this run needs: see rollouts",
    ):
        anyio.run(backend.save_weights, tmp_path / "weights")


def test_a_complete_backend_is_used_as_it_is(tmp_path: pathlib.Path) -> None:
    """Goal: no layer in between where none is needed. Red with a protocol that asks for more than the backends have."""
    backend = tiny_backend(tmp_path)
    assert complete(backend) is backend
