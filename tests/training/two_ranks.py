"""Run on each rank by test_distributed.py: SFT and RL over this world's ranks, results written by each rank."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch

from rollouts.training import distributed
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.loops import run_rl_training, run_sft_training, validation_loss
from rollouts.training.metrics import JSONLLogger
from rollouts.training.reference import as_reference
from rollouts.training.rl_losses import grpo_loss, policy_loss
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.types import RLTrainingConfig, RolloutConfig, Sample, SFTTrainingConfig
from rollouts.training.value_head import ValueHead
from tests.training.tiny import PAD, rollout_batch, sft_samples, tiny_backend, tiny_model


class Buffer:
    def __init__(self) -> None:
        self.step = 0

    def save_state(self) -> dict:
        return {"step": self.step}

    def load_state(self, state: dict) -> None:
        self.step = state["step"]


class Manager:
    """The same made-up groups for the same step, whoever asks."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer

    async def generate_batch(self, reward_fn=None):
        self.buffer.step += 1
        return rollout_batch(3, 3, seed=self.buffer.step)


async def made_up(prompts: list[str], *, seed: int) -> list[Sample]:
    """A group of the seed's, after a moment in which other things may run."""
    await anyio.sleep(0.01)
    return rollout_batch(1, len(prompts), seed=seed).samples


def runs_ahead() -> AsyncRolloutManager:
    config = RolloutConfig(batch_size=3, n_samples_per_prompt=3, generate_fn=made_up)
    return AsyncRolloutManager(DataBuffer([f"{number}" for number in range(30)]), config)


async def sft(directory: Path) -> list[dict]:
    # rank 0's parameters must win
    backend = tiny_backend(directory / "sft", seed=distributed.rank())
    config = SFTTrainingConfig(num_steps=4, batch_size=7, log_every=1, micro_batch_size=2)
    metrics = await run_sft_training(backend, sft_samples(10), config, pad_token_id=PAD)
    held_out = await validation_loss(
        backend, sft_samples(5, seed=1), batch_size=2, pad_token_id=PAD
    )
    return [*metrics, held_out]


async def rl(
    directory: Path,
    num_steps: int,
    *,
    resume: bool,
    baseline: str = "group_mean",
    lag: int = 0,
    **backend_options: Any,
) -> list[dict]:
    backend = tiny_backend(
        directory, **{"loss_fn": grpo_loss, "seed": 5 * distributed.rank(), **backend_options}
    )
    manager: Any = None
    if distributed.rank() == 0:
        manager = runs_ahead() if lag else Manager(Buffer())
    buffer = manager and manager.buffer
    norm = "batch" if baseline == "value" else "group_std"
    options: dict[str, Any] = {
        "baseline": baseline,
        "advantage_norm": norm,
        "micro_batch_size": 3,
        "policy_lag_steps_max": lag,
    }
    # 3, 3, 3 of 9 samples alone; 3, 2 and 3, 1 on two ranks
    config = RLTrainingConfig(num_steps=num_steps, **options)
    state = await backend.load_checkpoint(directory / "latest") if resume else None
    log = JSONLLogger(directory / "rollouts.jsonl") if distributed.rank() == 0 else None
    return await run_rl_training(
        backend, buffer, manager, [], config, pad_token_id=PAD, resume=state, rollouts_logger=log
    )


def every_part() -> dict[str, Any]:
    """A loss with all its parts: sequences' ratios, their mean, the KL to a reference, entropy."""
    parts = {
        "loss": "gspo",
        "aggregation": "sequence_mean_token_mean",
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
    }
    return {
        "loss_fn": partial(policy_loss, **parts),
        "reference": as_reference(tiny_model(seed=3), "seed 3"),
    }


def critic() -> dict[str, Any]:
    """A value head, which differs between ranks until rank 0's is sent to all; clipped, standardised over the step."""
    value_head = ValueHead(16, lr=1e-2)
    torch.nn.init.constant_(value_head.weight, 0.1 * (1 + distributed.rank()))
    loss_fn = partial(policy_loss, loss="ppo", value_coef=0.5, value_clip=0.2)
    return {"loss_fn": loss_fn, "value_head": value_head, "baseline": "value"}


def collectives() -> list:
    rank, world = distributed.rank(), distributed.world_size()
    tensors = [torch.full((3,), float(rank + 1)), torch.full((2, 2), 10.0 * (rank + 1))]
    distributed.all_reduce_sum(tensors)
    copied = [torch.full((2,), float(rank))]
    distributed.broadcast_tensors(copied)
    return [
        rank,
        world,
        distributed.broadcast_object({"from": rank}),
        distributed.gather_objects(rank),
        distributed.all_reduce_floats([1.0, rank]),
        [tensor.tolist() for tensor in [*tensors, *copied]],
        [
            distributed.on_rank_0(lambda: f"by {rank}", group)
            for group in (None, distributed.new_group())
        ],
        [failure_on_rank_0(error) for error in (KeyError("k"), Unpicklable("u"))],
    ]


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("not this one")


def failure_on_rank_0(error: Exception) -> str:
    def fail() -> None:
        raise error

    try:
        distributed.on_rank_0(fail)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing was raised"


def main(directory: Path) -> None:
    distributed.initialize("cpu", timeout_s=600.0)
    results = {"collectives": collectives()}
    results["sft"] = anyio.run(sft, directory)
    for name, options in (
        ("rl", dict),
        ("policy", every_part),
        ("value", critic),
        ("ahead", lambda: {"lag": 1}),
    ):
        first = anyio.run(partial(rl, directory / name, 2, resume=False, **options()))
        results[name] = first + anyio.run(
            partial(rl, directory / name, 4, resume=True, **options())
        )
    (directory / f"rank_{distributed.rank()}.json").write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
