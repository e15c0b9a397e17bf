"""Attention of one new token per row on a CPU, as an attention function of transformers.

R rows, G query heads of each of H key/value heads, K cache columns, D head size. For a single query token torch's CPU
kernel spends most of its time on set-up; two batched matrix products over the cache in place take a third to two thirds
as long. A row's bits must not depend on how many columns its neighbours need: columns beyond its length weigh
exactly 0, and the products run over fixed blocks of columns, so that sums are always formed in the same order.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from rollouts.training import packed_attention

ATTENTION = "rollouts_decode"
COLUMNS_PER_BLOCK = (
    256  # matrix kernels cut longer sums into parts, wherever suits the total length
)
# Below this many multiplications a product of two matrices takes another kernel (torch: 400, counted over 32 columns,
# the narrowest cache there is): G * D must be on one side of it for every width.
PRODUCT_SIZE_MIN = 16
_KNOWN = {"is_causal", "position_ids", "sliding_window", "use_cache", "output_attentions"}


def use_for(model: PreTrainedModel) -> None:
    """Let `model`, where it runs torch's attention, decode with `decode_attention`; other passes stay as they are."""
    if model.config._attn_implementation in ("sdpa", packed_attention.ATTENTION):
        AttentionInterface.register(ATTENTION, decode_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)


def decode_attention(  # noqa: PLR0917 — the order in which models call it
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return softmax attention [R, T, H*G, D] of query [R, H*G, T, D], key and value [R, H, K, D].

    The mask is additive, [R, 1, 1, K]. Anything but one token per row over a masked cache, T = 1, is left to
    `packed_attention`: prefills, scoring.
    """
    rows, heads, columns, size = key.shape
    group = query.shape[1] // heads
    known = all(value is None or name in _KNOWN for name, value in others.items())
    if (
        query.shape[2] != 1
        or attention_mask is None
        or group * size < PRODUCT_SIZE_MIN
        or not known
    ):
        return packed_attention.attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    scale = size**-0.5 if scaling is None else scaling
    query_NGD = (query * scale).reshape(rows * heads, group, size)
    key_NKD, value_NKD = key.flatten(0, 1), value.flatten(0, 1)
    scores_RHK = torch.bmm(query_NGD, key_NKD.transpose(1, 2)).view(rows, heads * group, columns)
    weights_NGK = torch.softmax(scores_RHK.add_(attention_mask[:, 0]), -1).view(
        rows * heads, group, columns
    )
    out_NGD = torch.bmm(weights_NGK[..., :COLUMNS_PER_BLOCK], value_NKD[:, :COLUMNS_PER_BLOCK])
    for start in range(COLUMNS_PER_BLOCK, columns, COLUMNS_PER_BLOCK):
        block = slice(start, start + COLUMNS_PER_BLOCK)
        out_NGD += torch.bmm(weights_NGK[..., block], value_NKD[:, block])
    return out_NGD.view(rows, 1, heads * group, size), None
