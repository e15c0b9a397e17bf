"""Causal attention over documents that stand one after another in a single row: none sees another, nothing is padded.

N tokens of all documents, H heads, D the width of a head. Registered with transformers as ATTENTION: a model set to it
attends by document where it is given `documents=`, and otherwise exactly as with "sdpa" (`generate`, padded batches).
CUDA in half precision: the variable-length flash kernel. Elsewhere `scaled_dot_product_attention`, one call for each
run of documents of one length. Under `torch.compile` either is one operation of the graph.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from torch.nn.attention import varlen
except ImportError:  # torch 2.9
    _KERNEL_OPTIONS = frozenset[str]()
else:
    _KERNEL_OPTIONS = frozenset(inspect.signature(varlen.varlen_attn).parameters)

logger = logging.getLogger(__name__)
ATTENTION = "rollouts_documents"
_HALVES = (torch.bfloat16, torch.float16)  # what the kernel computes in
_HEAD_DIM_MAX, _HEAD_DIM_MULTIPLE = 256, 8  # and the widths of a head that it takes


@dataclass(frozen=True)
class Documents:
    """`lengths` in tokens, in the order they stand; `offsets` [documents + 1] int32: where each starts and all end.

    Documents may share tokens of a row: it then holds U, and they have N. `copies` [N] says which of the row's each
    is, `firsts` [U] which of the N gives the row's token its attention. None: nothing is shared.
    What is compiled reads `longest` and tensors, never `lengths`: a tuple would be compiled anew for each number of
    documents. `host_offsets` are `offsets` on the CPU. `kernel`: the device has the variable-length kernel.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    longest: int
    host_offsets: Tensor
    kernel: bool
    copies: Tensor | None = None
    firsts: Tensor | None = None

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, **there: Tensor | None) -> "Documents":
        """Documents of `lengths`; `there` are tensors on `device`: copies and firsts, and offsets if they are there."""
        host_offsets = host_offsets_of(lengths)
        return cls(
            **({} if "offsets" in there else {"offsets": host_offsets.to(device)}),
            **there,  # type: ignore[arg-type]
            lengths=tuple(lengths),
            longest=max(lengths, default=0),
            host_offsets=host_offsets,
            kernel=has_kernel(device),
        )


def host_offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Say whether `device` has the variable-length kernel. A CUDA device without it is named in a warning, once."""
    if device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(device)
    missing = []
    if not {"scale", "window_size"} <= _KERNEL_OPTIONS:
        missing.append(f"torch >= 2.11 (found {torch.__version__})")
    if capability < (8, 0):
        missing.append(f"compute capability >= 8.0 (found {capability[0]}.{capability[1]})")
    if missing:
        logger.warning(
            "%s: no variable-length attention kernel; it needs %s. Attention takes one call for each run of documents "
            "of one length: the same numbers, slower.",
            device,
            " and ".join(missing),
        )
    return not missing


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
    query, key, value = _as_autocast(query, key, value)
    window = (
        sliding_window
        if sliding_window is not None and sliding_window < documents.longest
        else None
    )
    if documents.copies is not None:
        # Token by token in memory, as models lay them out: other strides would be rounded differently.
        query, key, value = (
            tensor.transpose(1, 2).index_select(1, documents.copies).transpose(1, 2)
            for tensor in (query, key, value)
        )
    if documents.kernel and dropout == 0.0 and _kernel_takes(query):
        attended = _by_kernel(query, key, value, documents, scaling, window)
    elif dropout == 0.0 and torch.compiler.is_compiling():
        attended = _runs_op(query, key, value, documents.host_offsets, scaling, window)
    else:
        attended = _by_runs(query, key, value, documents.lengths, scaling, window, dropout)
    return attended if documents.firsts is None else attended.index_select(
        1, documents.firsts
    ), None


def _as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three in autocast's dtype, where it is on: rotary embeddings leave query and key in float32 there."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _kernel_takes(query: Tensor) -> bool:
    width = query.shape[-1]
    return query.dtype in _HALVES and width % _HEAD_DIM_MULTIPLE == 0 and width <= _HEAD_DIM_MAX


def _by_kernel(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    options: dict[str, Any] = {}
    if "enable_gqa" in _KERNEL_OPTIONS:
        options["enable_gqa"] = groups > 1
    elif groups > 1:  # torch 2.11
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attended = varlen.varlen_attn(
        query,
        key,
        value,
        documents.offsets,
        documents.offsets,
        documents.longest,
        documents.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return cast(Tensor, attended)[None]


@torch.compiler.disable
def _by_runs(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    runs = [(length, len(list(group))) for length, group in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    # split, not slices: the gradient of each slice would be as large as the whole row
    parts = zip(runs, *(tensor[0].split(sizes, 1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for (length, count), *run in parts:
        q, k, v = (tensor.unflatten(1, (count, length)).transpose(0, 1) for tensor in run)
        band = None if window is None or length <= window else _band(length, window, query.device)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=band,
            dropout_p=dropout,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return [length, length] bool: each position sees itself and the `window` - 1 before it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


# The runs as one operation, for what is compiled. Its backward pass computes the attention again.


@torch.library.custom_op("rollouts::attention_by_runs", mutates_args=())
def _runs_op(  # noqa: PLR0917 — an operation's schema
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    return _by_runs(query, key, value, offsets.diff().tolist(), scaling, window, 0.0)


@_runs_op.register_fake
def _(  # noqa: PLR0917
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


@torch.library.custom_op("rollouts::attention_by_runs_backward", mutates_args=())
def _runs_backward_op(  # noqa: PLR0917
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    def attend(*inputs: Tensor) -> Tensor:
        return _by_runs(*inputs, offsets.diff().tolist(), scaling, window, 0.0)

    backward = torch.func.vjp(attend, query, key, value)[1]
    grad_query, grad_key, grad_value = backward(gradient)
    return grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous()


@_runs_backward_op.register_fake
def _(  # noqa: PLR0917
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, offsets, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(query, key, value, offsets)


def _runs_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (
        *_runs_backward_op(gradient, *ctx.saved_tensors, ctx.scaling, ctx.window),
        None,
        None,
        None,
    )


_runs_op.register_autograd(_runs_gradient, setup_context=_keep_inputs)
