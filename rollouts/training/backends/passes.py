"""Forward and backward passes over a batch: from what a batch holds to the loss, log-probs and values."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rollouts.training import forward
from rollouts.training.backends.loss_function import MODEL_KEYS, LossFunction
from rollouts.training.backends.trained import Trained
from rollouts.training.forward import Layout
from rollouts.training.host_to_device import to_device
from rollouts.training.known_gradients import known_gradient
from rollouts.training.policy_statistics import policy_sums
from rollouts.training.seams import Batch
from rollouts.training.token_selection import (
    Logits,
    select,
    select_from_logits,
    token_log_probs,
    trained_tokens,
)


class Passes:
    """Each method is one pass over a batch. `packed`: the model runs without padding. On one thread at a time."""

    def __init__(self, trained: Trained, loss: LossFunction, *, packed: bool) -> None:
        self._trained = trained
        self._model = trained.model
        self._loss = loss
        self._packed = packed
        self._trained_log_probs: list[Tensor] = []  # of the update's micro-batches, on the device

    def start_update(self) -> None:
        """Forget what was kept of the update before."""
        self._trained_log_probs = []

    def trained_log_probs(self) -> list[Tensor]:
        """Return [B, T] of each micro-batch of the update, on the CPU, 0 for what is not trained on."""
        return [log_probs_BT.cpu() for log_probs_BT in self._trained_log_probs]

    def backward(self, batch: Batch) -> Tensor:
        """Add the gradient of `batch`. Return [1 or more], float64, on the device: the loss, then `policy_sums`."""
        inputs, layout = self._on_device(batch, self._loss.required)
        self._add_reference(inputs, layout)
        # for backward too: it repeats checkpointed activations
        with self._trained.precision.computing(self._model):
            logits = self._logits(self._model, inputs, layout)
            loss = self._loss(logits, inputs)
            loss.backward()
        found = [loss.detach().double().reshape(1)]
        if "old_log_probs" in inputs:
            found.append(self._policy_sums(logits, inputs))
        return torch.cat(found)

    @torch.no_grad()
    def forward(self, batch: Batch) -> dict[str, float]:
        """Return {"loss", "tokens"} of `batch`, with dropout off."""
        inputs, layout = self._on_device(batch, self._loss.required)
        self._add_reference(inputs, layout)
        self._model.eval()
        loss = self._loss(self._logits(self._model, inputs, layout), inputs)
        self._model.train()
        return {"loss": loss.item(), "tokens": trained_tokens(torch.as_tensor(batch["loss_mask"]))}

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """Return the trained tokens' log-probs [B, T] on the CPU, with dropout off."""
        inputs, layout = self._on_device(batch, ())
        self._model.eval()
        logits = self._logits(self._model, inputs, layout)
        self._model.train()
        return token_log_probs(logits, inputs["labels"], inputs["loss_mask"]).cpu()

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """Return the value head's estimates [B, T] on the CPU, with dropout off. Raises ValueError without a head."""
        value_head, precision = self._trained.value_head, self._trained.precision
        if value_head is None:
            raise ValueError("values: this backend has no value head; give it one")
        own = cast(
            Batch,
            {key: value for key, value in batch.items() if key in (*MODEL_KEYS, "attention_mask")},
        )
        inputs, layout = self._on_device(own, (), share_prompts=True)
        self._model.eval()
        with precision.computing(self._model), precision.autocasting(self._model):
            values_BT = forward.token_values(self._model, inputs, value_head, layout)
        self._model.train()
        return values_BT.cpu()

    def _on_device(
        self, batch: Batch, required: Iterable[str], *, share_prompts: bool | None = None
    ) -> tuple[Batch, Layout | None]:
        """Return the batch on the device, and its layout for a loss of log-probs. Prompts are shared in RL, unless
        said."""
        self._loss.check(batch, required)
        device = self._trained.device
        if not self._loss.reads_log_probs:
            return cast(Batch, {**batch, **to_device(forward.tensors_of(batch), device)}), None
        shared = "advantages" in batch if share_prompts is None else share_prompts
        layout, tensors = forward.lay_out(batch, device, packed=self._packed, share_prompts=shared)
        return cast(Batch, {**batch, **tensors}), layout

    @torch.no_grad()
    def _add_reference(self, inputs: Batch, layout: Layout | None) -> None:
        """Return the reference's log-probs of the trained tokens, the way the policy's are taken: equal weights give 0
        KL."""
        reference = self._trained.reference
        if reference is not None and "ref_log_probs" not in inputs:
            with reference.using(reference.model):
                logits = self._logits(reference.model, inputs, layout)
            temperature = inputs.get("temperature", 1.0)
            inputs["ref_log_probs"] = token_log_probs(
                logits, inputs["labels"], inputs["loss_mask"], temperature=temperature
            )

    @torch.no_grad()
    def _policy_sums(self, logits: Logits, inputs: Batch) -> Tensor:
        labels, mask = inputs["labels"], inputs["loss_mask"]
        temperature = inputs.get("temperature", 1.0)
        tokens = select(logits, labels, mask, temperature, with_entropy=True)
        self._trained_log_probs.append(
            token_log_probs(tokens, labels, mask, temperature=temperature)
        )
        return policy_sums(
            tokens,
            labels,
            mask,
            inputs["old_log_probs"],
            inputs["ref_log_probs"] if self._trained.reference else None,
            temperature=temperature,
            clip_range=inputs.get("clip_range", 0.2),
        )

    def _logits(self, model: nn.Module, inputs: Batch, layout: Layout | None) -> Logits:
        return self._trained.placement.run(self._compute, model, inputs, layout)

    def _compute(self, model: nn.Module, inputs: Batch, layout: Layout | None) -> Logits:
        precision, is_rl = self._trained.precision, "advantages" in inputs
        with precision.computing(model), precision.autocasting(model):
            if layout is not None and layout.packed is not None and forward.packs(model):
                options: dict[str, Any] = {"with_entropy": is_rl, "layout": layout}
                if model is self._model:
                    options["value_head"] = self._trained.value_head
                    options["known_gradient"] = (
                        None if is_rl else known_gradient(self._loss.function, inputs)
                    )
                return forward.token_log_probs(model, inputs, **options)
            logits = forward.padded_logits(model, inputs)
        if layout is None:
            return logits
        where = layout.keep, layout.places_N
        temperature = inputs.get("temperature", 1.0)
        return select_from_logits(
            logits, inputs["labels"], *where, temperature=temperature, with_entropy=is_rl
        )
