"""Compile a model layer by layer, into one piece of code that all layers of a kind share.

A layer is compiled for tokens of any number, without a cut. What stays outside runs as it is: embeddings, the output
head, what FSDP does around a layer, and generation, whose cache tells the layers apart. A layer's activation
checkpointing and adapters are inside. A layer is found again in each call, so that `compile_layers` may come before or
after adapters, checkpointing and sharding.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch.fx.experimental import _config as symbolic_shapes

logger = logging.getLogger(__name__)
# torch.compile's backend
Compiler = str | Callable[[torch.fx.GraphModule, list[torch.Tensor]], Callable[..., object]]
# Versions of the code in a process: kinds of layers, with and without gradients, windows that documents reach or not.
_VERSIONS_MAX = 32
_thread = threading.local()  # torch's settings are each thread's own, and so is `ready`


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a transformers model, in order; none where it does not say which they are."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: nn.Module, *, backend: Compiler = "inductor") -> None:
    """Compile each decoder layer of `model`, in place, when it first runs.

    `backend` is torch.compile's. Where a layer cannot be compiled, the model runs uncompiled and a warning says why.
    """
    layers = layers_of(model)
    if not layers:
        logger.warning(
            "%s runs uncompiled: it does not say which of its modules are layers",
            type(model).__name__,
        )
    shared = _Code(type(model).__name__, backend)
    for layer in layers:
        layer.forward = _Forward(layer, shared)


def _run(layer: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Run the layer's own forward, which sharding replaces together with the layer's class."""
    return type(layer).forward(layer, *arguments, **options)


class _Code:
    """What all layers of a model run; where that fails, `works` is False from then on."""

    def __init__(self, model_name: str, backend: Compiler) -> None:
        self.works = True
        self._model_name = model_name
        self._compiled = torch.compile(_run, backend=backend, dynamic=True, fullgraph=True)

    def __call__(self, layer: nn.Module, *arguments: Any, **options: Any) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        _set_up_thread()
        try:
            return self._compiled(layer, *arguments, **options)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # before anything ran
            self.works = False
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning(
                "the layers of %s run uncompiled from here on: %s", self._model_name, reason
            )
            return _run(layer, *arguments, **options)


def _set_up_thread() -> None:
    """Let this thread compile all versions, and take sizes that are equal by chance for different ones."""
    if not getattr(_thread, "ready", False):
        dynamo.recompile_limit = max(dynamo.recompile_limit, _VERSIONS_MAX)
        symbolic_shapes.use_duck_shape = False
        _thread.ready = True


class _Forward:
    """A layer's forward: compiled, unless there is a cache of keys and values, as in generation."""

    def __init__(self, layer: nn.Module, code: _Code) -> None:
        self._layer = layer
        self._code = code

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from transformers import Cache

        cached = any(isinstance(value, Cache) for value in (*arguments, *options.values()))
        run = self._code if self._code.works and not cached else _run
        return run(self._layer, *arguments, **options)
