"""One token per row through a plain decoder-only model, without its modules: for small models on a CPU.

R rows, E hidden size, H query heads, G key/value heads, D head size, K cache columns, V vocabulary. In a small model
most of a step is overhead: module calls, multi-pass norms, ten-pass rotary embeddings. Here the projections of a layer
that share their input are one product, norms are torch's, and residuals are added by the product before. Numbers
differ from the model's own by rounding; `decode_check` proves them at start, as for any model.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rollouts.engines.embedded import attention
from rollouts.engines.embedded.cache import RowCache

# by model_type; each layer is x += o(attention(rotated q, k, v of norm(x))); x += down(silu(gate) up of norm(x))
PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# their rotations depend on the position alone
_FIXED_ROPES = frozenset({"default", "linear", "llama3"})


@dataclass(frozen=True)
class _Layer:
    attention: nn.Module
    kind: str  # of its attention, as the config's layer_types name it
    input_norm: Tensor
    qkv: Tensor  # [(H + 2 G) D, E]
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor] | None  # of queries and keys, [D] each
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor  # [2 I, E]
    down: Tensor


class FastDecode:
    """The forward pass of `model`'s running rows. It shares the model's weights, and sees them replaced in place."""

    def __init__(self, model: PreTrainedModel) -> None:
        config, plain = model.config, cast(Any, model)  # all of PLAIN have these parts
        self._head_size = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._eps = config.rms_norm_eps
        self._embedding, self._head = (
            plain.get_input_embeddings().weight,
            plain.get_output_embeddings().weight,
        )
        self._norm = plain.model.norm.weight
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(plain.model.layers)
        self._layers = [
            _layer(layer, kind) for layer, kind in zip(plain.model.layers, kinds, strict=True)
        ]
        positions = torch.arange(config.max_position_embeddings)[None]
        cos, sin = plain.model.rotary_emb(self._embedding[:1], positions)
        half = self._head_size // 2
        # [positions, D]
        self._cos, self._sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> "FastDecode | None":
        """Return None for a `model` that is not plain, not float32 on a CPU, or decodes by another attention."""
        config, weight = model.config, cast(Tensor, model.get_input_embeddings().weight)
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        plain = config.model_type in PLAIN and rope in _FIXED_ROPES and config.hidden_act == "silu"
        here = weight.device.type == "cpu" and weight.dtype is torch.float32
        if not (plain and here and config._attn_implementation == attention.ATTENTION):
            return None
        products = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        unbiased = all(
            m.bias is None
            for name, m in products
            if not name.endswith(("q_proj", "k_proj", "v_proj"))
        )
        return cls(model) if unbiased else None

    def __call__(self, tokens_R: Tensor, lengths_R: Tensor, masks: Any, cache: RowCache) -> Tensor:
        """Return logits [R, V] after `tokens_R` at positions `lengths_R`; `masks` are `Served.decode_mask`'s."""
        rows, queries, keys = len(tokens_R), self._heads, self._kv_heads
        hidden_RE = F.embedding(tokens_R, self._embedding)
        cos_R1D, sin_R1D = self._cos[lengths_R][:, None], self._sin[lengths_R][:, None]
        for layer, cached in zip(self._layers, cache.layers, strict=True):
            normed_RE = F.rms_norm(hidden_RE, layer.input_norm.shape, layer.input_norm, self._eps)
            qkv_RHD = F.linear(normed_RE, layer.qkv, layer.qkv_bias).view(
                rows, queries + 2 * keys, self._head_size
            )
            turned_RHD, value_RHD = qkv_RHD.split((queries + keys, keys), 1)
            if layer.head_norms is not None:
                turned_RHD = self._head_normed(turned_RHD, layer.head_norms)
            turned_RHD = torch.addcmul(
                turned_RHD * cos_R1D, turned_RHD.roll(self._head_size // 2, -1), sin_R1D
            )
            query_RHD, key_RHD = turned_RHD.split((queries, keys), 1)
            key, value = cached.update(key_RHD[:, :, None], value_RHD[:, :, None])
            mask = masks[layer.kind] if isinstance(masks, dict) else masks
            attended, _ = attention.decode_attention(
                layer.attention, query_RHD[:, :, None], key, value, mask
            )
            hidden_RE = torch.addmm(hidden_RE, attended.view(rows, -1), layer.out.t())
            normed_RE = F.rms_norm(hidden_RE, layer.mlp_norm.shape, layer.mlp_norm, self._eps)
            gate_RI, up_RI = F.linear(normed_RE, layer.gate_up).chunk(2, -1)
            hidden_RE = torch.addmm(hidden_RE, F.silu(gate_RI).mul_(up_RI), layer.down.t())
        return F.linear(F.rms_norm(hidden_RE, self._norm.shape, self._norm, self._eps), self._head)

    def _head_normed(self, turned_RHD: Tensor, norms: tuple[Tensor, Tensor]) -> Tensor:
        parts = turned_RHD.split((self._heads, self._kv_heads), 1)
        return torch.cat(
            [
                F.rms_norm(part, norm.shape, norm, self._eps)
                for part, norm in zip(parts, norms, strict=True)
            ],
            1,
        )


def _layer(layer: Any, kind: str) -> _Layer:
    own, mlp = layer.self_attn, layer.mlp
    projections = (own.q_proj, own.k_proj, own.v_proj)
    biased = own.q_proj.bias is not None
    return _Layer(
        attention=own,
        kind=kind,
        input_norm=layer.input_layernorm.weight,
        qkv=_joined([projection.weight for projection in projections]),
        qkv_bias=_joined([projection.bias for projection in projections]) if biased else None,
        head_norms=(own.q_norm.weight, own.k_norm.weight) if hasattr(own, "q_norm") else None,
        out=own.o_proj.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_joined([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
    )


def _joined(parameters: list[nn.Parameter]) -> Tensor:
    """Move the parameters into one tensor, one below the other, and return it: they become its slices."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(
        parameters, whole.split([len(parameter) for parameter in parameters]), strict=True
    ):
        parameter.data = part
    return whole
