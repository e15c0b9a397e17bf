"""FLOPs per token, against what torch counts in a real forward and backward pass."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rollouts.training.flops import attended_length, flops_per_token, peak_flops

LENGTH, ROWS = 48, 2
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3_wide_heads": Qwen3Config(**SIZES, head_dim=32),
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=4096),
}


def counted(config: Any) -> float:
    """FLOPs per token that torch counts. Eager attention computes all T x T scores."""
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_models_take_what_torch_counts(name: str) -> None:
    """Goal: formula and torch agree. Ours is causal: at twice the length it has as many keys as eager's T x T.

    2 in 1,000 for the rotary angles, which torch counts too. Red with k and v counted at all heads (grouped-query).
    """
    assert flops_per_token(CONFIGS[name], 2 * LENGTH) == pytest.approx(
        counted(CONFIGS[name]), rel=2e-3
    )


def test_only_the_experts_of_a_token_count() -> None:
    """Goal: a mixture of experts costs what its active experts and router do. Red with all experts counted."""
    dense = Qwen3Config(**SIZES, head_dim=16)
    experts = Qwen3MoeConfig(
        **SIZES, head_dim=16, moe_intermediate_size=80, num_experts=8, num_experts_per_tok=2
    )
    router = 6 * 3 * 64 * 8
    assert flops_per_token(experts, LENGTH) == flops_per_token(dense, LENGTH) + router


def test_head_share_and_window() -> None:
    """Goal: an output head on half of the tokens costs half; a window bounds attention. Red with either ignored."""
    config = Qwen2Config(**SIZES)
    assert (
        flops_per_token(config, 8) - flops_per_token(config, 8, head_share=0.5) == 6 * 64 * 96 / 2
    )
    windowed, full = (
        MistralConfig(**SIZES, sliding_window=4),
        MistralConfig(**SIZES, sliding_window=None),
    )
    # 0.5: a token's own key counts half
    keys = sum(min(position + 0.5, 4) for position in range(LENGTH)) / LENGTH
    saved = flops_per_token(full, LENGTH) - flops_per_token(windowed, LENGTH)
    assert saved == pytest.approx(12 * 3 * 64 * (LENGTH / 2 - keys), rel=0.01)


def test_attended_length_makes_mixed_documents_exact() -> None:
    """Goal: many documents cost the sum of each. Red with the plain mean of the lengths."""
    config, lengths = Qwen2Config(**SIZES), [5, 100, 17]
    whole = sum(lengths) * flops_per_token(config, attended_length(lengths))
    assert whole == pytest.approx(
        sum(length * flops_per_token(config, length) for length in lengths), rel=1e-12
    )


def test_what_cannot_be_counted_is_refused() -> None:
    """Goal: no number is better than a wrong one. Red without the list of known architectures."""
    with pytest.raises(ValueError, match="model_type='gpt2': cannot count its FLOPs; known are"):
        flops_per_token(GPT2Config(), 8)
    with pytest.raises(ValueError, match="dense layers between"):
        flops_per_token(Qwen3MoeConfig(**SIZES, mlp_only_layers=[0]), 8)


def test_peaks() -> None:
    """Goal: a card's name finds its own peak or none. Red without the word boundaries (an A1000 is no A100)."""
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA RTX A1000 Laptop GPU") is None
