"""How many floating-point operations training takes, and how many a card could do: the two halves of MFU. Pure.

MFU = tokens/s x flops_per_token / peak_flops. Counted is what the model needs, once: matrix products at 2 per
multiply-add, backward twice the forward (PaLM, arXiv 2204.02311 appendix B). What is recomputed by activation
checkpointing is not counted. Attention is counted causal, as it must be computed: half of PaLM's term.
"""

import re
from collections.abc import Sequence
from typing import Any

# Architectures whose every block is q, k, v, o projections and a gated MLP (three matrices, one set per expert).
_GATED_DENSE = frozenset(
    [
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    ]
)
_GATED_EXPERTS = frozenset(("mixtral", "olmoe", "qwen3_moe"))

_PEAK_BF16_DENSE = (  # words of the device's name -> FLOP/s in bf16 without sparsity, from the makers' data sheets
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


def flops_per_token(config: Any, sequence_length: float, *, head_share: float = 1.0) -> float:
    """FLOPs of one token's forward and backward pass in full fine-tuning of a causal language model.

    `config` is a transformers config. `sequence_length` in tokens, of the document: packing neighbours into one row
    costs no attention between them; for documents of several lengths give their `attended_length`. `head_share` is the
    share of tokens that the output head runs on (the trained ones, where it runs on no others).
    Raises ValueError for an architecture that this does not know how to count.
    """
    _check(config)
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads)
    block_parameters = projections + _mlp_parameters(config)
    # over all layers
    keys = sum(_mean_keys(sequence_length, window) for window in _windows(config))
    matrices = config.num_hidden_layers * block_parameters + head_share * hidden * config.vocab_size
    return 6 * matrices + 12 * heads * head_dim * keys


def attended_length(lengths: Sequence[int]) -> float:
    """Return the one length at which as many tokens cost as much attention as documents of `lengths` do: sum l^2 / sum
    l."""
    return sum(length * length for length in lengths) / sum(lengths)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bf16, dense, that the maker states for a card by its CUDA name; None for one that is not listed."""
    return next(
        (peak for words, peak in _PEAK_BF16_DENSE if re.search(rf"\b{words}\b", device_name)), None
    )


def _check(config: Any) -> None:
    known = _GATED_DENSE | _GATED_EXPERTS
    if config.model_type not in known:
        raise ValueError(
            f"model_type={config.model_type!r}: cannot count its FLOPs; known are {', '.join(sorted(known))}"
        )
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"model_type={config.model_type!r} with dense layers between: cannot count its FLOPs"
        )


def _mlp_parameters(config: Any) -> int:
    """Of one block, those that one token uses; the router's too."""
    if config.model_type in _GATED_DENSE:
        return 3 * config.hidden_size * config.intermediate_size
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return config.hidden_size * (3 * width * config.num_experts_per_tok + experts)


def _windows(config: Any) -> list[int | None]:
    """Return each layer's sliding window in tokens; None: it attends to all before."""
    window = (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _mean_keys(length: float, window: int | None) -> float:
    """Return how many keys a token attends to, averaged over its document."""
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)
