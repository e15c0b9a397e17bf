"""From a batch to what a loss reads: without padding, and with the output head on the trained positions alone.

B sequences, T tokens of the longest with padding, M real tokens, D hidden size, V vocabulary entries. The real tokens
of a batch stand in one row, document after document (`packed_attention` keeps these apart, positions start anew), so
that nothing is computed for padding. Which token stands where is decided on the host, in numpy, before a batch goes to
the device: the host would otherwise wait for the device to say how many there are. Architectures in PACKABLE run this
way; others padded, by the model's own forward.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from rollouts.training import packed_attention
from rollouts.training.host_to_device import to_device
from rollouts.training.log_probs import TokenLogProbs, selected_log_probs
from rollouts.training.loss_terms import spread, take
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
    """Return whether `model` can run packed: a known architecture, a plain output head, nothing done to its logits."""
    model = causal_model(model)
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in PACKABLE or getattr(
        config, "final_logit_softcapping", None
    ):
        return False
    return isinstance(model.get_output_embeddings(), nn.Linear)  # type: ignore[operator]


def causal_model(model: nn.Module) -> nn.Module:
    """Return the transformers model with the head: `model` itself, or the one that adapters (peft) wrap."""
    unwrap = getattr(model, "get_base_model", None)
    return cast(nn.Module, unwrap()) if callable(unwrap) else model


def body(model: nn.Module) -> nn.Module:
    """Return the part of `model` below its output head: what runs on every token, and what `compile` is worth for."""
    causal = causal_model(model)
    return getattr(causal, str(causal.base_model_prefix))


class Layout(NamedTuple):
    """Where the trained tokens of a batch stand. Decided on the host, so that it never waits to learn how many."""

    packed: Packed | None  # None: for a model that runs padded
    keep: Tensor  # [B, T-1] bool: the trained tokens after position 0
    places_N: Tensor  # where these stand in `keep`, flattened
    rows_N: Tensor | None  # and in the packed row the hidden states that predict them


def lay_out(
    batch: Mapping[str, Any],
    device: torch.device,
    *,
    packed: bool = True,
    share_prompts: bool = False,
) -> tuple[Layout, dict[str, Tensor]]:
    """Return the layout of `batch` on `device`, and the batch's tensors there: all that lies on the host in one
    copy."""
    trained_BT = _on_host(batch["loss_mask"]) != 0
    places_N = np.flatnonzero(trained_BT[:, 1:])
    parts = {
        "keep": torch.from_numpy(trained_BT[:, 1:].copy()),
        "places_N": torch.from_numpy(places_N),
    }
    row = None
    if packed:
        mask = batch.get("attention_mask")
        mask_BT = np.ones(trained_BT.shape, bool) if mask is None else _on_host(mask) != 0
        row = _pack(_on_host(batch["input_ids"]), mask_BT, trained_BT if share_prompts else None)
        parts |= row.tensors()
        parts["rows_N"] = parts["rows_BT"][:, :-1].flatten()[parts["places_N"]]
    values = tensors_of(batch)
    moved = to_device(
        {**{("layout", key): value for key, value in parts.items()}, **values}, device
    )
    inputs = {key: moved[key] for key in values}
    parts = {key: moved["layout", key] for key in parts}
    there = None if row is None else row.placed(parts, device)
    return Layout(there, parts["keep"], parts["places_N"], parts.get("rows_N")), inputs


def pack(
    input_ids: Tensor, attention_mask: Tensor | None, loss_mask: Tensor | None = None
) -> Packed:
    """Return the real tokens of `input_ids` [B, T]; `attention_mask` [B, T], padded on either side, None: all are real.

    With `loss_mask` [B, T], documents whose tokens before the first trained one are the same share them, all but the
    last: what predicts a trained token is never shared. The samples of a prompt then have it in the row once.
    """
    mask_BT = (
        np.ones(input_ids.shape, bool) if attention_mask is None else _on_host(attention_mask) != 0
    )
    row = _pack(
        _on_host(input_ids), mask_BT, None if loss_mask is None else _on_host(loss_mask) != 0
    )
    return row.placed(to_device(row.tensors(), input_ids.device), input_ids.device)


class _Row(NamedTuple):
    """A packed row on the host: `Packed` and `Documents` in numpy."""

    ids_M: np.ndarray
    positions_M: np.ndarray
    rows_BT: np.ndarray
    lengths: list[int]
    copies: np.ndarray | None = None
    firsts: np.ndarray | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what a device needs of it."""
        arrays = {
            "ids": self.ids_M,
            "positions": self.positions_M,
            "rows_BT": self.rows_BT,
            "copies": self.copies,
            "firsts": self.firsts,
        }
        tensors = {
            key: torch.from_numpy(array) for key, array in arrays.items() if array is not None
        }
        return {**tensors, "offsets": packed_attention.host_offsets_of(self.lengths)}

    def placed(self, there: Mapping[str, Tensor], device: torch.device) -> Packed:
        """Return the row of its tensors on `device`."""
        shared = {key: there.get(key) for key in ("offsets", "copies", "firsts")}
        documents = Documents.of(self.lengths, device, **shared)
        return Packed(there["ids"][None], there["positions"][None], documents, there["rows_BT"])


def _pack(ids_BT: np.ndarray, mask_BT: np.ndarray, trained_BT: np.ndarray | None) -> _Row:
    lengths_B = mask_BT.sum(1)
    order_B = np.argsort(-lengths_B, kind="stable")
    position_BT = mask_BT.cumsum(1) - 1
    document_M, column_M = mask_BT[order_B].nonzero()
    place_M = order_B[document_M] * ids_BT.shape[1] + column_M
    rows_BT = np.full(ids_BT.shape, -1)
    rows_BT.reshape(-1)[place_M] = np.arange(len(place_M))
    lengths = [length for length in lengths_B[order_B].tolist() if length]
    row = _Row(ids_BT.reshape(-1)[place_M], position_BT.reshape(-1)[place_M], rows_BT, lengths)
    if trained_BT is None:
        return row
    counted_BT = trained_BT & mask_BT & (position_BT > 0)
    first_B = np.where(counted_BT, position_BT, lengths_B[:, None] + 1).min(1)
    return _shared(row, document_M, (first_B[order_B] - 1).tolist()[: len(lengths)])


def _shared(row: _Row, document_M: np.ndarray, beginnings: list[int]) -> _Row:
    """Return `row` in which the documents' beginnings, of so many tokens each, stand once.

    A beginning is a document of its own beside them, even if only one document has it: attention rounds a token by the
    length of its document, so its bits would otherwise depend on which documents share a batch.
    """
    starts = np.cumsum([0, *row.lengths]).tolist()
    found = [
        (row.ids_M[start : start + count].tobytes(), start, count)
        for start, count in zip(starts, beginnings, strict=False)
    ]
    unique = {key: (start, count) for key, start, count in found if count}
    if not unique:
        return row
    # documents of one length stand together
    own = sorted(unique.items(), key=lambda item: -item[1][1])
    places: dict[bytes, int] = {}
    sources: list[np.ndarray] = []
    end = len(row.ids_M)
    for key, (start, count) in own:
        places[key] = end
        sources.append(np.arange(start, start + count))
        end += count
    place_M = np.array([places.get(key, 0) for key, _, _ in found])[document_M]
    count_M = np.array(beginnings)[document_M]
    itself_N = np.arange(end)  # the N: all M tokens, then those of the beginnings' own documents
    itself_M = itself_N[: len(row.ids_M)]
    computed_N = itself_N.copy()
    computed_N[: len(itself_M)] = np.where(
        row.positions_M < count_M, place_M + row.positions_M, itself_M
    )
    is_own_N = computed_N == itself_N
    copies, firsts = (is_own_N.cumsum() - 1)[computed_N], is_own_N.nonzero()[0]
    kept_U = np.concatenate([itself_M, *sources])[firsts]
    return _Row(
        row.ids_M[kept_U],
        row.positions_M[kept_U],
        np.where(row.rows_BT < 0, -1, copies[row.rows_BT]),
        [*row.lengths, *(count for _, (_, count) in own)],
        copies,
        firsts,
    )


def _on_host(value: Any) -> np.ndarray:
    tensor = torch.as_tensor(value).detach()
    tensor = tensor if tensor.device.type == "cpu" else tensor.cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the entries of `batch` that are no plain numbers."""
    plain = int | float | tuple | None
    return {
        key: torch.as_tensor(value) for key, value in batch.items() if not isinstance(value, plain)
    }


def hidden_states(model: nn.Module, packed: Packed) -> Tensor:
    """Return the last hidden states [M, D] of a prepared model, before the output head."""
    output = body(model)(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        # four dimensions: no mask is made from it
        attention_mask=packed.input_ids.new_ones(1, 1, 1, 1),
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
    layout: Layout | None = None,
    known_gradient: Callable[[torch.dtype], Tensor] | None = None,
) -> TokenLogProbs:
    """Log-probs of the trained tokens of a batch, by a prepared model; keys as in `backends.pytorch`.

    `share_prompts`: what documents have in common before their first trained token is computed once. Worth it for the
    samples of a prompt. `value_head` maps hidden states [N, D] to values [N]: those of the states in which the trained
    tokens were chosen. `layout`: that of the batch, where it is known; `share_prompts` then counts no more.
    `known_gradient` makes d loss / d log-probs [B, T] in a dtype, where the loss knows it (`known_gradients`).
    """
    if layout is None:
        layout, inputs = _laid_out(inputs, share_prompts)
    assert layout.packed is not None
    assert layout.rows_N is not None
    hidden_MD = hidden_states(model, layout.packed)
    head = causal_model(model).get_output_embeddings()  # type: ignore[operator]
    temperature = inputs.get("temperature", 1.0)
    known_grad_N = None
    if known_gradient is not None and torch.is_grad_enabled():
        known_BT = known_gradient(
            torch.float64 if hidden_MD.dtype is torch.float64 else torch.float32
        )
        known_grad_N = take(known_BT[:, 1:], layout.keep, layout.places_N)
    log_probs_N, entropy_N = selected_log_probs(
        hidden_MD,
        layout.rows_N,
        take(inputs["labels"][:, 1:], layout.keep, layout.places_N),
        head.weight,
        head.bias,
        temperature=temperature,
        with_entropy=with_entropy,
        known_grad_N=known_grad_N,
    )
    values_N = None if value_head is None else value_head(hidden_MD.index_select(0, layout.rows_N))
    return TokenLogProbs(
        layout.keep, log_probs_N, entropy_N, temperature, values_N, layout.places_N
    )


def token_values(
    model: nn.Module, inputs: Mapping[str, Any], value_head: nn.Module, layout: Layout | None = None
) -> Tensor:
    """Return [B, T], the values of the states in which the trained tokens were chosen, aligned to tokens; 0
    elsewhere."""
    if layout is None:
        layout, inputs = _laid_out(inputs, share_prompts=True)
    assert layout.packed is not None
    assert layout.rows_N is not None
    values_N = value_head(hidden_states(model, layout.packed).index_select(0, layout.rows_N))
    values_BT = values_N.new_zeros(layout.keep.shape[0], layout.keep.shape[1] + 1)
    values_BT[:, 1:] = spread(values_N, layout.keep, layout.places_N)
    return values_BT


def _laid_out(inputs: Mapping[str, Any], share_prompts: bool) -> tuple[Layout, dict[str, Any]]:
    """Return the layout of a batch that lies where it runs, and the batch."""
    layout, tensors = lay_out(inputs, inputs["input_ids"].device, share_prompts=share_prompts)
    return layout, {**inputs, **tensors}


def padded_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits [B, T, V] by the model's own forward; real tokens count from position 0, whichever side is padded."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
