"""The shape of a model: its widths, layers and parameters, from its config.json. Pure.

Where a config names a model of the hub, whose config.json is not on this machine, HUB has those of the families of
`rollouts.config.families`. Nothing is guessed: a model that is neither here nor there has no shape, with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rollouts.config.families import known_models

# gated MLP, norm before attention and before the MLP
DENSE = "llama", "mistral", "qwen2", "qwen3", "smollm3"
EXPERTS = ("qwen2_moe", "qwen3_moe")
OTHERS = ("gemma3_text", "olmo2")  # counted; what their layers keep for the backward pass is not

HUB: Mapping[str, Mapping[str, Any]] = known_models()


class ShapeError(ValueError):
    """A config.json without a shape that can be read. The message says why."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder whose layers are alike. Widths in elements."""

    kind: str  # model_type
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_heads: int  # of keys and values
    head: int  # width of one
    mlp: int  # of one gated MLP; of an expert where there are experts
    experts: int  # 0: one MLP a layer
    shared_mlp: int  # of the expert that every token passes; 0: none
    dense_layers: int  # layers with one MLP of dense_mlp among those with experts
    dense_mlp: int
    is_tied: bool  # embeddings and output head are one
    has_qkv_bias: bool
    has_head_norms: bool  # norms of each head's queries and keys
    layer_norms: int  # elements of a layer's other norms

    @property
    def queries(self) -> int:
        return self.heads * self.head

    @property
    def keys(self) -> int:
        return self.key_heads * self.head

    @property
    def table(self) -> int:
        """Return the elements of the embeddings; a separate output head has as many."""
        return self.vocabulary * self.hidden

    @property
    def has_known_activations(self) -> bool:
        return self.kind in DENSE

    @cached_property
    def matrices(self) -> int:
        """Return the elements of all layers' matrices: what Muon moves."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        dense = 3 * self.hidden * self.dense_mlp
        if not self.experts:
            return self.layers * (attention + 3 * self.hidden * self.mlp)
        routed = self.experts * (3 * self.hidden * self.mlp + self.hidden)
        shared = self.hidden * (3 * self.shared_mlp + 1) if self.shared_mlp else 0
        return (
            self.layers * attention
            + self.dense_layers * dense
            + (self.layers - self.dense_layers) * (routed + shared)
        )

    @cached_property
    def vectors(self) -> int:
        """Return elements of norms and biases."""
        biases = self.queries + 2 * self.keys if self.has_qkv_bias else 0
        norms = self.layer_norms + (2 * self.head if self.has_head_norms else 0)
        return self.layers * (biases + norms) + self.hidden

    @property
    def parameters(self) -> int:
        return self.table * (1 if self.is_tied else 2) + self.matrices + self.vectors

    @property
    def layer(self) -> int:
        """Return parameters of one layer, on average."""
        return (self.matrices + self.vectors) // self.layers

    def cache_bytes(self, width: int) -> int:
        """Return the bytes of a token's keys and values in all layers; `width`: bytes of one number."""
        return 2 * self.layers * self.keys * width


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the shape that a config.json describes. Raises ShapeError."""
    kind = config.get("model_type")
    if kind not in (*DENSE, *EXPERTS, *OTHERS):
        known = ", ".join((*DENSE, *EXPERTS, *OTHERS))
        raise ShapeError(
            f"model_type={kind!r} is not one of those whose parameters are counted here ({known})"
        )
    biased = [
        name for name in ("attention_bias", "mlp_bias") if config.get(name) and kind != "qwen2_moe"
    ]
    if biased:
        raise ShapeError(f"{biased[0]}=true of model_type={kind!r} is not counted here")
    hidden, layers, heads = (
        _size(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    has_experts = kind in EXPERTS
    # transformers' newer name
    count = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    experts = _size(config, count) if has_experts else 0
    dense_layers = _dense_layers(config, layers) if has_experts else 0
    key_heads = _size(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    head = _size(config, "head_dim") if config.get("head_dim") else hidden // heads
    return Shape(
        kind=kind,
        vocabulary=_size(config, "vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        key_heads=key_heads,
        head=head,
        mlp=_size(config, "moe_intermediate_size" if has_experts else "intermediate_size"),
        experts=experts,
        shared_mlp=_size(config, "shared_expert_intermediate_size") if kind == "qwen2_moe" else 0,
        dense_layers=dense_layers,
        dense_mlp=_size(config, "intermediate_size") if dense_layers else 0,
        is_tied=bool(config.get("tie_word_embeddings", kind in ("smollm3", "gemma3_text"))),
        has_qkv_bias=kind == "qwen2"
        or (kind == "qwen2_moe" and bool(config.get("qkv_bias", True))),
        has_head_norms=kind in ("qwen3", "qwen3_moe", "gemma3_text"),
        layer_norms=_layer_norms(kind, hidden, heads * head, key_heads * head),
    )


def _layer_norms(kind: str, hidden: int, queries: int, keys: int) -> int:
    """Count the elements of a layer's norms, those of single heads aside. Source: transformers' models."""
    if kind == "gemma3_text":  # before and after attention and MLP
        return 4 * hidden
    if kind == "olmo2":  # after both, and of all queries and all keys together
        return 2 * hidden + queries + keys
    return 2 * hidden


def shape_named(name: str, configs: Mapping[str, Mapping[str, Any] | None]) -> Shape | str:
    """Return the shape of a model, or why it is not known. `configs`: by name those config.json that are here."""
    here = configs.get(name)
    if here is None and name not in HUB:
        where = (
            "its config.json cannot be read"
            if name in configs
            else "its files are not on this machine"
        )
        return f"{name}: {where}"
    try:
        return shape_of(here if here is not None else HUB[name])
    except ShapeError as error:
        return f"{name}: {error}"


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ShapeError(f"its config.json has {name}={value!r}: needs a number of 1 or more")
    return value


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """Count the layers that have one MLP, as transformers decides it."""
    step = config.get("decoder_sparse_step") or 1
    only = config.get("mlp_only_layers") or ()
    if not isinstance(step, int) or not isinstance(only, (list, tuple)):
        raise ShapeError(
            f"its config.json has decoder_sparse_step={step!r}, mlp_only_layers={only!r}"
        )
    return sum(index in only or (index + 1) % step != 0 for index in range(layers))
