"""Causal attention over documents that stand one after another in a single row: none sees another, nothing is padded.

N tokens of all documents, H heads, D the width of a head. Registered with transformers as ATTENTION: a model set to it
attends by document where it is given `documents=`, and otherwise exactly as with "sdpa" (`generate`, padded batches).
CUDA in half precision: the variable-length flash kernel. Elsewhere `scaled_dot_product_attention`, one call for each
run of documents of one length.
"""

import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = "rollouts_documents"


@dataclass(frozen=True)
class Documents:
    """`lengths` in tokens, in the order they stand; `offsets` [documents + 1] int32: where each starts and all end.

    Documents may share tokens of a row: it then holds U, and they have N. `copies` [N] says which of the row's each
    is, `firsts` [U] which of the N gives the row's token its attention. None: nothing is shared.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    copies: Tensor | None = None
    firsts: Tensor | None = None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, **shared: Tensor) -> "Documents":
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), offsets.to(device, non_blocking=True), **shared)


def register() -> None:
    """Make ATTENTION known to transformers. Masks of ordinary calls are made as for "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attention(  # noqa: PLR0917 — the order in which models call it
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, H, U, D], key and value [B, Hkv, U, D] → [B, U, H, D]; B is 1 where there are documents."""
    if documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **others,
        )
    window = sliding_window if sliding_window is not None and sliding_window < max(documents.lengths) else None
    if documents.copies is not None:
        # Token by token in memory, as models lay them out: other strides would be rounded differently.
        query, key, value = (
            tensor.transpose(1, 2).index_select(1, documents.copies).transpose(1, 2) for tensor in (query, key, value)
        )
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        attended = _by_kernel(query, key, value, documents, scaling, window)
    else:
        attended = _by_runs(query, key, value, documents, scaling, window, dropout)
    return attended if documents.firsts is None else attended.index_select(1, documents.firsts), None


def _by_kernel(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    longest = max(documents.lengths)
    attended = varlen_attn(
        query,
        key,
        value,
        documents.offsets,
        documents.offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return cast(Tensor, attended)[None]


@torch.compiler.disable
def _by_runs(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    runs = [(length, len(list(group))) for length, group in itertools.groupby(documents.lengths)]
    sizes = [length * count for length, count in runs]
    # split, not slices: the gradient of each slice would be as large as the whole row
    parts = zip(runs, *(tensor[0].split(sizes, 1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for (length, count), *run in parts:
        q, k, v = (tensor.unflatten(1, (count, length)).transpose(0, 1) for tensor in run)
        band = None if window is None or length <= window else _band(length, window, query.device)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=True
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length] bool: each position sees itself and the `window` - 1 before it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)
