"""A PyTorch backend from a model's name: float32 master weights, LoRA or all of them, an optimizer, the tokenizer."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.compiled_layers import compile_layers
from rollouts.training.lora import LoraSettings, apply_lora
from rollouts.training.model_loading import (
    enable_activation_checkpointing,
    load_model,
    load_tokenizer,
)
from rollouts.training.optim import MuonSettings, build_optimizer
from rollouts.training.rl_losses import sft_loss


def create_pytorch_backend(
    model_name: str | Path,
    checkpoint_dir: Path | str,
    device_type: str = "cuda",
    learning_rate: float = 1e-4,
    *,
    loss_fn: Callable[..., Tensor] = sft_loss,
    embedding_lr: float | None = None,
    unembedding_lr: float | None = None,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    muon: MuonSettings | None = None,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    max_grad_norm: float = 1.0,
    lr_schedule: Callable[[int], float] | None = None,
    compute_dtype: str = "float32",
    init_seed: int | None = None,
    compile_model: bool = False,
    activation_checkpointing: bool = False,
    lora: LoraSettings | None = None,
    trust_remote_code: bool = False,
) -> PyTorchTrainingBackend:
    """Return a backend for `model_name`, a hub id or a local directory (a checkpoint, say), with its tokenizer.

    `learning_rate` is that of matrices and vectors; embeddings and the output head follow it unless given their own.
    `optimizer="muon"`, with `muon`: see `optim.build_optimizer`. `lora`: train adapters alone, at `learning_rate`;
    `load_checkpoint` then continues over the same `model_name`, not over the checkpoint's merged weights.
    `init_seed`: draw the weights anew from that seed instead of loading them; the global generator stays untouched.
    The other options are those of `PyTorchTrainingBackend` and `optim.build_optimizer`. "cuda" is the current device.
    Raises ValueError for a device that is not there, and `model_loading.ModelError` for a name that cannot be loaded.
    """
    device = _device(device_type)
    tokenizer = load_tokenizer(str(model_name), trust_remote_code=trust_remote_code)
    model = load_model(
        str(model_name),
        init="pretrained" if init_seed is None else "random",
        init_seed=init_seed or 0,
        trust_remote_code=trust_remote_code,
    )
    if lora is not None:
        apply_lora(model, lora, base_name=str(model_name))
    if activation_checkpointing:
        enable_activation_checkpointing(model)
    if compile_model:
        compile_layers(model)
    built = build_optimizer(
        model,
        kind=optimizer,
        muon=muon,
        matrix_lr=learning_rate,
        embedding_lr=learning_rate if embedding_lr is None else embedding_lr,
        unembedding_lr=learning_rate if unembedding_lr is None else unembedding_lr,
        weight_decay=weight_decay,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
    )
    return PyTorchTrainingBackend(
        model=model,
        optimizer=built,
        loss_fn=loss_fn,
        checkpoint_dir=checkpoint_dir,
        device=device,
        tokenizer=tokenizer,
        max_grad_norm=max_grad_norm,
        lr_schedule=lr_schedule,
        compute_dtype=compute_dtype,
    )


def _device(device_type: str) -> torch.device:
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device_type, False):
        usable = ", ".join(repr(name) for name, usable in available.items() if usable)
        raise ValueError(f"device_type={device_type!r}: not usable here; this machine has {usable}")
    return (
        torch.device(device_type, torch.cuda.current_device())
        if device_type == "cuda"
        else torch.device(device_type)
    )
