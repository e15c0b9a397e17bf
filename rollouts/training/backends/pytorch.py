"""The PyTorch backend: one device, or data-parallel over torch.distributed with a whole model on every rank.

A batch is a dict. Tensors are [B, T] unless said: "input_ids", "labels", "loss_mask", "attention_mask" (right padding
or left; left out: nothing is padded), "advantages" [B], "old_log_probs", "ref_log_probs" (made here where there is a
reference model), and the numbers "tokens_global", "sequences_global", "temperature", "clip_range" (or a pair). The loss
gets `logits` and, by keyword, every key that its signature names. As `logits` the losses of `rl_losses` get log-probs
of the trained tokens (`forward`: nothing is computed for padding, no logits elsewhere), any other gets [B, T, V].
"""

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rollouts.training import checkpoint, distributed, forward
from rollouts.training.backends.futures import BackendFailedError, ThreadFuture, Worker
from rollouts.training.reference import Reference
from rollouts.training.rl_losses import (
    STATISTICS,
    Logits,
    is_log_prob_loss,
    policy_statistics,
    token_log_probs,
    trained_tokens,
)

__all__ = ["BackendFailedError", "PyTorchTrainingBackend"]
_MODEL_KEYS = ("input_ids", "labels", "loss_mask")


class PyTorchTrainingBackend:
    """Forward, backward, all-reduce, clip, step; checkpoints. Work runs on one thread, in the order it was submitted.

    `model` is a transformers causal language model; its parameters stay in their dtype (use float32: they are the
    master weights, and the optimizer's state follows them). `compute_dtype="bfloat16"` runs the forward pass under
    autocast. `optimizer` covers the model's parameters; `lr_schedule(step)`, step counted from 0, is a factor on the
    learning rates it was made with. Gradients are summed over ranks, never averaged: the losses divide by the global
    token count. They are clipped to the global L2 norm `max_grad_norm` (math.inf: never). `tokenizer` goes into the
    checkpoints. `reference` is a frozen model for losses that take "ref_log_probs"; checkpoints say which it was, and
    one that was trained against another is refused. On several ranks, all start from rank 0's parameters, and every
    rank makes the same calls in order.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[..., Tensor],
        checkpoint_dir: Path | str,
        device: torch.device | str = "cpu",
        *,
        tokenizer: Any | None = None,
        max_grad_norm: float = 1.0,
        lr_schedule: Callable[[int], float] | None = None,
        compute_dtype: str = "float32",
        reference: Reference | None = None,
    ) -> None:
        if compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={compute_dtype!r}: needs 'float32' or 'bfloat16'")
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: needs > 0, or math.inf for no clipping")
        self.model = model.to(device)
        self.optimizer = optimizer
        self.checkpoint_dir = Path(checkpoint_dir)
        self.device = torch.device(device)
        self.step = 0  # optimizer steps applied
        self._loss_fn = loss_fn
        self._loss_inputs, self._loss_required = _signature(loss_fn)
        self._packed = is_log_prob_loss(loss_fn) and forward.prepare(model)
        self._tokenizer = tokenizer
        self._reference = reference
        if reference is not None and reference.model is not model:  # with LoRA they may be one
            reference.model.to(device)
            forward.prepare(reference.model)
        self._max_grad_norm = max_grad_norm
        self._lr_schedule = lr_schedule
        self._autocast = compute_dtype == "bfloat16"
        self._base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        statistics = [key for key in STATISTICS if reference is not None or key != "kl_reference"]
        self._sums = dict.fromkeys(("micro_batches", "loss", *statistics), 0.0)  # since the last optim_step
        self._worker = Worker(type(self).__name__)
        model.train()
        distributed.broadcast_tensors([parameter.detach() for parameter in model.parameters()])

    def forward_backward(self, batch: Mapping[str, Any]) -> ThreadFuture[dict[str, float]]:
        """Add the gradient of `batch` to what has gathered since the last `optim_step`.

        {"loss", "grad_norm"} of this rank: the loss's share of the step, and the norm of the gradient so far, before
        it is summed over ranks. With "old_log_probs" in the batch also the means of `rl_losses.policy_statistics`.
        """
        return self._worker.submit("forward_backward", self._forward_backward, batch)

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

    async def save_checkpoint(self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None = None) -> Path:
        """Write `<checkpoint_dir>/step_<step>` (see `checkpoint`); rank 0 writes, all return once it is complete.

        `extra` is plain data (numbers, text, lists, dicts) that `load_checkpoint` hands back. Raises TypeError for
        anything else in it: here, not when a resume depends on it.
        """
        return await self._worker.submit("save_checkpoint", self._save_checkpoint, step, metrics, extra).result()

    async def load_checkpoint(self, path: Path | str) -> dict[str, Any]:
        """Continue from a checkpoint directory: weights, optimizer, counters and RNG. Returns metadata and "extra".

        Learning rates stay those this backend was made with. Raises CheckpointError where a file is missing or differs
        from the manifest, or the model is another.
        """
        return await self._worker.submit("load_checkpoint", self._load_checkpoint, Path(path)).result()

    async def save_weights(self, path: Path | str) -> Path:
        """Write weights and config to the directory `path`, which appears complete or not at all; rank 0 writes."""
        return await self._worker.submit("save_weights", self._save_weights, Path(path)).result()

    # --- on the worker thread ---------------------------------------------------------------------------------------

    def _forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        inputs = self._to_device(batch)
        self._add_reference(inputs)
        logits = self._logits(self.model, inputs)
        loss = self._loss(logits, inputs)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters() if p.grad is not None])
        metrics = {"loss": loss.item(), "grad_norm": norm.item()}
        self._sums["micro_batches"] += 1
        self._sums["loss"] += metrics["loss"]
        if "old_log_probs" in inputs:
            names = ("temperature", "clip_range", *(("ref_log_probs",) if self._reference else ()))
            options = {key: inputs[key] for key in names if key in inputs}
            tensors = (inputs[key] for key in ("labels", "loss_mask", "old_log_probs"))
            sums = policy_statistics(logits, *tensors, **options)
            for key, value in sums.items():
                self._sums[key] += value
            metrics |= _means(sums)
        return metrics

    def _optim_step(self) -> dict[str, float]:
        sums = dict(zip(self._sums, distributed.all_reduce_floats(list(self._sums.values())), strict=True))
        if not sums["micro_batches"]:
            raise ValueError("optim_step: no forward_backward since the last one, so there is nothing to apply")
        parameters = self._parameters()
        for parameter in parameters:
            if parameter.grad is None:  # no sequence on this rank, or unused: every rank and every split does the same
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        distributed.all_reduce_sum(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"grad_norm={norm.item()} at step {self.step + 1} (loss={sums['loss']}): not applied. Lower the "
                "learning rate, or look at this step's batch and at the sampler's log-probs."
            )
        torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        factor = self._lr_schedule(self.step) if self._lr_schedule else 1.0
        for group, base_lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base_lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._sums = dict.fromkeys(self._sums, 0.0)
        first = {"step": self.step, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}
        return {**first, "loss": sums["loss"], **_means(sums)}

    @torch.no_grad()
    def _forward_only(self, batch: Mapping[str, Any]) -> dict[str, float]:
        inputs = self._to_device(batch)
        self._add_reference(inputs)
        self.model.eval()
        loss = self._loss(self._logits(self.model, inputs), inputs)
        self.model.train()
        return {"loss": loss.item(), "tokens": trained_tokens(inputs["loss_mask"])}

    def _save_checkpoint(self, step: int, metrics: dict[str, Any], extra: dict[str, Any] | None) -> Path:
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise TypeError(f"extra of the checkpoint of step {step}: needs plain data: {error}") from error
        rng = distributed.gather_objects(checkpoint.rng_state(self.device))
        path = self.checkpoint_dir / checkpoint.step_name(step)
        if distributed.rank() == 0:
            checkpoint.write_checkpoint(
                self.checkpoint_dir,
                step,
                model=self.model,
                tokenizer=self._tokenizer,
                training_state={
                    "optimizer": self.optimizer.state_dict(),
                    "optimizer_steps": self.step,
                    "rng": rng,
                    "extra": extra or {},
                },
                metadata={
                    "metrics": metrics,
                    "world_size": distributed.world_size(),
                    **({"reference": self._reference.record} if self._reference else {}),
                },
            )
        distributed.barrier()
        return path

    def _load_checkpoint(self, path: Path) -> dict[str, Any]:
        metadata = checkpoint.read_metadata(path)
        self._check_reference(path, metadata.get("reference"))
        state = checkpoint.read_training_state(path)
        checkpoint.read_model(self.model, path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.zero_grad(set_to_none=True)
        self._sums = dict.fromkeys(self._sums, 0.0)
        self.step = state["optimizer_steps"]
        own = distributed.rank() if len(state["rng"]) == distributed.world_size() else 0
        checkpoint.restore_rng_state(state["rng"][own], self.device)
        return {**metadata, "extra": state["extra"]}

    def _save_weights(self, path: Path) -> Path:
        if distributed.rank() == 0:
            checkpoint.write_weights(self.model, path)
        distributed.barrier()
        return path

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        missing = sorted({*_MODEL_KEYS, *self._loss_required} - {*batch, "logits"})
        if missing:
            name = getattr(self._loss_fn, "__name__", repr(self._loss_fn))
            raise ValueError(
                f"batch has no {', '.join(missing)}: needed by the model and {name}; it has {sorted(batch)}"
            )
        return {
            key: value
            if value is None or isinstance(value, (int, float, tuple))
            else torch.as_tensor(value).to(self.device)
            for key, value in batch.items()
        }

    @torch.no_grad()
    def _add_reference(self, inputs: dict[str, Any]) -> None:
        """The reference's log-probs of the trained tokens, the way the policy's are taken: equal weights give 0 KL."""
        if self._reference is not None and "ref_log_probs" not in inputs:
            with self._reference.using(self._reference.model):
                logits = self._logits(self._reference.model, inputs)
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

    def _logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Logits:
        with self._autocasting():
            if self._packed and forward.packs(model):
                is_rl = "advantages" in inputs
                return forward.token_log_probs(model, inputs, with_entropy=is_rl, share_prompts=is_rl)
            return forward.padded_logits(model, inputs)

    def _autocasting(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext()

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


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of the policy statistics; none where no token was counted."""
    if not sums["tokens"]:
        return {}
    return {key: sums[key] / sums["tokens"] for key in STATISTICS if key != "tokens" and key in sums}
