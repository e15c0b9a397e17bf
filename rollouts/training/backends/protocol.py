"""What a loop asks of a training backend."""

from pathlib import Path
from typing import Any, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class TrainFuture(Protocol[T_co]):
    async def result(self) -> T_co:
        """Wait until the work is applied and return what it gave; raises what it raised. Under asyncio and trio."""

    def done(self) -> bool:
        """Whether result() would not wait. Asked for by the loops of what `start_checkpoint` gives."""


class TrainingBackend(Protocol):
    """Work is submitted in order and applied in order; several pieces may be in flight. Every rank makes each call."""

    def forward_backward(self, batch: dict[str, Any]) -> TrainFuture[dict[str, float]]:
        """Add a micro-batch's gradient: {"loss", "grad_norm", ...}. The losses of a step's micro-batches add up."""

    def expect(self, micro_batches: int) -> None:
        """Announce how many `forward_backward` make up the next optimizer step; they may then return nothing.

        The loops do without it where a backend has none, and take the step's loss from each.
        """

    def optim_step(self) -> TrainFuture[dict[str, float]]:
        """Apply the gradients summed over micro-batches and ranks: {"lr", "step", ...}."""

    async def save_checkpoint(self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint that resumes exactly, with `extra` (plain data) beside it, and return its directory."""

    async def start_checkpoint(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> TrainFuture[Path]:
        """The same while later work goes on: what is saved is the state after all work submitted before.

        Returns once that is copied; result() waits until it is complete. A backend without this method is saved from
        while training waits.
        """

    async def load_checkpoint(self, path: Path) -> dict[str, Any]:
        """Continue from a checkpoint: its metadata, with "step", "metrics" and "extra"."""

    async def save_weights(self, path: Path) -> Path:
        """Write the weights alone, as an engine loads them, to the directory `path`. Asked for by RL with engines."""
