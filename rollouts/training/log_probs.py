"""Log-probs of chosen tokens without the logits of all: the output head runs where a loss looks, a chunk at a time.

B sequences, T tokens, V vocabulary entries, M rows of hidden states (or of logits), N chosen rows of them. Log-probs
are natural logs in float32 (float64 where the input is): never more than a chunk of [N, V] of them at once, forward or
backward. The gradient is written out, so that a chunk's softmax is computed again, unless it is the only one or the
loss says beforehand what it will bring.
How large a chunk is, and what is compiled, is the device's (`head_ways`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rollouts.training import head_ways

_CHUNK_ELEMENTS = 2**24  # log-probs held at a time on a CPU: 64 MiB in float32


@dataclass(frozen=True)
class TokenLogProbs:
    """What a loss needs of a model's output on a batch: losses take this in place of logits [B, T, V].

    `keep` [B, T-1] bool are the trained tokens after position 0, `log_probs_N` theirs at `temperature`, `entropy_N` the
    entropies of their distributions in nats, where these were asked for. `values_N` are a value head's, where the
    backend has one, of the states in which the tokens were chosen. `places` [N]: where `keep`, flattened, is true.
    """

    keep: Tensor
    log_probs_N: Tensor
    entropy_N: Tensor | None
    temperature: float
    values_N: Tensor | None = None
    places: Tensor | None = None


def selected_log_probs(
    source: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    known_grad_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [N] of `targets_N`, each under the distribution of its own row of `source`, and those's entropies [N].

    `source` [M, V] are logits, or with `weight` [V, D] (and `bias` [V]) hidden states [M, D]; no row is chosen twice.
    `temperature` divides the logits. Under autocast the matrix products run in its dtype, everything else in float32.
    Rows that are not chosen are never read. A token that cannot be drawn (logit -inf) adds 0 to the entropy.
    `known_grad_N`: what a backward pass will bring for the log-probs, to the bit, where a loss can say so. The gradient
    is then made beside the log-probs, from the same logits. Another gradient raises (on CUDA: a device-side assertion).
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature={temperature}: needs > 0; greedy samples have no distribution to learn from"
        )
    if known_grad_N is not None and with_entropy:
        raise ValueError("known_grad_N: of log-probs alone; entropies have gradients of their own")
    options = (temperature, with_entropy, known_grad_N)
    log_probs_N, entropy_N = _SelectedLogProbs.apply(
        source, weight, bias, rows_N, targets_N, *options
    )
    return log_probs_N, entropy_N


class _SelectedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 — autograd passes by position
        ctx: Any,
        source: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows_N: Tensor,
        targets_N: Tensor,
        temperature: float,
        with_entropy: bool,
        known_N: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        vocabulary = source.shape[1] if weight is None else weight.shape[0]
        ctx.temperature, ctx.matmul_dtype = temperature, _matmul_dtype(source)
        ctx.chunk = _chunk_rows(vocabulary, source.device)
        head = _head(weight, bias, ctx.matmul_dtype)
        dtype = torch.float64 if source.dtype is torch.float64 else torch.float32
        log_probs_N = source.new_empty(len(rows_N), dtype=dtype)
        entropy_N = torch.empty_like(log_probs_N) if with_entropy else None
        only = len(rows_N) <= ctx.chunk
        kept = None
        ctx.made = None if only or known_N is None else _Gradients(source, weight, bias, ctx)
        for part in _parts(len(rows_N), ctx.chunk):
            logits_nV = _logits(source, rows_N[part], head)
            log_probs_n, entropy_n, log_probs_nV = _chosen(
                logits_nV, targets_N[part], temperature, with_entropy, only
            )
            log_probs_N[part] = log_probs_n
            if entropy_N is not None and entropy_n is not None:
                entropy_N[part] = entropy_n
            is_log_probs = log_probs_nV is not None
            chunk_nV = logits_nV if log_probs_nV is None else log_probs_nV
            del logits_nV, log_probs_nV
            if only:
                kept, ctx.kept_log_probs = chunk_nV, is_log_probs
            elif ctx.made is not None and known_N is not None:
                grads_n = known_N[part], None
                ctx.made.add(
                    chunk_nV,
                    rows_N[part],
                    targets_N[part],
                    *grads_n,
                    is_log_probs=is_log_probs,
                    own=True,
                )
            del chunk_nV
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(source, weight, bias, rows_N, targets_N, entropy_N, kept, known_N)
        return log_probs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor | None, entropy_grad_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        source, weight, bias, rows_N, targets_N, entropy_N, kept, known_N = ctx.saved_tensors
        made, ctx.made = ctx.made, None
        if made is not None:
            same = (
                torch.zeros((), dtype=torch.bool) if grad_N is None else (grad_N == known_N).all()
            )
            torch._assert_async(
                same,
                "the loss's gradient is not the known one that the output head's was made from",
            )
            return made.results()
        made = _Gradients(source, weight, bias, ctx)
        for part in _parts(len(rows_N), ctx.chunk):
            made.add(
                kept if kept is not None else _logits(source, rows_N[part], made.head),
                rows_N[part],
                targets_N[part],
                None if grad_N is None else grad_N[part],
                None if entropy_grad_N is None else (entropy_N[part], entropy_grad_N[part]),
                is_log_probs=kept is not None and ctx.kept_log_probs,
                own=kept is None,
            )
        return made.results()


class _Gradients:
    """Of source, weight and bias, a chunk at a time."""

    def __init__(
        self, source: Tensor, weight: Tensor | None, bias: Tensor | None, ctx: Any
    ) -> None:
        self.head = _head(weight, bias, ctx.matmul_dtype)
        self._of = source, weight, bias
        self._temperature = ctx.temperature
        self._accumulate = accumulate = torch.promote_types(source.dtype, torch.float32)
        self._source = torch.zeros_like(source)
        _, weight_trained, bias_trained, *_ = ctx.needs_input_grad  # with LoRA the head is frozen
        self._weight = (
            torch.zeros_like(weight, dtype=accumulate)
            if weight is not None and weight_trained
            else None
        )
        self._bias = (
            torch.zeros_like(bias, dtype=accumulate) if bias is not None and bias_trained else None
        )

    def add(
        self,
        chunk_nV: Tensor,
        rows_n: Tensor,
        targets_n: Tensor,
        grad_n: Tensor | None,
        entropy: tuple[Tensor, Tensor] | None,
        *,
        is_log_probs: bool,
        own: bool,
    ) -> None:
        """Add those of a chunk of logits, or of log-probs; `own`: it may be used up."""
        source, head = self._of[0], self.head
        with torch.autocast(source.device.type, enabled=False):
            grad_nV = _chunk_gradient(
                chunk_nV,
                targets_n,
                grad_n,
                entropy,
                temperature=self._temperature,
                is_log_probs=is_log_probs,
                own=own,
                dtype=source.dtype if head is None else head[0].dtype,
            )
            del chunk_nV
            if self._bias is not None:
                self._bias += grad_nV.sum(0, dtype=self._accumulate)
            if self._weight is not None:
                head_ways.add_product(
                    self._weight, grad_nV, source.index_select(0, rows_n).to(grad_nV.dtype)
                )
            if head is not None:
                grad_nV = grad_nV @ head[0]
            self._source.index_copy_(0, rows_n, grad_nV.to(source.dtype))

    def results(self) -> tuple[Tensor | None, ...]:
        """Return the gradients in the order of the inputs."""
        pairs = ((self._weight, self._of[1]), (self._bias, self._of[2]))
        grads = [
            None if grad is None or like is None else grad.to(like.dtype) for grad, like in pairs
        ]
        return self._source, *grads, None, None, None, None, None


def _chosen(
    logits_nV: Tensor, targets_n: Tensor, temperature: float, with_entropy: bool, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs [n] of the targets and entropies [n]; and log-probs [n, V], where they are made. May use up the logits.

    `keep`: these come back to be kept, and so do the logits where they are not made.
    """
    fused = head_ways.fused_on(logits_nV.device.type)
    if fused is not None and (
        found := fused(head_ways.chosen, logits_nV, targets_n, temperature, with_entropy)
    ):
        return *found, None
    log_probs_nV = _log_softmax(logits_nV, temperature)
    log_probs_n = log_probs_nV.gather(1, targets_n[:, None]).squeeze(1)
    entropy_n = None
    if with_entropy:
        terms_nV = log_probs_nV.exp()
        entropy_n = -terms_nV.mul_(_finite(log_probs_nV, own=not keep)).sum(1)
    return log_probs_n, entropy_n, log_probs_nV


def _chunk_gradient(
    chunk_nV: Tensor,
    targets_n: Tensor,
    grad_n: Tensor | None,
    entropy: tuple[Tensor, Tensor] | None,
    *,
    temperature: float,
    is_log_probs: bool,
    own: bool,
    dtype: torch.dtype,
) -> Tensor:
    """d/d logits [n, V] in `dtype`, from log-probs or from logits; `own`: they may be used up."""
    fused = head_ways.fused_on(chunk_nV.device.type)
    if fused is not None and not is_log_probs:
        parts = (grad_n, *(entropy or (None, None)))
        if (
            gradient := fused(head_ways.logits_gradient, chunk_nV, targets_n, temperature, *parts)
        ) is not None:
            return gradient.to(dtype)
    if not is_log_probs:
        chunk_nV, own = _log_softmax(chunk_nV if own else chunk_nV.clone(), temperature), True
    if temperature == 1.0:
        return _logits_gradient(chunk_nV, targets_n, grad_n, entropy, own=own, dtype=dtype)
    gradient = _logits_gradient(chunk_nV, targets_n, grad_n, entropy, own=own, dtype=chunk_nV.dtype)
    return gradient.div_(temperature).to(dtype)


def _logits_gradient(
    log_probs_nV: Tensor,
    targets_n: Tensor,
    grad_n: Tensor | None,
    entropy: tuple[Tensor, Tensor] | None,
    *,
    own: bool,
    dtype: torch.dtype,
) -> Tensor:
    """d/d logits [n, V]: of log p_t it is 1[t] - p, of the entropy H it is -p (log p + H). Rounded to `dtype` once.

    `own`: log-probs may be overwritten.
    """
    if entropy is None:
        if grad_n is None:
            return torch.zeros_like(log_probs_nV, dtype=dtype)
        probs_nV = log_probs_nV.exp_() if own else log_probs_nV.exp()
        factor = -grad_n[:, None]
    else:
        entropy_n, entropy_grad_n = entropy
        probs_nV = log_probs_nV.exp()
        factor = (
            _finite(log_probs_nV, own=own).add_(entropy_n[:, None]).mul_(-entropy_grad_n[:, None])
        )
        if grad_n is not None:
            factor.sub_(grad_n[:, None])
    rows_n = torch.arange(len(targets_n), device=targets_n.device)
    chosen_n = None
    if grad_n is not None:
        factor_n = factor[:, 0] if entropy is None else factor[rows_n, targets_n]
        chosen_n = probs_nV[rows_n, targets_n] * factor_n + grad_n
    total_nV = torch.mul(
        probs_nV,
        factor,
        out=probs_nV if dtype == probs_nV.dtype else torch.empty_like(probs_nV, dtype=dtype),
    )
    if chosen_n is not None:
        total_nV[rows_n, targets_n] = chosen_n.to(dtype)
    return total_nV


def _logits(source: Tensor, rows_n: Tensor, head: tuple[Tensor, Tensor | None] | None) -> Tensor:
    """Logits [n, V], in memory of their own."""
    chosen = source.index_select(0, rows_n)
    return chosen if head is None else F.linear(chosen.to(head[0].dtype), *head)


def _log_softmax(logits_nV: Tensor, temperature: float) -> Tensor:
    dtype = torch.float64 if logits_nV.dtype is torch.float64 else torch.float32
    if temperature != 1.0:
        logits_nV = logits_nV.to(dtype).div_(temperature)
    return torch.log_softmax(logits_nV, -1, dtype=dtype)


def _head(
    weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None] | None:
    return None if weight is None else (weight.to(dtype), None if bias is None else bias.to(dtype))


def _matmul_dtype(source: Tensor) -> torch.dtype:
    kind = source.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else source.dtype


def _finite(log_probs: Tensor, *, own: bool) -> Tensor:
    """Log-probs in which -inf is a finite number: times a probability of 0 that is 0, not NaN. `own`: in place."""
    least = torch.finfo(log_probs.dtype).min
    return log_probs.clamp_(min=least) if own else log_probs.clamp(min=least)


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    return max(1, head_ways.chunk_elements(device, _CHUNK_ELEMENTS) // vocabulary)


def _parts(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, as even as can be: products over few rows take other kernels, with other rounding."""
    parts = -(-count // size)
    return (slice(count * part // parts, count * (part + 1) // parts) for part in range(parts))
