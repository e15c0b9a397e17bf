"""The PyTorch backend: one device, or data-parallel over torch.distributed with a whole model on every rank.

A batch is a dict with the keys of `seams.Batch`. The loss gets `logits` and, by keyword, every key that its signature
names. As `logits` the losses of `rl_losses` get log-probs of the trained tokens, and values where there is a value
head (`forward`: nothing is computed for padding, no logits elsewhere). Any other loss gets [B, T, V].
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rollouts.training import distributed, forward
from rollouts.training.backends.futures import BackendFailedError, ThreadFuture, Worker
from rollouts.training.backends.loss_function import LossFunction
from rollouts.training.backends.optimizer_steps import OptimizerSteps
from rollouts.training.backends.passes import Passes
from rollouts.training.backends.placement import Placement, WholeCopy
from rollouts.training.backends.precision import Precision
from rollouts.training.backends.resuming import resume
from rollouts.training.backends.saving import Saver
from rollouts.training.backends.trained import Trained
from rollouts.training.checkpoint import Retention
from rollouts.training.devices import give_cache_back
from rollouts.training.host_memory import keep_freed_memory
from rollouts.training.reference import Reference
from rollouts.training.seams import Batch, Tokenizer
from rollouts.training.value_head import ValueHead

__all__ = ["BackendFailedError", "PyTorchTrainingBackend"]
T = TypeVar("T")


class PyTorchTrainingBackend:
    """Forward, backward, all-reduce, clip, step; checkpoints. Work runs on one thread, in the order it was submitted.

    `model` is a transformers causal language model; its parameters stay in their dtype (use float32: they are the
    master weights, and the optimizer's state follows them). `compute_dtype`: see `precision.Precision`. `optimizer`
    covers the model's parameters; `lr_schedule(step)`, step counted from 0, is a factor on the learning rates it was
    made with. Gradients are summed over ranks, never averaged: the losses divide by the global token count. They are
    clipped to the global L2 norm `max_grad_norm` (math.inf: never). `tokenizer` goes into the checkpoints. `reference`
    is a frozen model for losses that take "ref_log_probs"; checkpoints say which it was, and one that was trained
    against another is refused. `value_head` gives losses the values that they train, and `values` its estimates;
    checkpoints keep it in their training state. `retention` says which checkpoints stay (None: all). `placement` None:
    all ranks have a whole copy, and start from rank 0's parameters. Every rank makes the same calls in order.
    """

    has_log_probs = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor],
        checkpoint_dir: Path | str,
        device: torch.device | str = "cpu",
        *,
        tokenizer: Tokenizer | None = None,
        max_grad_norm: float = 1.0,
        lr_schedule: Callable[[int], float] | None = None,
        compute_dtype: str = "float32",
        reference: Reference | None = None,
        retention: Retention | None = None,
        value_head: ValueHead | None = None,
        placement: Placement | None = None,
    ) -> None:
        if compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={compute_dtype!r}: needs 'float32' or 'bfloat16'")
        if not max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={max_grad_norm}: needs > 0, or math.inf for no clipping"
            )
        placement = placement or WholeCopy(torch.device(device))
        if placement.device.type == "cpu":
            keep_freed_memory()
        placement.place(model)
        loss = LossFunction(loss_fn)
        packed = loss.reads_log_probs and forward.prepare(model)
        if reference is not None and reference.model is not model:  # with LoRA they may be one
            placement.place(reference.model)
            forward.prepare(reference.model)
        precision = Precision(compute_dtype, model, reference, placement.device, packed=packed)
        if value_head is not None:
            _check_value_head(model, packed)
            value_head = value_head.to(placement.device)
        self._trained = Trained(model, optimizer, placement, precision, reference, value_head)
        self._passes = Passes(self._trained, loss, packed=packed)
        self._steps = OptimizerSteps(
            self._trained, self._passes, max_grad_norm=max_grad_norm, lr_schedule=lr_schedule
        )
        self._worker = Worker(type(self).__name__, placement.device)
        self._saver = Saver(self._trained, Path(checkpoint_dir), tokenizer, retention)
        model.train()
        if value_head is not None:
            distributed.broadcast_tensors(
                [parameter.detach() for parameter in value_head.parameters()]
            )

    @property
    def model(self) -> nn.Module:
        return self._trained.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._trained.optimizer

    @property
    def device(self) -> torch.device:
        return self._trained.device

    @property
    def checkpoint_dir(self) -> Path:
        return self._saver.checkpoint_dir

    @property
    def step(self) -> int:
        """Optimizer steps applied."""
        return self._trained.step

    @property
    def collective(self) -> bool:
        """Whether every rank must run as many forward passes as the others."""
        return self._trained.placement.collective

    def forward_backward(self, batch: Mapping[str, Any]) -> ThreadFuture[dict[str, float]]:
        """Add the gradient of `batch` to what has gathered since the last `optim_step`.

        {"loss", "grad_norm"} of this rank: the loss's share of the step, and the norm of the gradient so far, before
        it is summed over ranks. With "old_log_probs" in the batch also the means of `rl_losses.policy_statistics`.
        Nothing for those that `expect` has announced: all of it is read at `optim_step`.
        """
        return self._worker.submit(
            "forward_backward", self._steps.forward_backward, cast(Batch, batch)
        )

    def expect(self, micro_batches: int) -> None:
        """Announce that the next `micro_batches` calls of `forward_backward` make up the next optimizer step.

        The device is then asked for numbers once a step, and a sharded gradient is reduced with the last one alone.
        """
        self._worker.submit("expect", self._steps.sums.announce, micro_batches)

    def optim_step(self) -> ThreadFuture[dict[str, float]]:
        """Sum the gradients over ranks, clip, step, clear. The same on every rank.

        {"step" (steps applied so far), "lr" (of the optimizer's first group), "grad_norm" (before clipping), "loss"},
        the whole step's over all micro-batches and ranks, and likewise the policy statistics. Raises ValueError with
        nothing to apply and FloatingPointError for a gradient that is not finite; the parameters then stay as they are.
        """
        return self._worker.submit("optim_step", self._steps.optim_step)

    def forward(self, batch: Mapping[str, Any]) -> ThreadFuture[dict[str, float]]:
        """{"loss", "tokens"} of `batch` on this rank, without a gradient and with dropout off: for validation."""
        return self._worker.submit("forward", self._passes.forward, cast(Batch, batch))

    def values(self, batch: Mapping[str, Any]) -> ThreadFuture[Tensor]:
        """Return the value head's estimates [B, T] on the CPU, without a gradient and with dropout off.

        Entry t is the value of the state in which token t was chosen, for the trained tokens; 0 for the others.
        """
        return self._worker.submit("values", self._passes.values, cast(Batch, batch))

    def log_probs(self, batch: Mapping[str, Any]) -> ThreadFuture[Tensor]:
        """Log-probs [B, T] of the tokens that `batch`'s loss_mask marks, on the CPU, 0 elsewhere; dropout off."""
        return self._worker.submit("log_probs", self._passes.log_probs, cast(Batch, batch))

    def trained_log_probs(self) -> ThreadFuture[list[Tensor]]:
        """Log-probs [B, T] of the last update's trained tokens, a tensor a micro-batch, on the CPU; 0 elsewhere.

        Those that its loss was computed from: no pass is made. [] where the batch had no "old_log_probs".
        """
        return self._worker.submit("trained_log_probs", self._passes.trained_log_probs)

    def on_model(self, function: Callable[[nn.Module], T]) -> ThreadFuture[T]:
        """Call `function(model)` in turn with other work, with sharded parameters at rest; every rank calls it."""
        return self._worker.submit("on_model", self._call_on_model, function)

    def give_cache_back(self) -> ThreadFuture[None]:
        """Return the device memory that is kept and not used, in turn with other work. One rank may call it alone."""
        return self._worker.submit("give_cache_back", give_cache_back, self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Have the model compute as in training, for a caller that runs it by itself; no work may be in flight."""
        precision = self._trained.precision
        with precision.computing(self.model), precision.autocasting(self.model):
            yield

    async def save_checkpoint(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> Path:
        """Call `start_checkpoint` and wait until it is complete. Return its directory."""
        return await (await self.start_checkpoint(step, metrics, extra)).result()

    async def start_checkpoint(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> ThreadFuture[Path]:
        """Save the state as it is after all work submitted before, while later work goes on.

        Returns once it is copied to host memory, in turn with other work and after the checkpoint before is written. A
        thread of its own then writes `<checkpoint_dir>/step_<step>` (see `checkpoint`). result() gives that directory
        when it is complete on every rank, or raises why it could not be written; so does the next save. The process
        does not exit before.
        `extra` is plain data (numbers, text, lists, dicts) that `load_checkpoint` hands back. Raises TypeError for
        anything else in it.
        """
        return await self._saver.start(self._worker, step, metrics, extra)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, if any, however it ends. Before the process group goes."""
        self._saver.close()

    async def load_checkpoint(self, path: Path | str) -> dict[str, Any]:
        """Continue from a checkpoint directory: weights, optimizer, counters and RNG. Returns metadata and "extra".

        Learning rates stay those this backend was made with. Raises CheckpointError where a file is missing or differs
        from the manifest, or the model is another.
        """
        return await self._worker.submit("load_checkpoint", self._resume, Path(path)).result()

    async def save_weights(self, path: Path | str, dtype: torch.dtype | None = None) -> Path:
        """Write weights and config to the directory `path`, which appears complete or not at all; rank 0 writes.

        `dtype`: what floating-point tensors are written as; None: as they are.
        """
        return await self._worker.submit(
            "save_weights", self._saver.save_weights, Path(path), dtype
        ).result()

    # --- on the worker thread ---------------------------------------------------------------------------------------

    def _call_on_model(self, function: Callable[[nn.Module], T]) -> T:
        self._trained.placement.at_rest(self.model)
        try:
            return function(self.model)
        finally:
            self._trained.precision.weights_changed()

    def _resume(self, path: Path) -> dict[str, Any]:
        self._saver.close()
        found = resume(self._trained, path)
        self._steps.sums.start_over()
        self._saver.resumed_from = path.resolve()
        return found


def _check_value_head(model: nn.Module, packed: bool) -> None:
    if not packed:
        raise ValueError(
            "value_head: needs a loss of rl_losses and an architecture that runs packed "
            f"({', '.join(sorted(forward.PACKABLE))}); this model is {getattr(model, 'config', model)!r:.200}"
        )
