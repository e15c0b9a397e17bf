"""Model families that a new config may start from: what their config.json says, and values to start training with.

The fields are those of the hub's repositories that a shape is made of; a test holds the parameters that follow from
them against the counts that the hub states. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share an architecture."""

    name: str
    model_type: str
    shared: Mapping[str, Any]  # fields of config.json that all sizes have
    is_gated: bool  # the hub wants an accepted licence and a token
    sizes: Mapping[str, Mapping[str, Any]]  # {hub id: its own fields}


def _size(
    hidden: int, mlp: int, layers: int, heads: int, key_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
_UNTIED_QWEN2 = {"vocab_size": 152_064, "tie_word_embeddings": False}

FAMILIES = (
    Family(
        name="Qwen 2.5",
        model_type="qwen2",
        shared={"vocab_size": 151_936, **_TIED},
        is_gated=False,
        sizes={
            "Qwen/Qwen2.5-0.5B": _size(896, 4864, 24, 14, 2),
            "Qwen/Qwen2.5-1.5B": _size(1536, 8960, 28, 12, 2),
            "Qwen/Qwen2.5-3B": _size(2048, 11_008, 36, 16, 2),
            "Qwen/Qwen2.5-7B": _size(3584, 18_944, 28, 28, 4, **_UNTIED_QWEN2),
            "Qwen/Qwen2.5-14B": _size(5120, 13_824, 48, 40, 8, **_UNTIED_QWEN2),
            "Qwen/Qwen2.5-32B": _size(5120, 27_648, 64, 40, 8, **_UNTIED_QWEN2),
        },
    ),
    Family(
        name="Qwen 3",
        model_type="qwen3",
        shared={"vocab_size": 151_936, "head_dim": 128},
        is_gated=False,
        sizes={
            "Qwen/Qwen3-0.6B": _size(1024, 3072, 28, 16, 8, **_TIED),
            "Qwen/Qwen3-1.7B": _size(2048, 6144, 28, 16, 8, **_TIED),
            "Qwen/Qwen3-4B": _size(2560, 9728, 36, 32, 8, **_TIED),
            "Qwen/Qwen3-8B": _size(4096, 12_288, 36, 32, 8, tie_word_embeddings=False),
            "Qwen/Qwen3-14B": _size(5120, 17_408, 40, 40, 8, tie_word_embeddings=False),
            "Qwen/Qwen3-32B": _size(5120, 25_600, 64, 64, 8, tie_word_embeddings=False),
        },
    ),
    Family(
        name="Llama 3",
        model_type="llama",
        shared={"vocab_size": 128_256},
        is_gated=True,
        sizes={
            "meta-llama/Llama-3.2-1B-Instruct": _size(2048, 8192, 16, 32, 8, head_dim=64, **_TIED),
            "meta-llama/Llama-3.2-3B-Instruct": _size(3072, 8192, 28, 24, 8, head_dim=128, **_TIED),
            "meta-llama/Llama-3.1-8B-Instruct": _size(
                4096, 14_336, 32, 32, 8, tie_word_embeddings=False
            ),
        },
    ),
    Family(
        name="Gemma 3",
        model_type="gemma3_text",
        shared={"vocab_size": 262_144, "head_dim": 256, **_TIED},
        is_gated=True,
        sizes={
            "google/gemma-3-270m-it": _size(640, 2048, 18, 4, 1),
            "google/gemma-3-1b-it": _size(1152, 6912, 26, 4, 1),
        },
    ),
    Family(
        name="SmolLM 3",
        model_type="smollm3",
        shared={"vocab_size": 128_256, **_TIED},
        is_gated=False,
        sizes={"HuggingFaceTB/SmolLM3-3B": _size(2048, 11_008, 36, 16, 4)},
    ),
    Family(
        name="SmolLM 2",
        model_type="llama",
        shared={"vocab_size": 49_152, **_TIED},
        is_gated=False,
        sizes={
            "HuggingFaceTB/SmolLM2-135M-Instruct": _size(576, 1536, 30, 9, 3),
            "HuggingFaceTB/SmolLM2-360M-Instruct": _size(960, 2560, 32, 15, 5),
            "HuggingFaceTB/SmolLM2-1.7B-Instruct": _size(2048, 8192, 24, 32, 32),
        },
    ),
    Family(
        name="Mistral",
        model_type="mistral",
        shared={"head_dim": 128, "tie_word_embeddings": False},
        is_gated=True,
        sizes={
            "mistralai/Mistral-7B-Instruct-v0.3": _size(4096, 14_336, 32, 32, 8, vocab_size=32_768),
            "mistralai/Mistral-Nemo-Instruct-2407": _size(
                5120, 14_336, 40, 32, 8, vocab_size=131_072
            ),
            "mistralai/Mistral-Small-24B-Instruct-2501": _size(
                5120, 32_768, 40, 32, 8, vocab_size=131_072
            ),
        },
    ),
    Family(
        name="OLMo 2",
        model_type="olmo2",
        shared={"vocab_size": 100_352, "tie_word_embeddings": False},
        is_gated=False,
        sizes={
            "allenai/OLMo-2-0425-1B-Instruct": _size(2048, 8192, 16, 16, 16),
            "allenai/OLMo-2-1124-7B-Instruct": _size(4096, 11_008, 32, 32, 32),
            "allenai/OLMo-2-1124-13B-Instruct": _size(5120, 13_824, 40, 40, 40),
            "allenai/OLMo-2-0325-32B-Instruct": _size(5120, 27_648, 64, 40, 8),
        },
    ),
)
INSTRUCT = (
    "Qwen/Qwen2.5-",
)  # whose chat models are named <base>-Instruct, with the same config.json


def known_models() -> dict[str, dict[str, Any]]:
    """Return {hub id: the fields of its config.json that a shape is made of}, chat models of base models too."""
    found: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        for name, size in family.sizes.items():
            fields = {"model_type": family.model_type, **family.shared, **size}
            found[name] = fields
            if name.startswith(INSTRUCT):
                found[f"{name}-Instruct"] = fields
    return found


def family_of(model: str) -> Family | None:
    """Return the family of a hub id; None for another model."""
    names = (model, model.removesuffix("-Instruct"))
    return next(
        (family for family in FAMILIES if any(name in family.sizes for name in names)), None
    )
