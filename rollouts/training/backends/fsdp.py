"""The FSDP backend: `PyTorchTrainingBackend` over a model that is sharded over ranks (`sharded`).

A forward or backward pass is a collective operation: every rank must run as many as the others (`collective`). The
loops see to it, with micro-batches that train on nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rollouts.training import distributed
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.backends.sharded import STRATEGIES, FSDPConfig, Sharded, defers_reduction

__all__ = ["STRATEGIES", "FSDPConfig", "FSDPTrainingBackend", "defers_reduction"]


class FSDPTrainingBackend(PyTorchTrainingBackend):
    """`PyTorchTrainingBackend` with the model sharded, a `reference` model too.

    `model` is a float32 transformers model on the CPU, the same on every rank: rank 0's parameters are taken. It is
    sharded in place, a layer at a time, so that no device ever holds the whole of it. `optimizer_fn` is given the
    sharded model, and its state is sharded likewise. `device`: None for this rank's CUDA device where there is one,
    else the CPU. Under torchrun the process group is made here if `distributed.initialize` has not made it.
    Gradients are summed over ranks at each `forward_backward`, whose "grad_norm" is therefore the same on every rank;
    of those that `expect` announced at the last alone: until then each rank holds a whole float32 gradient.
    A loss must be 0, not NaN, for a batch without a trained token where it is given "tokens_global".
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_fn: Callable[[nn.Module], torch.optim.Optimizer],
        loss_fn: Callable[..., Tensor],
        checkpoint_dir: Path | str,
        config: FSDPConfig | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        if "compute_dtype" in options:
            raise ValueError(
                "compute_dtype: an option of PyTorchTrainingBackend; here FSDPConfig.mixed_precision says"
            )
        if options.get("value_head") is not None:
            raise ValueError("value_head: a sharded backend has none; use PyTorchTrainingBackend")
        config = config or FSDPConfig()
        device = _join(device)
        reference = options.get("reference")
        if reference is not None and reference.model is model:
            raise ValueError(
                "reference: is the model itself with its adapters off, and those of a sharded model stay as they were "
                "when it first ran; load the reference as a model of its own"
            )
        _check_float32(model)
        placement = Sharded(config, device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        placement.place(model)
        super().__init__(
            model,
            optimizer_fn(model),
            loss_fn,
            checkpoint_dir,
            device,
            placement=placement,
            **options,
        )


def _join(device: torch.device | str | None) -> torch.device:
    """Make the process group, unless there is one, and return this rank's device."""
    device_type = (
        ("cuda" if torch.cuda.is_available() else "cpu")
        if device is None
        else torch.device(device).type
    )
    own = distributed.initialize(device_type, alone=True) if not dist.is_initialized() else None
    if device is None:
        device = own or (
            torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else "cpu"
        )
    return torch.device(device)


def _check_float32(model: nn.Module) -> None:
    others = sorted({str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"})
    if others:
        raise ValueError(
            f"model has parameters in {', '.join(others)}: needs float32, the master weights; load it with "
            "dtype=torch.float32 and let FSDPConfig(mixed_precision=True) compute in bfloat16"
        )
