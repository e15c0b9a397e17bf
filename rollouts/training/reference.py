"""The frozen model that a KL penalty pulls towards, and the proof that it stays the same one for a whole run."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rollouts.training.model_loading import load_model


@dataclass(frozen=True)
class Reference:
    """`name` is where it was loaded from; `sha256` of its weights tells one reference from another.

    `model` computes as the reference inside `using(model)`.
    """

    model: nn.Module
    name: str
    sha256: str
    using: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext

    @property
    def record(self) -> dict[str, str]:
        """What a checkpoint keeps of it: enough to load it again and to know it."""
        return {"name": self.name, "sha256": self.sha256}


def load_reference(name: str, *, trust_remote_code: bool = False) -> Reference:
    """Load the model `name` (hub id or directory) as a reference, float32 on the CPU. Raises ModelError."""
    model = load_model(name, trust_remote_code=trust_remote_code)
    return as_reference(model, str(Path(name).resolve()) if Path(name).is_dir() else name)


def as_reference(model: nn.Module, name: str) -> Reference:
    """Return `model` itself, frozen and in evaluation mode, as a reference. It must share no parameter with the
    policy."""
    return Reference(model.eval().requires_grad_(False), name, weights_sha256(model))


@torch.no_grad()
def weights_sha256(model: nn.Module) -> str:
    """Over every tensor's name, dtype, shape and bytes, so that a change of a single weight shows."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
