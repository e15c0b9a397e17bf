"""What these tests share: a backend over a model on disk, transfers of each kind, and what an engine should answer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.rl_losses import grpo_loss
from rollouts.training.weight_transfer.broadcast import BroadcastLink
from rollouts.training.weight_transfer.buckets import BucketTransfer
from rollouts.training.weight_transfer.disk import DiskTransfer
from rollouts.training.weight_transfer.tensor import SharedMemoryLink

BUCKET_BYTES = 60_000  # the models have some 300 KB: several buckets
IDS = [2, 9, 4, 17, 5, 6, 23, 8]


def backend_over(path: Path, checkpoints: Path) -> PyTorchTrainingBackend:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PyTorchTrainingBackend(model, torch.optim.SGD(model.parameters(), lr=0.1), grpo_loss, checkpoints)


def transfer_of(kind: str, backend: PyTorchTrainingBackend, directory: Path, *, timeout_s: float = 30.0) -> Any:
    if kind == "disk":
        return DiskTransfer(backend, directory, temporary=True)
    link: Any = SharedMemoryLink() if kind == "tensor" else BroadcastLink(device_type="cpu", timeout_s=timeout_s)
    return BucketTransfer(backend, link, dtype=None, bucket_bytes=BUCKET_BYTES)


def change(backend: PyTorchTrainingBackend, seed: int) -> None:
    """Other weights, as a step would make them; tied ones stay tied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backend.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def expected_logprobs(model: Any, ids: list[int] = IDS) -> list[float]:
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        log_probs_TV = model.eval()(input_ids=ids_1T).logits[0, :-1].log_softmax(-1)
    return log_probs_TV.gather(1, ids_1T[0, 1:, None])[:, 0].tolist()  # type: ignore[no-any-return]
