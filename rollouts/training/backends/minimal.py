"""A backend of a user's own, made complete: the one place that looks at what a backend lacks."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio.lowlevel
import torch
from torch import Tensor, nn

from rollouts.training.seams import Batch, MinimalBackend, TrainFuture, TrainingBackend

T = TypeVar("T")


class LackingMethodError(AttributeError):
    """The backend lacks a method that what was asked for needs."""


def complete(backend: MinimalBackend) -> TrainingBackend:
    """Return `backend` with what it lacks filled in; a complete one is returned as it is.

    What only speeds training up, or reports on it, has a harmless stand-in. A method without one raises
    LackingMethodError when it is called.
    """
    return backend if isinstance(backend, TrainingBackend) else _Completed(backend)


class _Completed:
    def __init__(self, backend: MinimalBackend) -> None:
        self._given = backend
        self.forward_backward = backend.forward_backward
        self.optim_step = backend.optim_step
        # no config and no embeddings: its FLOPs and limits are not known
        self._unknown_model = nn.Module()

    @property
    def model(self) -> nn.Module:
        model: nn.Module | None = getattr(self._given, "model", None)
        return self._unknown_model if model is None else model

    @property
    def device(self) -> torch.device:
        return torch.device(getattr(self._given, "device", "cpu"))

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self._needed("checkpoint_dir"))

    @property
    def step(self) -> int:
        step: int = self._needed("step")
        return step

    @property
    def collective(self) -> bool:
        return bool(getattr(self._given, "collective", False))

    @property
    def has_log_probs(self) -> bool:
        return hasattr(self._given, "log_probs")

    def expect(self, micro_batches: int) -> None:
        if (expect := getattr(self._given, "expect", None)) is not None:
            expect(micro_batches)

    def forward(self, batch: Batch) -> TrainFuture[dict[str, float]]:
        return self._call("forward", batch)

    def log_probs(self, batch: Batch) -> TrainFuture[Tensor]:
        return self._call("log_probs", batch)

    def trained_log_probs(self) -> TrainFuture[list[Tensor]]:
        kept = getattr(self._given, "trained_log_probs", None)
        return _Done([]) if kept is None else kept()

    def values(self, batch: Batch) -> TrainFuture[Tensor]:
        return self._call("values", batch)

    def on_model(self, function: Callable[[nn.Module], T]) -> TrainFuture[T]:
        return self._call("on_model", function)

    def computing(self) -> AbstractContextManager[None]:
        computing = getattr(self._given, "computing", None)
        return nullcontext() if computing is None else computing()

    def give_cache_back(self) -> TrainFuture[None]:
        give_cache_back = getattr(self._given, "give_cache_back", None)
        return _Done(None) if give_cache_back is None else give_cache_back()

    async def save_checkpoint(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> Path:
        """Save without `extra` where the backend takes none: a run cannot then resume in the middle of its data."""
        save = self._given.save_checkpoint
        return await (
            save(step, metrics, extra=extra) if _takes(save, "extra") else save(step, metrics)
        )

    async def start_checkpoint(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> TrainFuture[Path]:
        """Save while training waits, where the backend cannot save in the background."""
        start = getattr(self._given, "start_checkpoint", None)
        if start is None:
            return _Done(await self.save_checkpoint(step, metrics, extra))
        return await start(step, metrics, extra=extra)

    async def load_checkpoint(self, path: Path) -> dict[str, Any]:
        return await self._given.load_checkpoint(path)

    async def save_weights(self, path: Path, dtype: torch.dtype | None = None) -> Path:
        options = {} if dtype is None else {"dtype": dtype}
        return await self._call("save_weights", path, **options)

    def close(self) -> None:
        if (close := getattr(self._given, "close", None)) is not None:
            close()

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return self._needed(name)(*arguments, **options)

    def _needed(self, name: str) -> Any:
        if not hasattr(self._given, name):
            raise LackingMethodError(
                f"{type(self._given).__name__} lacks {name}, which this run needs: see rollouts.training.seams."
                "TrainingBackend"
            )
        return getattr(self._given, name)


class _Done(Generic[T]):
    """A future whose work is done."""

    def __init__(self, value: T) -> None:
        self._value = value

    async def result(self) -> T:
        await anyio.lowlevel.checkpoint()
        return self._value

    def done(self) -> bool:
        return True


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(
        parameter.name == name or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )
