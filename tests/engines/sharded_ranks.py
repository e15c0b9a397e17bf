"""Run under torchrun by test_pool_publishing.py: two ranks, a sharded model, one engine, reached by two URLs.

sharded_ranks MODEL URL URL_WITH_FAULTS DIRECTORY
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch
from transformers import AutoModelForCausalLM

from rollouts.training import distributed
from rollouts.training.backends import FSDPConfig, FSDPTrainingBackend
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.recovery import Recovered
from rollouts.training.loops import run_rl_training
from rollouts.training.rl_losses import policy_loss
from rollouts.training.rollout_gen.async_rollout_manager import AsyncRolloutManager
from rollouts.training.types import RLTrainingConfig, RolloutConfig, Sample
from rollouts.training.weight_sync import SGLangEngine
from rollouts.training.weights.channel.shared_memory import SharedMemoryChannel
from rollouts.training.weights.deliver.buckets import BucketDelivery
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.training.weights.publish import WeightPublisher

IDS = [2, 9, 4, 17, 5, 6, 23, 8]
STEPS, GROUPS, SAMPLES, NEW_TOKENS = 4, 2, 4, 6
BUCKET_BYTES = 8192
LAGS = (0, 1)


def make_backend(model: str, directory: Path) -> FSDPTrainingBackend:
    return FSDPTrainingBackend(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        lambda sharded: torch.optim.SGD(sharded.parameters(), lr=0.5),
        partial(policy_loss, loss="grpo", importance="token_truncate", importance_cap=2.0),
        directory,
        FSDPConfig(mixed_precision=False),
        device="cpu",
    )


def tensors(backend: Any, **options: Any) -> BucketDelivery:
    return BucketDelivery(
        backend, SharedMemoryChannel(), dtype=None, bucket_bytes=BUCKET_BYTES, **options
    )


async def served(model: str, url: str, directory: Path) -> dict[str, object]:
    """By kind of sync: the version that the engine then serves, and its log-probs."""
    backend, found = make_backend(model, directory), dict[str, object]()
    engines = [SGLangEngine(url, timeout_s=200)] if distributed.rank() == 0 else []
    for version, delivery in enumerate(
        (tensors(backend), DiskDelivery(backend, directory / "weights")), start=1
    ):
        publisher = WeightPublisher(backend, EnginePool.of(engines), delivery, dtype="float32")
        await publisher.publish(version)
        if engines:
            info = await engines[0].model_info()
            found[type(delivery).__name__] = [
                info["weight_version"],
                await engines[0].input_logprobs(IDS),
            ]
        await publisher.aclose()
    return found


def make_manager(pool: EnginePool) -> AsyncRolloutManager:
    async def generate(prompts: list[str], *, seed: int) -> list[Sample]:
        ids = [2 + int(digit) for digit in prompts[0]]
        params = {
            "max_new_tokens": NEW_TOKENS,
            "temperature": 1.0,
            "ignore_eos": True,
            "sampling_seed": seed,
        }
        return [
            Sample(
                prompt=prompts[0],
                tokens=[*ids, *answer.output_ids],
                loss_mask=[0.0] * len(ids) + [1.0] * NEW_TOKENS,
                rollout_log_probs=answer.logprobs,
                metadata={"weight_version": answer.weight_version},
                response_length=NEW_TOKENS,
                reward=sum(token < 12 for token in answer.output_ids) / NEW_TOKENS,
            )
            for answer in await pool.generate(ids, params, n=len(prompts))
        ]

    config = RolloutConfig(
        batch_size=GROUPS, n_samples_per_prompt=SAMPLES, generate_fn=generate, seed=3
    )
    return AsyncRolloutManager(
        DataBuffer([f"{number:03d}" for number in range(40)], seed=2), config
    )


async def train(model: str, url: str, directory: Path, lag: int) -> list[Any]:
    """The metrics of each step, and how often the engine was brought back."""
    backend, recovered = make_backend(model, directory), list[Recovered]()
    clients = [SGLangEngine(url, timeout_s=200)] if distributed.rank() == 0 else []
    pool = EnginePool(clients, reruns_max=9, recover_timeout_s=200.0, on_recovered=recovered.append)
    manager: Any = make_manager(pool) if pool else None
    publisher = WeightPublisher(backend, pool, tensors(backend, keep=True), dtype="float32")
    advantages = {"baseline": "group_mean", "advantage_norm": "group_std"}
    config = RLTrainingConfig(num_steps=STEPS, policy_lag_steps_max=lag, **advantages)
    metrics = await run_rl_training(
        backend, manager and manager.buffer, manager, pool, config, weight_sync=publisher
    )
    await publisher.aclose()
    await pool.aclose()
    return [metrics, len(recovered)]


def main(model: str, url: str, url_with_faults: str, directory: Path) -> None:
    results: dict[str, Any] = {"served": anyio.run(served, model, url, directory)}
    for lag in LAGS:
        for name, where in (("left alone", url), ("killed", url_with_faults)):
            results[f"{name}, lag {lag}"] = anyio.run(
                train, model, where, directory / f"{name}_{lag}", lag
            )
    (directory / f"rank_{distributed.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    distributed.initialize("cpu", timeout_s=600.0)
    main(*sys.argv[1:4], Path(sys.argv[4]))
    distributed.shutdown()
