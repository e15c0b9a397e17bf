"""What an inference server takes of a GPU. Pure: config + shape + what is free at its start → bytes.

SGLang takes `engine.mem_fraction` of what is free when it starts, for weights and cache; vLLM that part of the whole
card. What lies outside of it was never measured here: the sums are an audit's of SGLang 0.5.21 and of vLLM 0.32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rollouts.config import Config, EngineConfig
from rollouts.engines.command_lines import engine_devices
from rollouts.remote.inputs.shapes import Shape

GIB = 2**30
CONTEXT_BYTES = GIB // 2  # a process's CUDA context and libraries
# graphs, workspace, activations of a prefill
OUTSIDE_BYTES = {"sglang": 2 * GIB, "vllm": GIB, "embedded": 0}
# of the embedded engine for each row and token id: sums in float64, float32 copies
SAMPLING_BYTES = 8 * 2 + 4 * 3


CARD_BYTES_UNKNOWN = 24 * GIB  # what rules that ask for a card's size get where it does not tell it


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card, in bytes. `have`: what a job can take; None: it reports no memory."""

    have: int | None
    total: int | None


@dataclass(frozen=True, kw_only=True)
class EngineUse:
    """One replica's part of one GPU."""

    weights: int
    cache: int  # keys and values; less than 0: the weights alone do not fit into its part
    outside: int  # CUDA context, graphs
    cache_tokens: int  # that fit into the cache

    @property
    def awake(self) -> int:
        return self.weights + max(0, self.cache) + self.outside

    @property
    def asleep(self) -> int:
        """Return what stays while the trainer steps, with sleep_while_training."""
        return self.outside


def engine_uses(
    config: Config, engine: EngineConfig, shape: Shape, gpu: int, card: Card
) -> list[EngineUse]:
    """Return what each replica on `gpu` takes; a later one finds what the earlier ones left."""
    found: list[EngineUse] = []
    total = card.total or CARD_BYTES_UNKNOWN
    free = total if card.have is None else card.have
    for replica in range(engine.replicas):
        if gpu in engine_devices(engine, replica):
            left = free - sum(use.awake for use in found)
            found.append(_use(config, engine, shape, left, total))
    return found


def _use(config: Config, engine: EngineConfig, shape: Shape, free: int, total: int) -> EngineUse:
    width = 2 if config.model.dtype == "bfloat16" else 4
    size = engine.tensor_parallel_size
    weights = width * shape.parameters // size
    token = max(1, shape.cache_bytes(width) // min(size, shape.key_heads))
    outside = CONTEXT_BYTES + OUTSIDE_BYTES[engine.kind]
    if engine.kind == "embedded":
        rows = engine.max_running_requests
        wanted = rows * engine.context_length * token  # rows as long as they may be
        draws = rows * shape.vocabulary * SAMPLING_BYTES
        bound = int(engine.mem_fraction * total) - weights - draws
        cache = min(wanted, bound)
        return EngineUse(
            weights=weights,
            cache=cache,
            outside=outside + draws,
            cache_tokens=max(0, cache) // token,
        )
    if engine.kind == "vllm":
        cache = int(engine.mem_fraction * total) - weights - CONTEXT_BYTES
    else:
        cache = int(engine.mem_fraction * max(0, free - CONTEXT_BYTES)) - weights
    if engine.max_total_tokens is not None:
        cache = min(cache, engine.max_total_tokens * token)
    return EngineUse(
        weights=weights, cache=cache, outside=outside, cache_tokens=max(0, cache) // token
    )


def engine_parts(uses: list[EngineUse], *, asleep: bool) -> Mapping[str, int]:
    """Name the parts of all replicas on a GPU."""
    if asleep:
        return {"engine, asleep": sum(use.asleep for use in uses)}
    return {
        "engine": sum(use.weights + max(0, use.cache) for use in uses),
        "engine's graphs": sum(use.outside for use in uses),
    }
