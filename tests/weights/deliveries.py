"""Make a backend over a model on disk, a delivery of each kind, and the log-probs that an engine should answer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from base_config import LoraConfig
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.lora import LoraSettings, apply_lora
from rollouts.training.rl_losses import grpo_loss
from rollouts.training.weights.channel.process_group import ProcessGroupChannel
from rollouts.training.weights.channel.shared_memory import SharedMemoryChannel
from rollouts.training.weights.deliver.adapter import AdapterDelivery
from rollouts.training.weights.deliver.buckets import BucketDelivery
from rollouts.training.weights.deliver.disk import DiskDelivery
from rollouts.training.weights.publish import WeightPublisher

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.1, target_modules="all-linear", init_seed=0)
BUCKET_BYTES = 60_000  # the models have some 300 KB: several buckets
IDS = [2, 9, 4, 17, 5, 6, 23, 8]


def backend_over(path: Path, checkpoints: Path) -> PyTorchTrainingBackend:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PyTorchTrainingBackend(
        model, torch.optim.SGD(model.parameters(), lr=0.1), grpo_loss, checkpoints
    )


def lora_backend(base: Path, checkpoints: Path, *, rank: int = LORA.rank) -> PyTorchTrainingBackend:
    """Adapters over the frozen model in `base`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraSettings(**{**dataclasses.asdict(LORA), "rank": rank})
    apply_lora(model, settings, base_name=str(base))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return PyTorchTrainingBackend(model, torch.optim.SGD(trained, lr=0.1), grpo_loss, checkpoints)


def delivery_of(
    kind: str, backend: PyTorchTrainingBackend, directory: Path, *, timeout_s: float = 120.0
) -> Any:
    if kind in ("disk", "lora"):
        return (DiskDelivery if kind == "disk" else AdapterDelivery)(
            backend, directory, temporary=True
        )
    channel: Any = (
        SharedMemoryChannel()
        if kind == "tensor"
        else ProcessGroupChannel(device_type="cpu", timeout_s=timeout_s)
    )
    return BucketDelivery(backend, channel, dtype=None, bucket_bytes=BUCKET_BYTES)


def publisher_of(
    backend: PyTorchTrainingBackend,
    engines: EnginePool | Sequence[Any],
    delivery: Any,
    **options: Any,
) -> WeightPublisher:
    return WeightPublisher(backend, EnginePool.of(engines), delivery, dtype="float32", **options)


def change(backend: PyTorchTrainingBackend, seed: int) -> None:
    """Other weights, as a step would make them; tied ones stay tied, frozen ones as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(lambda one: one.requires_grad, backend.model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def expected_logprobs(model: Any, ids: list[int] = IDS) -> list[float]:
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        log_probs_TV = model.eval()(input_ids=ids_1T).logits[0, :-1].log_softmax(-1)
    return log_probs_TV.gather(1, ids_1T[0, 1:, None])[:, 0].tolist()  # type: ignore[no-any-return]
