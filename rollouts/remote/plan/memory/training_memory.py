"""What a training step holds in a GPU's memory, in closed form. Pure: a shape and settings → bytes at each peak.

Counted are the tensors that our step and transformers' layers keep: what each operation saves for the backward pass,
what the output head and a layer's backward pass make beside it, and what sharding gathers. `benchmarks/memory_plan.py`
holds the sums against torch's own tracker. M tokens of a micro-batch, N of them in attention (where samples share a
prompt, attention sees it once per sample), R trained ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rollouts.remote.inputs.shapes import Shape

MASTER = 4  # bytes of a float32 number: master weights, their gradients, the optimizer's state
# Rules of rollouts.training that this side, without torch, repeats; a test holds the two against each other.
# head_ways: log-probs of a chunk, and its part of the card's bytes
HEAD_ELEMENTS, HEAD_SHARE = 2**27, 128
REDUCTION_SHARE = 16  # fsdp: whole gradients are kept where they take at most this part of the card
MUON_ELEMENTS = 2**27  # optim: elements of matrices that are iterated on together
LAYERS_GATHERED = 3  # of a sharded model at once: the one that runs, the next one, and its buffer


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """LoRA's. `targets`: names of a layer's linear modules."""

    rank: int
    targets: tuple[str, ...]
    has_dropout: bool


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """What a training step's memory depends on beside the model's shape."""

    tokens: int  # M, of the largest micro-batch
    attended: int  # N
    trained: int  # R
    width: int  # bytes of a number that is computed with: 2 in bfloat16
    checkpointing: bool
    compiled: bool
    adapters: Adapters | None
    muon: bool
    shards: int  # ranks that share one copy of the model; 1: a whole copy each
    is_sharded: bool  # by FSDP, if only over one rank
    keeps_gathered: (
        bool  # shard_grad_op: layers stay gathered from the forward to the backward pass
    )
    offloads: bool
    card_bytes: int  # the whole card's: the head's chunks and a sharded gradient go by it


Parts = Mapping[str, int]  # "weights" → bytes


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the (inputs, outputs) of a layer's linear modules."""
    hidden, queries, keys, mlp = shape.hidden, shape.queries, shape.keys, shape.mlp
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }


def adapter_parameters(shape: Shape, adapters: Adapters) -> int:
    """Count LoRA's parameters."""
    found = linears(shape)
    return (
        shape.layers
        * adapters.rank
        * sum(sum(found[name]) for name in adapters.targets if name in found)
    )


def layer_activations(shape: Shape, step: StepLoad) -> int:
    """Return the bytes that one layer saves for its backward pass."""
    if step.compiled:
        return _compiled_layer(shape, step)
    width, hidden, mlp = step.width, shape.hidden, shape.mlp
    full = step.adapters is None
    normalized = width if full else 0  # what a norm's weight is multiplied with, for its gradient
    norm = (MASTER + normalized) * hidden + MASTER
    token = 2 * norm + 3 * width * mlp  # gate, its activation, up
    if shape.has_head_norms:
        rows = shape.heads + shape.key_heads
        token += rows * ((MASTER + normalized) * shape.head + MASTER)
    token += _linear_inputs(shape, step)
    attention = width * (2 * shape.queries + 2 * shape.keys) + MASTER * shape.heads
    # the attention's output, as the row has it
    shared = width * shape.queries if step.attended > step.tokens else 0
    return step.tokens * (token + shared) + step.attended * attention


def _linear_inputs(shape: Shape, step: StepLoad) -> int:
    """Return the bytes a token of what linear modules save of their inputs, the attention's output aside."""
    width, hidden, mlp, adapters = step.width, shape.hidden, shape.mlp, step.adapters
    if adapters is None:
        return width * (2 * hidden + mlp)
    found = linears(shape)
    inner = width * adapters.rank * len(adapters.targets)
    if adapters.has_dropout:  # each module drops by itself, and keeps a mask of bytes
        return inner + (width + 1) * sum(
            found[name][0] for name in adapters.targets if name in found
        )
    inputs = hidden * (bool({"q_proj", "k_proj", "v_proj"} & {*adapters.targets}))
    inputs += hidden * (bool({"gate_proj", "up_proj"} & {*adapters.targets}))
    return inner + width * (inputs + mlp * ("down_proj" in adapters.targets))


def _compiled_layer(shape: Shape, step: StepLoad) -> int:
    """Return what one layer saves under torch.compile: inputs of products and of attention, the rest computed again."""
    width = step.width
    token = width * (4 * shape.hidden + 3 * shape.mlp) + 2 * MASTER
    if shape.has_head_norms:
        token += width * (shape.queries + shape.keys) + MASTER * (shape.heads + shape.key_heads)
    attention = width * (2 * shape.queries + 2 * shape.keys) + MASTER * shape.heads
    adapters = step.adapters
    token += width * adapters.rank * len(adapters.targets) if adapters else 0
    return step.tokens * token + step.attended * attention


def head_chunk(shape: Shape, step: StepLoad) -> int:
    """Return the elements of one chunk of the output head, forward and backward: as `log_probs` cuts them."""
    fitting = max(1, step.card_bytes // HEAD_SHARE)
    rows = max(1, min(HEAD_ELEMENTS, 2 ** (fitting.bit_length() - 1)) // shape.vocabulary)
    chunks = max(1, math.ceil(step.trained / rows))
    return math.ceil(step.trained / chunks) * shape.vocabulary


def training_peaks(shape: Shape, step: StepLoad) -> dict[str, Parts]:
    """Return, for each moment that may be a step's peak, what is held then."""
    rest = at_rest(shape, step)
    width, tokens = step.width, step.tokens
    input_bytes = width * shape.hidden * tokens
    layer = layer_activations(shape, step)
    kept = input_bytes if step.checkpointing else layer
    # positions; the last norm
    ends = width * 2 * shape.head * tokens + (MASTER + 2 * width) * shape.hidden * tokens
    full = step.adapters is None
    table = shape.table if full else 0
    head = MASTER * table + 2 * width * head_chunk(shape, step) + input_bytes
    # the head's gradient, until the embeddings'
    held_table = width * table if shape.is_tied or step.is_sharded else 0
    # of the MLP: gradients of gate and up
    backward = width * (2 * shape.mlp + shape.hidden) * tokens + held_table
    gathered = _gathered_layers(shape, step)
    if step.is_sharded and full and shape.layers > 1:
        backward += (width + MASTER) * shape.layer  # of the layer before, on its way to be reduced
    rest_of_layers = kept * (shape.layers if step.checkpointing else shape.layers - 1)
    peaks: dict[str, Parts] = {
        "head": {**rest, "activations": kept * shape.layers + ends, "head": head},
        "layers": {**rest, "activations": rest_of_layers + layer + backward},
        "embeddings": {
            **rest,
            "activations": input_bytes,
            "head": _table_gradients(shape, step, table),
        },
        "optimizer step": {**rest, "optimizer": rest["optimizer"] + _muon_work(shape, step)},
    }
    for name in ("head", "layers"):
        peaks[name] = {**peaks[name], "weights": rest["weights"] + gathered}
    return peaks


def at_rest(shape: Shape, step: StepLoad) -> dict[str, int]:
    """Return what is held between two micro-batches: master weights and copies, gradients, the optimizer's state."""
    trained = _trained(shape, step)
    whole = shape.parameters + (trained if step.adapters is not None else 0)
    states = MASTER * (2 * trained - _by_muon(shape, step))
    if not step.is_sharded:
        copies = step.width * whole if step.width != MASTER else 0
        return {
            "weights": MASTER * whole + copies,
            "gradients": MASTER * trained,
            "optimizer": states,
        }
    root = step.width * (shape.table * (1 if shape.is_tied else 2) + shape.hidden)  # stays gathered
    if step.offloads:
        return {"weights": root, "gradients": 0, "optimizer": 0}
    shards = step.shards
    defers = REDUCTION_SHARE * MASTER * trained <= step.card_bytes
    gradients = MASTER * trained if defers else MASTER * trained // shards
    return {
        "weights": MASTER * whole // shards + root,
        "gradients": gradients,
        "optimizer": states // shards,
    }


def _trained(shape: Shape, step: StepLoad) -> int:
    return shape.parameters if step.adapters is None else adapter_parameters(shape, step.adapters)


def _by_muon(shape: Shape, step: StepLoad) -> int:
    """Count the parameters that have one number of state rather than two."""
    if not step.muon:
        return 0
    return shape.matrices if step.adapters is None else adapter_parameters(shape, step.adapters)


def _gathered_layers(shape: Shape, step: StepLoad) -> int:
    if not step.is_sharded:
        return 0
    return (
        step.width
        * shape.layer
        * (shape.layers if step.keeps_gathered else min(LAYERS_GATHERED, shape.layers))
    )


def _table_gradients(shape: Shape, step: StepLoad, table: int) -> int:
    """Return the gradients of the embeddings, where the backward pass ends; sharded ones are reduced in float32."""
    if not step.is_sharded:
        return 2 * step.width * table
    return (step.width + MASTER) * table + MASTER * table // step.shards


def _muon_work(shape: Shape, step: StepLoad) -> int:
    """Return what an iteration holds: updates in float32, and matrices of one shape in bfloat16, four times."""
    if not step.muon:
        return 0
    largest = shape.hidden * max(shape.mlp, shape.queries)
    alike = largest * (1 if step.is_sharded else 2 * shape.layers)
    together = min(alike, max(MUON_ELEMENTS // largest, 1) * largest)
    return together * (MASTER + 4 * 2)


def answering_peak(
    shape: Shape, step: StepLoad, *, prompt: int, new: int, rows_max: int, tokens_max: int
) -> Parts:
    """Return what answering held-out rows in process takes at most: a batch of prompts of `prompt` tokens each."""
    rest, width = at_rest(shape, step), step.width
    rows = max(1, min(rows_max, tokens_max // (prompt + new)))
    cache = rows * (prompt + new) * shape.cache_bytes(width)
    cache += cache // shape.layers  # one layer's grows into a copy
    token = width * (3 * shape.mlp + 2 * shape.queries) + (2 * MASTER + width) * shape.hidden
    # with a mask, once as bits and once as numbers
    first = rows * prompt * (token + (1 + width) * prompt)
    draws = rows * shape.vocabulary * (width + 3 * MASTER)
    weights = rest["weights"] + _gathered_layers(shape, step)
    return {**rest, "weights": weights, "gradients": 0, "answers": cache + max(first, draws)}
