"""The computations that a device has to get right: a bf16 product, attention, an all-reduce over the ranks."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rollouts.training import distributed

HEAD_DIMS = (64, 128)
HEADS = (4, 2, 2)  # of query, key and value
LENGTHS = [5, 33, 26]  # of documents
WITHIN = 0.03  # of the largest value; bf16 keeps 8 bits


class WrongResultError(RuntimeError):
    """A device computes wrongly."""


def check_product(device: torch.device) -> None:
    """Check that a bf16 matrix product is near the one in float32 on the CPU."""
    left, right = (
        torch.randn(256, 256, generator=generator).bfloat16() for generator in [_seeded()] * 2
    )
    _require_close(
        "the bf16 product", (left.to(device) @ right.to(device)), left.float() @ right.float()
    )


def check_attention(
    device: torch.device, head_dim: int, *, packed: bool, window: int | None = None
) -> None:
    """Attention with shared heads is near its formula in float32, forward and backward.

    `packed`: as training attends to documents in one row, on CUDA by the variable-length kernel, and with `window` to
    the last so many tokens. Else torch's own function, a document at a time.
    """
    assert packed or window is None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = _seeded()
    inputs = [
        torch.randn(1, heads, sum(LENGTHS), head_dim, generator=generator).to(dtype)
        for heads in HEADS
    ]
    ours = [tensor.to(device, copy=True).requires_grad_() for tensor in inputs]
    # gradients of their own
    theirs = [tensor.to(torch.float32, copy=True).requires_grad_() for tensor in inputs]
    query, key, value = ours
    found = _packed(query, key, value, window) if packed else _by_document(_by_torch, *ours)
    expected = _by_document(functools.partial(_by_formula, window=window), *theirs)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    _require_close(f"attention, head_dim {head_dim}", found, expected)
    for name, mine, reference in zip("qkv", ours, theirs, strict=True):
        assert mine.grad is not None and reference.grad is not None
        _require_close(
            f"attention's gradient of {name}, head_dim {head_dim}", mine.grad, reference.grad
        )


def _packed(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    from rollouts.training.packed_attention import (  # a second of imports that a CPU does not need
        Documents,
        attention,
    )

    documents = Documents.of(LENGTHS, query.device)
    return attention(
        nn.Identity(), query, key, value, None, sliding_window=window, documents=documents
    )[0]


def _by_document(attend: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> Tensor:
    parts = zip(*(tensor.split(LENGTHS, 2) for tensor in inputs), strict=True)
    return torch.cat([attend(*part) for part in parts], 2).transpose(1, 2)


def _by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _by_formula(query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, causal, as in arXiv 1706.03762, eq. 1; of the last `window` tokens, if given."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
    unseen = ones.triu(1) if window is None else ones.triu(1) | ones.tril(-window)
    return scores.masked_fill(unseen, float("-inf")).softmax(-1) @ value


def check_all_reduce(device: torch.device) -> None:
    """Check that the ranks' numbers add up, on the device."""
    total = torch.tensor([float(distributed.rank() + 1)], device=device)
    distributed.all_reduce_sum([total])
    ranks = distributed.world_size()
    _require_close(
        f"an all-reduce over {ranks} ranks", total, torch.tensor([ranks * (ranks + 1) / 2])
    )


def name_of(device: torch.device) -> str:
    """Say a device as people know it: "cuda:0 (NVIDIA H200)"."""
    return (
        f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    )


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _require_close(what: str, found: Tensor, expected: Tensor) -> None:
    apart = (found.detach().float().cpu() - expected.detach()).abs().max().item()
    limit = WITHIN * expected.detach().abs().max().item()
    if not apart <= limit:
        raise WrongResultError(f"{what} is wrong by {apart:.3g}, needs at most {limit:.3g}")
