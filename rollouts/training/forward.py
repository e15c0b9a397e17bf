"""From a batch to what a loss reads: without padding, and with the output head on the trained positions alone.

B sequences, T tokens of the longest with padding, M real tokens, D hidden size, V vocabulary entries. The real tokens
of a batch stand in one row, document after document (`packed_attention` keeps these apart, positions start anew), so
that nothing is computed for padding. Architectures in PACKABLE run this way; others padded, by the model's own forward.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from rollouts.training import packed_attention
from rollouts.training.log_probs import TokenLogProbs, selected_log_probs
from rollouts.training.packed_attention import ATTENTION, Documents

# model_type of those whose attention is plain softmax attention through transformers' attention interface, with the
# arguments that `packed_attention` knows, and whose logits are the head's output as it is
PACKABLE = frozenset(
    {
        "gemma",
        "gemma3_text",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)


class Packed(NamedTuple):
    """The real tokens of a batch in one row: longest document first, then what documents share (`Documents.copies`)."""

    input_ids: Tensor  # [1, M], fewer where tokens are shared
    position_ids: Tensor  # [1, M], from 0 in each document
    documents: Documents
    rows_BT: Tensor  # [B, T]: where in that row a token stands; -1 for padding


def prepare(model: nn.Module) -> bool:
    """Set `model` up for packed batches, where its architecture allows it, and say whether it does."""
    if not packs(model):
        return False
    packed_attention.register()
    causal_model(model).set_attn_implementation(ATTENTION)  # type: ignore[operator]
    return True


def packs(model: nn.Module) -> bool:
    """Whether `model` can run packed: a known architecture, a plain output head, nothing done to its logits."""
    model = causal_model(model)
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in PACKABLE or getattr(config, "final_logit_softcapping", None):
        return False
    return isinstance(model.get_output_embeddings(), nn.Linear)  # type: ignore[operator]


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model with the head: `model` itself, or the one that adapters (peft) wrap."""
    unwrap = getattr(model, "get_base_model", None)
    return cast(nn.Module, unwrap()) if callable(unwrap) else model


def body(model: nn.Module) -> nn.Module:
    """The part of `model` below its output head: what runs on every token, and what `compile` is worth for."""
    causal = causal_model(model)
    return getattr(causal, str(causal.base_model_prefix))


def pack(input_ids: Tensor, attention_mask: Tensor | None, loss_mask: Tensor | None = None) -> Packed:
    """The real tokens of `input_ids` [B, T]; `attention_mask` [B, T], padded on either side, None: all are real.

    With `loss_mask` [B, T], documents whose tokens before the first trained one are the same share them, all but the
    last: what predicts a trained token is never shared. The samples of a prompt then have it in the row once.
    """
    mask_BT = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths_B = mask_BT.sum(1)
    order_B = torch.argsort(lengths_B, descending=True, stable=True)
    position_BT = mask_BT.long().cumsum(1) - 1
    document_M, column_M = mask_BT[order_B].nonzero(as_tuple=True)
    place_M = order_B[document_M] * input_ids.shape[1] + column_M
    rows_BT = torch.full_like(input_ids, -1)
    rows_BT.view(-1)[place_M] = torch.arange(len(place_M), device=input_ids.device)
    lengths = [length for length in lengths_B[order_B].tolist() if length]
    ids_M, position_M = input_ids.flatten()[place_M], position_BT.flatten()[place_M]
    documents = Documents.of(lengths, input_ids.device)
    if loss_mask is not None:
        trained_BT = (loss_mask != 0) & mask_BT & (position_BT > 0)
        first_B = torch.where(trained_BT, position_BT, lengths_B[:, None] + 1).amin(1)
        beginnings = (first_B[order_B] - 1).tolist()[: len(lengths)]
        documents, kept_U = _shared(documents, ids_M, document_M, position_M, beginnings)
        ids_M, position_M = ids_M[kept_U], position_M[kept_U]
        if documents.copies is not None:
            rows_BT = torch.where(rows_BT < 0, -1, documents.copies[rows_BT])
    return Packed(ids_M[None], position_M[None], documents, rows_BT)


def _shared(
    documents: Documents, ids_M: Tensor, document_M: Tensor, position_M: Tensor, beginnings: list[int]
) -> tuple[Documents, Tensor]:
    """`documents` whose beginnings, of so many tokens each, stand in the row once; and which of the M come to stand.

    A beginning is a document of its own beside them, even if only one document has it: attention rounds a token by the
    length of its document, so its bits would otherwise depend on which documents share a batch.
    """
    ids, starts = ids_M.cpu().numpy(), documents.offsets.tolist()
    found = [
        (ids[start : start + count].tobytes(), start, count) for start, count in zip(starts, beginnings, strict=False)
    ]
    unique = {key: (start, count) for key, start, count in found if count}
    if not unique:
        return documents, torch.arange(len(ids_M), device=ids_M.device)
    own = sorted(unique.items(), key=lambda item: -item[1][1])  # documents of one length stand together
    places: dict[bytes, int] = {}
    sources: list[np.ndarray] = []
    end = len(ids)
    for key, (start, count) in own:
        places[key] = end
        sources.append(np.arange(start, start + count))
        end += count
    device = ids_M.device
    per_document = torch.tensor([[places.get(key, 0) for key, _, _ in found], beginnings], device=device)
    place_M, count_M = per_document[:, document_M]
    itself_N = torch.arange(end, device=device)  # the N: all M tokens, then those of the beginnings' own documents
    computed_N = itself_N.clone()
    computed_N[: len(ids)] = torch.where(position_M < count_M, place_M + position_M, itself_N[: len(ids)])
    is_own_N = computed_N == itself_N
    sources_N = torch.cat([itself_N[: len(ids)], torch.from_numpy(np.concatenate(sources)).to(device)])
    shared = Documents.of(
        [*documents.lengths, *(count for _, (_, count) in own)],
        device,
        copies=(is_own_N.cumsum(0) - 1)[computed_N],
        firsts=is_own_N.nonzero().squeeze(1),
    )
    return shared, sources_N[shared.firsts]


def hidden_states(model: nn.Module, packed: Packed) -> Tensor:
    """The last hidden states [M, D] of a prepared model, before the output head."""
    output = body(model)(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=packed.input_ids.new_ones(1, 1, 1, 1),  # four dimensions: no mask is made from it
        documents=packed.documents,
        use_cache=False,
    )
    return output.last_hidden_state[0]


def token_log_probs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    with_entropy: bool,
    value_head: nn.Module | None = None,
    share_prompts: bool = False,
) -> TokenLogProbs:
    """Log-probs of the trained tokens of a batch, by a prepared model; keys as in `backends.pytorch`.

    `share_prompts`: what documents have in common before their first trained token is computed once. Worth it for the
    samples of a prompt. `value_head` maps hidden states [N, D] to values [N]: those of the states in which the trained
    tokens were chosen.
    """
    packed = pack(inputs["input_ids"], inputs.get("attention_mask"), inputs["loss_mask"] if share_prompts else None)
    hidden_MD = hidden_states(model, packed)
    head = causal_model(model).get_output_embeddings()  # type: ignore[operator]
    keep = inputs["loss_mask"][:, 1:] != 0
    temperature = inputs.get("temperature", 1.0)
    rows_N = packed.rows_BT[:, :-1][keep]
    log_probs_N, entropy_N = selected_log_probs(
        hidden_MD,
        rows_N,
        inputs["labels"][:, 1:][keep],
        head.weight,
        head.bias,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    values_N = None if value_head is None else value_head(hidden_MD.index_select(0, rows_N))
    return TokenLogProbs(keep, log_probs_N, entropy_N, temperature, values_N)


def token_values(model: nn.Module, inputs: Mapping[str, Any], value_head: nn.Module) -> Tensor:
    """[B, T]: the values of the states in which the trained tokens were chosen, aligned to tokens; 0 elsewhere."""
    packed = pack(inputs["input_ids"], inputs.get("attention_mask"), inputs["loss_mask"])
    keep = inputs["loss_mask"][:, 1:] != 0
    values_N = value_head(hidden_states(model, packed).index_select(0, packed.rows_BT[:, :-1][keep]))
    values_BT = values_N.new_zeros(keep.shape[0], keep.shape[1] + 1)
    values_BT[:, 1:].masked_scatter_(keep, values_N)
    return values_BT


def padded_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits [B, T, V] by the model's own forward; real tokens count from position 0, whichever side is padded."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False).logits
