"""Log-probs of chosen tokens without the logits of all: the output head runs where a loss looks, a chunk at a time.

B sequences, T tokens, V vocabulary entries, M rows of hidden states (or of logits), N chosen rows of them. Log-probs
are natural logs in float32 (float64 where the input is): never more than a chunk of [N, V] of them at once, forward or
backward. The gradient is written out, so that a chunk's softmax is computed again, unless it is the only one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 2**24  # log-probs held at a time: 64 MiB in float32


@dataclass(frozen=True)
class TokenLogProbs:
    """What a loss needs of a model's output on a batch: losses take this in place of logits [B, T, V].

    `keep` [B, T-1] bool are the trained tokens after position 0, `log_probs_N` theirs at `temperature`, `entropy_N` the
    entropies of their distributions in nats, where these were asked for.
    """

    keep: Tensor
    log_probs_N: Tensor
    entropy_N: Tensor | None
    temperature: float


def selected_log_probs(
    source: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [N] of `targets_N`, each under the distribution of its own row of `source`, and those's entropies [N].

    `source` [M, V] are logits, or with `weight` [V, D] (and `bias` [V]) hidden states [M, D]; no row is chosen twice.
    `temperature` divides the logits. Under autocast the matrix products run in its dtype, everything else in float32.
    Rows that are not chosen are never read. A token that cannot be drawn (logit -inf) adds 0 to the entropy.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: needs > 0; greedy samples have no distribution to learn from")
    log_probs_N, entropy_N = _SelectedLogProbs.apply(source, weight, bias, rows_N, targets_N, temperature, with_entropy)
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
    ) -> tuple[Tensor, Tensor | None]:
        vocabulary = source.shape[1] if weight is None else weight.shape[0]
        ctx.temperature, ctx.matmul_dtype, ctx.chunk = temperature, _matmul_dtype(source), _chunk_rows(vocabulary)
        head = _head(weight, bias, ctx.matmul_dtype)
        dtype = torch.float64 if source.dtype is torch.float64 else torch.float32
        log_probs_N = source.new_empty(len(rows_N), dtype=dtype)
        entropy_N = torch.empty_like(log_probs_N) if with_entropy else None
        only = None
        for part in _parts(len(rows_N), ctx.chunk):
            only = _log_softmax_rows(source, rows_N[part], head, temperature)
            log_probs_N[part] = only.gather(1, targets_N[part, None]).squeeze(1)
            if entropy_N is not None:
                entropy_N[part] = -(only.exp() * _finite(only)).sum(1)
        kept = only if len(rows_N) <= ctx.chunk else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(source, weight, bias, rows_N, targets_N, entropy_N, kept)
        return log_probs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:
        source, weight, bias, rows_N, targets_N, entropy_N, kept = ctx.saved_tensors
        head = _head(weight, bias, ctx.matmul_dtype)
        accumulate = torch.promote_types(source.dtype, torch.float32)
        grad_source = torch.zeros_like(source)
        _, weight_trained, bias_trained, *_ = ctx.needs_input_grad  # with LoRA the head is frozen
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if weight_trained else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if bias_trained else None
        for part in _parts(len(rows_N), ctx.chunk):
            log_probs_nV = kept if kept is not None else _log_softmax_rows(source, rows_N[part], head, ctx.temperature)
            grad_nV = _logits_gradient(
                log_probs_nV,
                targets_N[part],
                None if grad_N is None else grad_N[part],
                None if entropy_grad_N is None else (entropy_N[part], entropy_grad_N[part]),
            )
            grad_nV = grad_nV.div_(ctx.temperature).to(source.dtype if head is None else ctx.matmul_dtype)
            if grad_bias is not None:
                grad_bias += grad_nV.sum(0, dtype=accumulate)
            if grad_weight is not None:
                hidden_nD = source.index_select(0, rows_N[part]).to(grad_nV.dtype)
                if grad_nV.dtype == accumulate:
                    grad_weight.addmm_(grad_nV.T, hidden_nD)  # without a second [V, D]
                else:
                    grad_weight += (grad_nV.T @ hidden_nD).to(accumulate)
            if head is not None:
                grad_nV = grad_nV @ head[0]
            grad_source.index_copy_(0, rows_N[part], grad_nV.to(source.dtype))
        grads = [
            None if grad is None else grad.to(like.dtype) for grad, like in ((grad_weight, weight), (grad_bias, bias))
        ]
        return grad_source, *grads, None, None, None, None


def _logits_gradient(
    log_probs_nV: Tensor, targets_n: Tensor, grad_n: Tensor | None, entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """d/d logits [n, V]: of log p_t it is 1[t] - p, of the entropy H it is -p (log p + H)."""
    probs_nV = log_probs_nV.exp()
    if entropy is None:
        if grad_n is None:
            return torch.zeros_like(probs_nV)
        total_nV = probs_nV.mul_(-grad_n[:, None])
    else:
        entropy_n, entropy_grad_n = entropy
        factor_nV = _finite(log_probs_nV).add_(entropy_n[:, None]).mul_(-entropy_grad_n[:, None])
        total_nV = probs_nV.mul_(factor_nV if grad_n is None else factor_nV.sub_(grad_n[:, None]))
    if grad_n is not None:
        total_nV[torch.arange(len(targets_n), device=targets_n.device), targets_n] += grad_n
    return total_nV


def _log_softmax_rows(
    source: Tensor, rows_n: Tensor, head: tuple[Tensor, Tensor | None] | None, temperature: float
) -> Tensor:
    logits_nV = source.index_select(0, rows_n)
    if head is not None:
        logits_nV = F.linear(logits_nV.to(head[0].dtype), *head)
    dtype = torch.float64 if logits_nV.dtype is torch.float64 else torch.float32
    if temperature != 1.0:
        logits_nV = logits_nV.to(dtype) / temperature
    return torch.log_softmax(logits_nV, -1, dtype=dtype)


def _head(weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    return None if weight is None else (weight.to(dtype), None if bias is None else bias.to(dtype))


def _matmul_dtype(source: Tensor) -> torch.dtype:
    kind = source.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else source.dtype


def _finite(log_probs: Tensor) -> Tensor:
    """A copy in which -inf is a finite number: times a probability of 0 that is 0, not NaN."""
    return log_probs.clamp(min=torch.finfo(log_probs.dtype).min)


def _chunk_rows(vocabulary: int) -> int:
    return max(1, _CHUNK_ELEMENTS // vocabulary)


def _parts(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, as even as can be: products over few rows take other kernels, with other rounding."""
    parts = -(-count // size)
    return (slice(count * part // parts, count * (part + 1) // parts) for part in range(parts))
