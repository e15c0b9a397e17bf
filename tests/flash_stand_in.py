"""CUDA's variable-length flash kernel on a CPU: torch's own `varlen_attn`, with its autograd, runs on it.

It stands below torch's operation, in place of `aten::_flash_attention_forward` and `_backward`, and refuses what the
CUDA kernel refuses: float32, widths of a head, layouts. It computes in float32 and rounds once, and counts its calls.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from rollouts.training import packed_attention


@dataclass
class Calls:
    forward: int = 0
    backward: int = 0


@contextmanager
def flash_on_cpu() -> Iterator[Calls]:
    """Let packed attention on the CPU take the kernel's branch, by this stand-in; give the counts."""
    calls = Calls()

    def forward(  # noqa: PLR0917
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts_q: Tensor,
        starts_k: Tensor,
        longest_q: int,
        longest_k: int,
        dropout: float,
        causal: bool,
        *_: object,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **others: object,
    ) -> tuple[Tensor, ...]:
        calls.forward += 1
        _refuse(query, key, value, starts_q, longest_q, dropout)
        assert torch.equal(starts_q, starts_k) and longest_q == longest_k
        assert all(option is None for option in others.values()), others
        out, lse, *_ = _attend(
            query, key, value, starts_q, causal, scale, (window_size_left, window_size_right)
        )
        nothing = torch.empty(0)
        return out, lse, torch.zeros(2, dtype=torch.uint64), nothing, nothing

    def backward(  # noqa: PLR0917
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        starts_q: Tensor,
        starts_k: Tensor,
        longest_q: int,
        longest_k: int,
        dropout: float,
        causal: bool,
        *_: object,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:
        calls.backward += 1
        _refuse(query, key, value, starts_q, longest_q, dropout)
        if gradient.dtype != query.dtype or gradient.stride(-1) != 1:
            raise RuntimeError(
                "FlashAttention backward: the gradient has another dtype, or a strided last dimension"
            )
        window = (window_size_left, window_size_right)
        return tuple(
            part.to(query.dtype)
            for part in _gradients(gradient, query, key, value, starts_q, causal, scale, window)
        )

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        with mock.patch.object(packed_attention, "has_kernel", lambda device: True):
            yield calls
    finally:
        library._destroy()


def _refuse(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, dropout: float
) -> None:
    """Raise RuntimeError for what `mha_varlen_fwd` raises for."""
    tensors = (query, key, value)
    checks = (
        (
            all(t.dtype in (torch.float16, torch.bfloat16) for t in tensors),
            "only support fp16 and bf16 data type",
        ),
        (len({t.dtype for t in tensors}) == 1, "query, key and value must have the same dtype"),
        (all(t.dim() == 3 for t in tensors), "tensors of 3 dimensions: [tokens, heads, width]"),
        (
            all(t.stride(-1) == 1 for t in tensors),
            "Input tensor must have contiguous last dimension",
        ),
        (query.shape[-1] % 8 == 0, "head_size should be a multiple of 8"),
        (query.shape[-1] <= 256, "only supports head dimension at most 256"),
        (
            query.shape[1] % key.shape[1] == 0,
            "Number of heads in key/value must divide number of heads in query",
        ),
        (
            starts.dtype is torch.int32 and starts.is_contiguous(),
            "cu_seqlens must have dtype int32, contiguous",
        ),
        (
            int(starts[-1]) == query.shape[0] and int(starts[0]) == 0,
            "offsets from 0 to the number of tokens",
        ),
        (int(starts.diff().max()) <= longest, "max_seqlen is the longest document's"),
        (dropout == 0.0, "no dropout here"),
    )
    for right, message in checks:
        if not right:
            raise RuntimeError(f"FlashAttention: {message}")


def _masked_scores(
    q: Tensor, k: Tensor, causal: bool, scale: float | None, window: tuple[int | None, int | None]
) -> Tensor:
    """Scores [H, L, L] of one document in float32; -inf where a position does not see another."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    places = torch.arange(q.shape[0])
    behind = places[:, None] - places[None]
    left, right = (-1 if side is None else side for side in window)
    seen = torch.ones_like(behind, dtype=torch.bool)
    if left >= 0:
        seen &= behind <= left
    if causal or right >= 0:
        seen &= -behind <= (0 if causal else right)
    return (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf)


def _attend(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    groups = query.shape[1] // key.shape[1]
    outs, sums, weights = [], [], []
    edges = starts.tolist()
    for start, end in itertools.pairwise(edges):
        q, k, v = (t[start:end].float() for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = _masked_scores(q, k, causal, scale, window)
        weights.append(torch.softmax(scores, -1))
        sums.append(torch.logsumexp(scores, -1))
        outs.append(torch.einsum("hqk,khd->qhd", weights[-1], v))
    return torch.cat(outs).to(query.dtype), torch.cat(sums, 1), weights


def _gradients(  # noqa: PLR0917
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None],
) -> tuple[Tensor, Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    _, _, weights = _attend(query, key, value, starts, causal, scale, window)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    edges = starts.tolist()
    for p, (start, end) in zip(weights, itertools.pairwise(edges), strict=True):
        g, q, k, v = (t[start:end].float() for t in (gradient, query, key, value))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        dp = torch.einsum("qhd,khd->hqk", g, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * factor
        grads = (torch.einsum("hqk,khd->qhd", ds, k), torch.einsum("hqk,qhd->khd", ds, q))
        grads = (*grads, torch.einsum("hqk,qhd->khd", p, g))
        for kept, grad in zip(parts, grads, strict=True):
            shared = grad if kept is parts[0] else grad.unflatten(1, (-1, groups)).sum(2)
            kept.append(shared)
    return tuple(torch.cat(part) for part in parts)  # type: ignore[return-value]
