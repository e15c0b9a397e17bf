"""The PyTorch backend: one device, or data-parallel over torch.distributed with a whole model on every rank.

A batch is a dict. Tensors are [B, T] unless said: "input_ids", "labels", "loss_mask", "attention_mask" (right padding
or left; left out: nothing is padded), "advantages" (or [B]), "old_log_probs", "ref_log_probs" (made here where there is
a reference model), "returns", "old_values", and the numbers "tokens_global", "sequences_global", "temperature",
"clip_range" (or a pair). The loss gets `logits` and, by keyword, every key that its signature names. As `logits` the
losses of `rl_losses` get log-probs of the trained tokens, and values where there is a value head (`forward`: nothing is
computed for padding, no logits elsewhere), any other gets [B, T, V].
"""

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rollouts.training import checkpoint, distributed, forward, optimizer_state
from rollouts.training.backends.compute_copies import ComputeCopies, hold_in, use_copies
from rollouts.training.backends.futures import BackendFailedError, ThreadFuture, Worker
from rollouts.training.checkpoint import Retention
from rollouts.training.devices import give_cache_back, set_current
from rollouts.training.forward import Layout
from rollouts.training.host_memory import keep_freed_memory
from rollouts.training.host_to_device import to_device
from rollouts.training.known_gradients import known_gradient
from rollouts.training.reference import Reference
from rollouts.training.rl_losses import (
    STATISTICS,
    Logits,
    is_log_prob_loss,
    of_logits,
    policy_sums,
    token_log_probs,
    trained_tokens,
)
from rollouts.training.seams import Tokenizer
from rollouts.training.value_head import ValueHead

__all__ = ["BackendFailedError", "PyTorchTrainingBackend"]
_MODEL_KEYS = ("input_ids", "labels", "loss_mask")
T = TypeVar("T")


class PyTorchTrainingBackend:
    """Forward, backward, all-reduce, clip, step; checkpoints. Work runs on one thread, in the order it was submitted.

    `model` is a transformers causal language model; its parameters stay in their dtype (use float32: they are the
    master weights, and the optimizer's state follows them). `compute_dtype="bfloat16"` runs the forward pass under
    autocast; on CUDA, an architecture that packs computes with bfloat16 copies of its parameters instead
    (`compute_copies`), made again after each step. `optimizer` covers the model's parameters; `lr_schedule(step)`,
    step counted from 0, is a factor on the learning rates it was made with. Gradients are summed over ranks, never
    averaged: the losses divide by the global token count. They are clipped to the global L2 norm `max_grad_norm`
    (math.inf: never). `tokenizer` goes into the checkpoints. `reference` is a frozen model for losses that take
    "ref_log_probs"; checkpoints say which it was, and one that was trained against another is refused. `value_head`
    gives losses the values that they train, and `values` its estimates; checkpoints keep it in their training state.
    `retention` says which checkpoints stay (None: all). On several ranks, all start from rank 0's parameters, and
    every rank makes the same calls in order.
    """

    collective = False  # whether every rank must run as many forward passes as the others
    has_log_probs = True
    _sharded = False  # whether ranks hold parts of parameters and state, not whole copies

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
    ) -> None:
        if compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={compute_dtype!r}: needs 'float32' or 'bfloat16'")
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: needs > 0, or math.inf for no clipping")
        self.model = model
        self.optimizer = optimizer
        self.checkpoint_dir = Path(checkpoint_dir)
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._place(model)
        self.step = 0  # optimizer steps applied
        self._loss_fn = loss_fn
        self._loss_inputs, self._loss_required = _signature(loss_fn)
        self._reads_log_probs = is_log_prob_loss(loss_fn)
        self._packed = self._reads_log_probs and forward.prepare(model)
        self._tokenizer = copy.deepcopy(tokenizer)  # the writer's own: a fast tokenizer serves one thread at a time
        self._reference = reference
        if reference is not None and reference.model is not model:  # with LoRA they may be one
            self._place(reference.model)
            forward.prepare(reference.model)
        self._copies = self._make_copies(compute_dtype == "bfloat16")
        if value_head is not None and not self._packed:
            raise ValueError(
                "value_head: needs a loss of rl_losses and an architecture that runs packed "
                f"({', '.join(sorted(forward.PACKABLE))}); this model is {getattr(model, 'config', model)!r:.200}"
            )
        self._value_head = None if value_head is None else value_head.to(device)
        self._max_grad_norm = max_grad_norm
        self._lr_schedule = lr_schedule
        self._autocast = compute_dtype == "bfloat16"
        self._base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._statistics = [key for key in STATISTICS if reference is not None or key != "kl_reference"]
        self._start_over()
        self._worker = Worker(type(self).__name__, torch.device(device))
        self._writer = ThreadPoolExecutor(  # exit waits for it
            1, "checkpoint-writer", initializer=set_current, initargs=(torch.device(device),)
        )
        self._writer_group = distributed.new_group()
        self._staging = optimizer_state.Staging()
        self._saving: ThreadFuture[Path] | None = None
        self._retention = retention or Retention()
        self._resumed_from: Path | None = None
        model.train()
        if self._value_head is not None:
            distributed.broadcast_tensors([parameter.detach() for parameter in self._value_head.parameters()])

    def forward_backward(self, batch: Mapping[str, Any]) -> ThreadFuture[dict[str, float]]:
        """Add the gradient of `batch` to what has gathered since the last `optim_step`.

        {"loss", "grad_norm"} of this rank: the loss's share of the step, and the norm of the gradient so far, before
        it is summed over ranks. With "old_log_probs" in the batch also the means of `rl_losses.policy_statistics`.
        Nothing for those that `expect` has announced: all of it is read at `optim_step`.
        """
        return self._worker.submit("forward_backward", self._forward_backward, batch)

    def expect(self, micro_batches: int) -> None:
        """Announce that the next `micro_batches` calls of `forward_backward` make up the next optimizer step.

        The device is then asked for numbers once a step, and a sharded gradient is reduced with the last one alone.
        """
        self._worker.submit("expect", self._expect, micro_batches)

    def optim_step(self) -> ThreadFuture[dict[str, float]]:
        """Sum the gradients over ranks, clip, step, clear. The same on every rank.

        {"step" (steps applied so far), "lr" (of the optimizer's first group), "grad_norm" (before clipping), "loss"},
        the whole step's over all micro-batches and ranks, and likewise the policy statistics. Raises ValueError with
        nothing to apply and FloatingPointError for a gradient that is not finite; the parameters then stay as they are.
        """
        return self._worker.submit("optim_step", self._optim_step)

    def forward(self, batch: Mapping[str, Any]) -> ThreadFuture[dict[str, float]]:
        """{"loss", "tokens"} of `batch` on this rank, without a gradient and with dropout off: for validation."""
        return self._worker.submit("forward", self._forward_only, batch)

    def values(self, batch: Mapping[str, Any]) -> ThreadFuture[Tensor]:
        """The value head's estimates [B, T] on the CPU, without a gradient and with dropout off.

        Entry t is the value of the state in which token t was chosen, for the trained tokens; 0 for the others.
        """
        return self._worker.submit("values", self._values, batch)

    def log_probs(self, batch: Mapping[str, Any]) -> ThreadFuture[Tensor]:
        """Log-probs [B, T] of the tokens that `batch`'s loss_mask marks, on the CPU, 0 elsewhere; dropout off."""
        return self._worker.submit("log_probs", self._log_probs, batch)

    def on_model(self, function: Callable[[nn.Module], T]) -> ThreadFuture[T]:
        """`function(model)`, in turn with other work and with parameters sharded as at rest; every rank calls it."""
        return self._worker.submit("on_model", self._on_model, function)

    def give_cache_back(self) -> ThreadFuture[None]:
        """Return the device memory that is kept and not used, in turn with other work. One rank may call it alone."""
        return self._worker.submit("give_cache_back", give_cache_back, self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Have the model compute as in training, for a caller that runs it by itself; no work may be in flight."""
        with self._computing(self.model), self._autocasting(self.model):
            yield

    async def save_checkpoint(self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None) -> Path:
        """`start_checkpoint`, and wait until it is complete: its directory."""
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
        anything else in it: here, not when a resume depends on it.
        """
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise TypeError(f"extra of the checkpoint of step {step}: needs plain data: {error}") from error
        what = (step, dict(metrics), copy.deepcopy(extra or {}), self._saving)
        staged = self._worker.submit("save_checkpoint", self._snapshot, *what)
        self._saving = saving = ThreadFuture(self._writer.submit(self._write, staged))
        await staged.result()
        return saving

    def close(self) -> None:
        """Wait for the checkpoint that is being written, if any, however it ends. Before the process group goes."""
        if self._saving is not None:
            self._saving.wait_done()

    async def load_checkpoint(self, path: Path | str) -> dict[str, Any]:
        """Continue from a checkpoint directory: weights, optimizer, counters and RNG. Returns metadata and "extra".

        Learning rates stay those this backend was made with. Raises CheckpointError where a file is missing or differs
        from the manifest, or the model is another.
        """
        return await self._worker.submit("load_checkpoint", self._load_checkpoint, Path(path)).result()

    async def save_weights(self, path: Path | str, dtype: torch.dtype | None = None) -> Path:
        """Write weights and config to the directory `path`, which appears complete or not at all; rank 0 writes.

        `dtype`: what floating-point tensors are written as; None: as they are.
        """
        return await self._worker.submit("save_weights", self._save_weights, Path(path), dtype).result()

    def _place(self, model: nn.Module) -> None:
        """Onto this rank's device, with rank 0's parameters."""
        model.to(self.device)
        distributed.broadcast_tensors([parameter.detach() for parameter in model.parameters()])

    # --- on the worker thread ---------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        """Forget what has gathered since the last optimizer step."""
        self._micro_batches = 0
        self._totals = torch.zeros(1 + len(self._statistics), dtype=torch.float64, device=self.device)  # loss first
        self._expected = 0

    def _expect(self, micro_batches: int) -> None:
        self._expected = micro_batches

    def _forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        announced = self._expected > 0
        self._expected -= announced
        self._reduce_now(now=not self._expected)
        inputs, layout = self._to_device(batch)
        self._add_reference(inputs, layout)
        with self._computing(self.model):  # the backward pass too: it computes checkpointed activations again
            logits = self._logits(self.model, inputs, layout)
            loss = self._loss(logits, inputs)
            loss.backward()
        sums = [loss.detach().double().reshape(1)]
        if "old_log_probs" in inputs:
            names = ("temperature", "clip_range", *(("ref_log_probs",) if self._reference else ()))
            options = {key: inputs[key] for key in names if key in inputs}
            tensors = (inputs[key] for key in ("labels", "loss_mask", "old_log_probs"))
            sums.append(policy_sums(logits, *tensors, **options))
        found = torch.cat(sums)
        self._micro_batches += 1
        self._totals[: len(found)] += found
        if announced:
            return {}
        norm = _total_norm([p.grad for p in self._parameters() if p.grad is not None])
        grad_norm, loss_value, *statistics = self._read([norm], found)
        named = dict(zip(self._statistics, statistics, strict=False))
        return {"loss": loss_value, "grad_norm": grad_norm, **(_means(named) if named else {})}

    def _read(self, norms: list[Tensor], sums: Tensor) -> list[float]:
        """All of them, in one wait for the device."""
        return torch.cat([*(norm.detach().to(self.device, torch.float64).reshape(1) for norm in norms), sums]).tolist()

    def _optim_step(self) -> dict[str, float]:
        parameters = self._parameters()
        for parameter in parameters:
            if parameter.grad is None:  # no sequence on this rank, or unused: every rank and every split does the same
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._sum_over_ranks(gradients)
        norms = [_total_norm(gradients)]
        if self._value_head is not None:
            norms.append(self._value_head.gradient_norm())
        numbers = self._read(norms, self._totals)
        (grad_norm, *value_norm), totals = numbers[: len(norms)], numbers[len(norms) :]
        micro_batches, loss, *statistics = distributed.all_reduce_floats([self._micro_batches, *totals])
        if not micro_batches:
            raise ValueError("optim_step: no forward_backward since the last one, so there is nothing to apply")
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"grad_norm={grad_norm} at step {self.step + 1} (loss={loss}): not applied. Lower the "
                "learning rate, or look at this step's batch and at the sampler's log-probs."
            )
        if not all(map(math.isfinite, value_norm)):
            raise FloatingPointError(
                f"grad_norm={value_norm[0]} of the value head at step {self.step + 1} (loss={loss}): not applied. "
                "Lower its learning rate, or look at this step's rewards and returns."
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norms[0])
        factor = self._lr_schedule(self.step) if self._lr_schedule else 1.0
        for group, base_lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base_lr * factor
        self.optimizer.step()
        self._weights_changed()
        self.optimizer.zero_grad(set_to_none=True)
        if self._value_head is not None:
            self._value_head.step(factor, self._max_grad_norm, norms[1])
        self.step += 1
        self._start_over()
        first = {"step": self.step, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": grad_norm}
        return {**first, "loss": loss, **_means(dict(zip(self._statistics, statistics, strict=True)))}

    @torch.no_grad()
    def _values(self, batch: Mapping[str, Any]) -> Tensor:
        if self._value_head is None:
            raise ValueError("values: this backend has no value head; give it one")
        own = {key: batch[key] for key in (*_MODEL_KEYS, "attention_mask") if key in batch}
        inputs, layout = self._to_device(own, (), share_prompts=True)
        self.model.eval()
        with self._computing(self.model), self._autocasting(self.model):
            values_BT = forward.token_values(self.model, inputs, self._value_head, layout)
        self.model.train()
        return values_BT.cpu()

    @torch.no_grad()
    def _forward_only(self, batch: Mapping[str, Any]) -> dict[str, float]:
        inputs, layout = self._to_device(batch)
        self._add_reference(inputs, layout)
        self.model.eval()
        loss = self._loss(self._logits(self.model, inputs, layout), inputs)
        self.model.train()
        return {"loss": loss.item(), "tokens": trained_tokens(torch.as_tensor(batch["loss_mask"]))}

    @torch.no_grad()
    def _log_probs(self, batch: Mapping[str, Any]) -> Tensor:
        inputs, layout = self._to_device(batch, ())
        self.model.eval()
        logits = self._logits(self.model, inputs, layout)
        self.model.train()
        return token_log_probs(logits, inputs["labels"], inputs["loss_mask"]).cpu()

    def _on_model(self, function: Callable[[nn.Module], T]) -> T:
        try:
            return function(self.model)
        finally:
            self._weights_changed()

    def _snapshot(
        self, step: int, metrics: dict[str, Any], extra: dict[str, Any], before: ThreadFuture[Path] | None
    ) -> checkpoint.Snapshot:
        if before is not None:
            before.wait()  # one copy in memory at a time; and a save that failed ends the run, seen or not
        tensors, plain = optimizer_state.collect(self.model, self.optimizer)
        rng = distributed.gather_objects(checkpoint.rng_state(self.device))
        own_part = self._sharded or distributed.rank() == 0
        value = {"value_head": copy.deepcopy(self._value_head.state())} if self._value_head else {}
        return checkpoint.Snapshot(
            step=step,
            weights=checkpoint.whole_weights(self.model, copy=True),
            adapter=checkpoint.whole_adapter(self.model),
            optimizer=self._staging.copy(tensors) if own_part else {},
            training_state={"optimizer": plain, "optimizer_steps": self.step, "rng": rng, "extra": extra, **value},
            metadata={
                "metrics": metrics,
                "world_size": distributed.world_size(),
                **({"reference": self._reference.record} if self._reference else {}),
            },
        )

    def _write(self, staged: ThreadFuture[checkpoint.Snapshot]) -> Path:
        """On the writer's thread."""
        return checkpoint.write_checkpoint(
            self.checkpoint_dir,
            staged.wait(),
            model=self.model,
            tokenizer=self._tokenizer,
            retention=self._retention,
            protected=[self._resumed_from] if self._resumed_from else [],
            group=self._writer_group,
        )

    def _load_checkpoint(self, path: Path) -> dict[str, Any]:
        self.close()
        metadata = distributed.on_rank_0(lambda: checkpoint.read_metadata(path))
        self._check_reference(path, metadata.get("reference"))
        state = checkpoint.read_training_state(path)
        checkpoint.read_model(self.model, path)
        self._weights_changed()
        optimizer_directory = path / checkpoint.OPTIMIZER_DIRECTORY
        optimizer_state.restore(self.model, self.optimizer, optimizer_directory, state["optimizer"])
        self.optimizer.zero_grad(set_to_none=True)
        self._load_value_head(path, state.get("value_head"))
        self._start_over()
        self.step = state["optimizer_steps"]
        own = distributed.rank() if len(state["rng"]) == distributed.world_size() else 0
        checkpoint.restore_rng_state(state["rng"][own], self.device)
        self._resumed_from = path.resolve()
        return {**metadata, "extra": state["extra"]}

    def _load_value_head(self, path: Path, saved: Mapping[str, Any] | None) -> None:
        if (saved is None) != (self._value_head is None):
            has, needs = ("no value head", "one") if saved is None else ("a value head", "none")
            raise checkpoint.CheckpointError(
                f"{path}: was saved with {has}, and this run has {needs}. Resume with the baseline that run began "
                "with, or start a new run from the checkpoint's weights."
            )
        if self._value_head is not None and saved is not None:
            self._value_head.load_state(saved)

    def _save_weights(self, path: Path, dtype: torch.dtype | None) -> Path:
        weights = checkpoint.whole_weights(self.model, copy=False, dtype=dtype)
        return distributed.on_rank_0(lambda: checkpoint.write_weights(self.model, path, weights))

    def _reduce_now(self, *, now: bool) -> None:
        """Whether the next backward pass sums its gradient over ranks. Whole copies do so in `optim_step`."""

    def _sum_over_ranks(self, gradients: list[Tensor]) -> None:
        distributed.all_reduce_sum(gradients)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _to_device(
        self, batch: Mapping[str, Any], required: Iterable[str] | None = None, *, share_prompts: bool | None = None
    ) -> tuple[dict[str, Any], Layout | None]:
        """The batch on this device, and its layout for a loss of log-probs. Prompts are shared in RL, unless said."""
        required = self._loss_required if required is None else required
        missing = sorted({*_MODEL_KEYS, *required} - {*batch, "logits"})
        if missing:
            name = getattr(self._loss_fn, "__name__", repr(self._loss_fn))
            raise ValueError(
                f"batch has no {', '.join(missing)}: needed by the model and {name}; it has {sorted(batch)}"
            )
        if not self._reads_log_probs:
            return {**batch, **to_device(forward.tensors_of(batch), self.device)}, None
        shared = "advantages" in batch if share_prompts is None else share_prompts
        layout, tensors = forward.lay_out(batch, self.device, packed=self._packed, share_prompts=shared)
        return {**batch, **tensors}, layout

    @torch.no_grad()
    def _add_reference(self, inputs: dict[str, Any], layout: Layout | None) -> None:
        """The reference's log-probs of the trained tokens, the way the policy's are taken: equal weights give 0 KL."""
        if self._reference is not None and "ref_log_probs" not in inputs:
            with self._reference.using(self._reference.model):
                logits = self._logits(self._reference.model, inputs, layout)
            temperature = inputs.get("temperature", 1.0)
            inputs["ref_log_probs"] = token_log_probs(
                logits, inputs["labels"], inputs["loss_mask"], temperature=temperature
            )

    def _check_reference(self, path: Path, recorded: Mapping[str, str] | None) -> None:
        if self._reference is not None and recorded is not None and recorded["sha256"] != self._reference.sha256:
            raise checkpoint.CheckpointError(
                f"{path}: was trained with a KL penalty towards {recorded['name']} (sha256 {recorded['sha256'][:12]}); "
                f"the reference is now {self._reference.name} (sha256 {self._reference.sha256[:12]}), with other "
                "weights. Resume with the first, or start a new run from the checkpoint's weights."
            )

    def _logits(self, model: nn.Module, inputs: Mapping[str, Any], layout: Layout | None) -> Logits:
        is_rl = "advantages" in inputs
        with self._computing(model), self._autocasting(model):
            if layout is not None and layout.packed is not None and forward.packs(model):
                options: dict[str, Any] = {"with_entropy": is_rl, "layout": layout}
                if model is self.model:
                    options["value_head"] = self._value_head
                    options["known_gradient"] = None if is_rl else known_gradient(self._loss_fn, inputs)
                return forward.token_log_probs(model, inputs, **options)
            logits = forward.padded_logits(model, inputs)
        if layout is None:
            return logits
        where = layout.keep, layout.places_N
        temperature = inputs.get("temperature", 1.0)
        return of_logits(logits, inputs["labels"], *where, temperature=temperature, with_entropy=is_rl)

    def _make_copies(self, wanted: bool) -> ComputeCopies | None:
        """Copies to compute with, where they are wanted and the model packs; then the reference has no others."""
        if not (wanted and self._packed and use_copies(self.device)):
            return None
        if self._reference is not None and self._reference.model is not self.model:
            hold_in(self._reference.model, torch.bfloat16)
        return ComputeCopies(self.model, torch.bfloat16)

    def _computing(self, model: nn.Module) -> AbstractContextManager[None]:
        return self._copies.in_place() if self._copies is not None and model is self.model else nullcontext()

    def _autocasting(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Autocast, unless the packed `model` has parameters in bfloat16 now."""
        if not self._autocast or (self._copies is not None and forward.packs(model)):
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _weights_changed(self) -> None:
        if self._copies is not None:
            self._copies.masters_changed()

    def _loss(self, logits: Logits, inputs: Mapping[str, Any]) -> Tensor:
        named = inputs if self._loss_inputs is None else {k: v for k, v in inputs.items() if k in self._loss_inputs}
        return self._loss_fn(logits=logits, **named)


def _signature(loss_fn: Callable[..., Tensor]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """The keywords `loss_fn` takes (None: any) and those it cannot do without."""
    parameters = inspect.signature(loss_fn).parameters.values()
    required = frozenset(p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None, required
    return frozenset(p.name for p in parameters), required


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of them all, a scalar; of sharded ones (every rank calls it then) over all shards."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of the policy statistics; none where no token was counted."""
    if not sums["tokens"]:
        return {}
    return {key: sums[key] / sums["tokens"] for key in STATISTICS if key != "tokens" and key in sums}
