"""How the output head's chunks run on a device: how large they are, how products are summed, what is compiled.

n rows of a chunk, V vocabulary entries. What is compiled computes what `log_probs` computes step by step, in one pass
over the logits, so that nothing of a chunk's size exists in float32.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
# Log-probs of a chunk on a card. Larger chunks rewrite the head's gradient less often. Step by step, a chunk is in
# memory in float32, twice for a moment; compiled, never: twice as many then hold no more memory.
_CUDA_ELEMENTS, _CUDA_ELEMENTS_COMPILED = 2**26, 2**27
_CUDA_SHARE = 32  # a chunk in float32 is at most this part of a card's memory


def chunk_elements(device: torch.device, on_cpu: int) -> int:
    """Log-probs of a chunk on `device`; `on_cpu` wherever it is not a card."""
    if device.type != "cuda":
        return on_cpu
    fused = fused_on(device.type)
    return cuda_chunk_elements(
        torch.cuda.get_device_properties(device).total_memory, fused is not None and fused.works
    )


def cuda_chunk_elements(memory_bytes: int, compiled: bool) -> int:
    """Log-probs of a chunk on a card of so much memory: a power of two."""
    fitting = max(1, memory_bytes // _CUDA_SHARE // 4)
    return min(
        _CUDA_ELEMENTS_COMPILED if compiled else _CUDA_ELEMENTS, 2 ** (fitting.bit_length() - 1)
    )


def add_product(total: Tensor, left_nV: Tensor, right_nD: Tensor) -> None:
    """Add `left.T @ right` to `total` [V, D] in place, summed in its dtype: without a second [V, D] where it can be."""
    if left_nV.dtype == total.dtype:
        total.addmm_(left_nV.T, right_nD)
    elif has_wide_products(total.device):
        torch.addmm(total, left_nV.T, right_nD, out_dtype=total.dtype, out=total)
    else:
        total += (left_nV.T @ right_nD).to(total.dtype)


@functools.cache
def has_wide_products(device: torch.device) -> bool:
    """Say whether products of bfloat16 matrices can be added to a float32 matrix on `device`: tried, on small ones."""
    if device.type != "cuda":
        return False
    left, right = (torch.eye(16, dtype=torch.bfloat16, device=device) for _ in range(2))
    total = torch.full((16, 16), 1 / 3, device=device)
    expected = total + torch.eye(16, device=device)
    try:
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError) as error:
        logger.warning(
            "%s: products are not summed in float32 by one operation (%s): slower", device, error
        )
        return False
    return torch.allclose(total, expected, rtol=0, atol=1e-6)


def chosen(
    logits_nV: Tensor, targets_n: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [n] of the targets, and entropies [n]."""
    log_probs_nV = _log_softmax(logits_nV, temperature)
    log_probs_n = log_probs_nV.gather(1, targets_n[:, None]).squeeze(1)
    if not with_entropy:
        return log_probs_n, None
    return log_probs_n, -(log_probs_nV.exp() * _finite(log_probs_nV)).sum(1)


def logits_gradient(  # noqa: PLR0917
    logits_nV: Tensor,
    targets_n: Tensor,
    temperature: float,
    grad_n: Tensor | None,
    entropy_n: Tensor | None,
    entropy_grad_n: Tensor | None,
) -> Tensor:
    """d/d logits [n, V] in the logits' dtype: of log p_t it is 1[t] - p, of the entropy H it is -p (log p + H)."""
    log_probs_nV = _log_softmax(logits_nV, temperature)
    factor_nV = torch.zeros_like(log_probs_nV)
    if entropy_n is not None and entropy_grad_n is not None:
        factor_nV = (_finite(log_probs_nV) + entropy_n[:, None]) * -entropy_grad_n[:, None]
    if grad_n is not None:
        factor_nV = factor_nV - grad_n[:, None]
    total_nV = log_probs_nV.exp() * factor_nV
    if grad_n is not None:
        columns_V = torch.arange(logits_nV.shape[1], device=logits_nV.device)
        total_nV = torch.where(
            columns_V == targets_n[:, None], total_nV + grad_n[:, None], total_nV
        )
    return (total_nV / temperature).to(logits_nV.dtype)


def _log_softmax(logits_nV: Tensor, temperature: float) -> Tensor:
    dtype = torch.float64 if logits_nV.dtype is torch.float64 else torch.float32
    return torch.log_softmax(logits_nV.to(dtype) / temperature, -1)


def _finite(log_probs: Tensor) -> Tensor:
    """Return a copy in which -inf is a finite number: times a probability of 0 that is 0, not NaN."""
    return log_probs.clamp(min=torch.finfo(log_probs.dtype).min)


class Fused:
    """`chosen` and `logits_gradient`, compiled at first use; where that fails, `works` is False from then on."""

    def __init__(self, **options: Any) -> None:
        self.works = True
        self._compiled = {
            function: torch.compile(function, dynamic=True, **options)
            for function in (chosen, logits_gradient)
        }

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function` gives, or None if it cannot be compiled here."""
        if not self.works:
            return None
        try:
            return self._compiled[function](*arguments)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ImportError) as error:  # no compiler, no headers, no Triton
            self.works = False
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            logger.warning(
                "the output head runs uncompiled, in more passes over memory: %s", reason
            )
            return None


@functools.cache
def fused_on(kind: str) -> Fused | None:
    """Return the compiled part for devices of `kind`: CUDA's; None elsewhere, where step by step is as fast."""
    return Fused() if kind == "cuda" else None
