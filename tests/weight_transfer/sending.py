"""What these tests share: a backend over a model on disk, transfers of each kind, and what an engine should answer."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from base_config import LoraConfig
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.lora import LoraSettings, apply_lora
from rollouts.training.rl_losses import grpo_loss
from rollouts.training.weight_transfer.adapter import AdapterTransfer
from rollouts.training.weight_transfer.broadcast import BroadcastLink
from rollouts.training.weight_transfer.buckets import BucketTransfer
from rollouts.training.weight_transfer.disk import DiskTransfer
from rollouts.training.weight_transfer.tensor import SharedMemoryLink

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.1, target_modules="all-linear", init_seed=0)
BUCKET_BYTES = 60_000  # the models have some 300 KB: several buckets
IDS = [2, 9, 4, 17, 5, 6, 23, 8]


def backend_over(path: Path, checkpoints: Path) -> PyTorchTrainingBackend:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PyTorchTrainingBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), grpo_loss, checkpoints)


def lora_backend(base: Path, checkpoints: Path, *, rank: int = LORA.rank) -> PyTorchTrainingBackend:
    """Adapters over the frozen model in `base`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraSettings(**{**dataclasses.asdict(LORA), "rank": rank})
    apply_lora(model, settings, base_name=str(base))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return PyTorchTrainingBackend(model, torch.optim.SGD(trained, lr=0.1), grpo_loss, checkpoints)


def transfer_of(kind: str, backend: PyTorchTrainingBackend, directory: Path, *, timeout_s: float = 30.0) -> Any:
    if kind in ("disk", "lora"):
        return (DiskTransfer if kind == "disk" else AdapterTransfer)(backend, directory, temporary=True)
    link: Any = SharedMemoryLink() if kind == "tensor" else BroadcastLink(device_type="cpu", timeout_s=timeout_s)
    return BucketTransfer(backend, link, dtype=None, bucket_bytes=BUCKET_BYTES)


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
