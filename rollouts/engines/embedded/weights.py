"""Weights that arrive in pieces, between begin and end: each is copied from the sender's memory as it comes."""

from typing import Any

import torch

from rollouts.engines.embedded.model import ModelError


class UpdateSession:
    """Which of `model`'s tensors have come. As with SGLang, what was loaded before a failure stays."""

    def __init__(self, model: Any) -> None:
        self._state: dict[str, torch.Tensor] = model.state_dict()
        self._loaded: set[int] = set()  # by memory: tied tensors have several names and come once

    def load(self, named: list[tuple[str, torch.Tensor]]) -> None:
        """Copy these over the model's. Raises ModelError before the first copy when one of them does not fit."""
        for name, tensor in named:
            own = self._state.get(name)
            if own is None:
                raise ModelError(f"the served model has no {name}")
            if own.shape != tensor.shape:
                raise ModelError(f"{name} has shape {list(tensor.shape)}, the served model {list(own.shape)}")
        with torch.no_grad():
            for name, tensor in named:
                self._state[name].copy_(tensor)
                self._loaded.add(self._state[name].data_ptr())
        if any(tensor.is_cuda for _, tensor in named):
            torch.cuda.synchronize()  # the sender may write its next bucket once it is answered

    def finish(self) -> None:
        """Raises ModelError naming what never came, unless nothing did: that is a session given up."""
        missing = [name for name, tensor in self._state.items() if tensor.data_ptr() not in self._loaded]
        if self._loaded and missing:
            raise ModelError(f"{missing[0]} was not sent ({len(missing)} tensors missing)")
