"""Which GPUs a config does not fit into, and the nearest change with which it fits. Pure."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rollouts.config import Config, changed
from rollouts.remote.plan.memory.engine_memory import GIB, Card
from rollouts.remote.plan.memory.uses import (
    Models,
    Stage,
    Use,
    gpu_uses,
    largest_micro_batch,
    longest_sequence,
)

CHANGES_MAX = 3  # made together
TIGHT_SHARE = 0.95  # of what there is: beyond it a sum of this kind may be wrong by what is left
CACHE_SEQUENCES_MIN = 8  # of the longest that a smaller engine must have room for at once
FRACTION_MIN, FRACTION_MAX, FRACTION_STEP = 10, 90, 5  # percent
ROWS_MIN = 32  # of an embedded engine at once


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """One GPU in one stage that lacks memory. `reason` "" where the sum alone is too large."""

    use: Use
    have: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """Fields of the config with their new values, and what is needed then on the fullest GPU."""

    fields: Mapping[str, Any]
    needed: int
    have: int


def misfits(config: Config, models: Models, cards: Mapping[int, Card]) -> list[Misfit]:
    """List them; a card that tells no memory is in none."""
    found = []
    for use in gpu_uses(config, models, cards):
        have = cards[use.gpu].have
        if have is None:
            continue
        reason = _engine_reason(config, use, cards[use.gpu])
        if reason or use.needed > have:
            found.append(Misfit(use=use, have=have, reason=reason))
    return found


def _engine_reason(config: Config, use: Use, card: Card) -> str:
    """Say why an engine would not start in its part of the card; "" if it would."""
    engine = config.engine
    if engine is None or not use.engines:
        return ""
    if engine.kind == "vllm" and card.have is not None and card.total is not None:
        wanted = engine.mem_fraction * card.total
        if wanted > card.have:
            return f"vLLM wants {wanted / GIB:.1f} GiB free: engine.mem_fraction={engine.mem_fraction} of the card"
    for one in use.engines:
        if one.cache_tokens < engine.context_length:
            share = f"engine.mem_fraction={engine.mem_fraction}: {one.weights / GIB:.1f} GiB of weights and a cache for"
            return f"{share} {one.cache_tokens} tokens, fewer than engine.context_length={engine.context_length}"
    return ""


# --- changes --------------------------------------------------------------------------------------------------------

Option = Sequence[Mapping[str, Any]]  # one kind of change: its values, nearest first


def nearest_change(
    config: Config, models: Models, cards: Mapping[int, Card], spare: Mapping[int, Card]
) -> Change | None:
    """Return the first change that fits: one kind of change before two together, the cheapest kinds first.

    One that fits tightly is taken where no other does. `cards` are those that the config names, `spare` all that it
    could name.
    """
    options = [option for option in _options(config, models, cards, spare) if option]
    tight: Change | None = None
    for count in range(1, CHANGES_MAX + 1):
        for chosen in itertools.combinations(options, count):
            for values in itertools.product(*chosen):
                fields = {path: value for part in values for path, value in part.items()}
                if len(fields) < sum(map(len, values)):
                    continue  # one field twice
                found = _fitting(config, fields, models, {**spare, **cards})
                if found is not None and found.needed <= TIGHT_SHARE * found.have:
                    return found
                tight = tight or found
    return tight


def _fitting(
    config: Config, fields: Mapping[str, Any], models: Models, cards: Mapping[int, Card]
) -> Change | None:
    candidate = changed(config, fields)
    if (
        misfits(candidate, models, cards)
        or not _has_cache(candidate, models, cards)
        or candidate.problems()
    ):
        return None
    sums = [
        (use.needed, cards[use.gpu].have or 0)
        for use in gpu_uses(candidate, models, cards)
        if cards[use.gpu].have
    ]
    if not sums:
        return None
    needed, have = max(sums, key=lambda pair: pair[0] / pair[1])
    return Change(fields=dict(fields), needed=needed, have=have)


def _has_cache(config: Config, models: Models, cards: Mapping[int, Card]) -> bool:
    """Return whether every engine has room for some sequences at once: less would sample one by one."""
    engine = config.engine
    if engine is None:
        return True
    least = min(CACHE_SEQUENCES_MIN, engine.max_running_requests) * engine.context_length
    found = [one.cache_tokens for use in gpu_uses(config, models, cards) for one in use.engines]
    return all(tokens >= least for tokens in found)


def _options(
    config: Config, models: Models, cards: Mapping[int, Card], spare: Mapping[int, Card]
) -> Iterator[Option]:
    """Return the kinds of changes: those that change the least of a run, or of its speed, first."""
    failing = misfits(config, models, cards)
    stages = list(dict.fromkeys(misfit.use.stage for misfit in failing if _trains(misfit.use)))
    engines = list(_other_engines(config)) if any(misfit.use.engines for misfit in failing) else []
    batches = list(_zipped([_smaller_micro_batches(config, stage) for stage in stages]))
    yield [fields for fields in engines if _is_half(config, fields)]
    yield [fields for fields in batches if _is_half(config, fields)]
    yield (
        [{"model.activation_checkpointing": True}]
        if stages and not config.model.activation_checkpointing
        else []
    )
    yield [fields for fields in batches if not _is_half(config, fields)]
    yield [fields for fields in engines if not _is_half(config, fields)]
    engine = config.engine
    colocated = engine is not None and any(
        _trains(misfit.use) and misfit.use.engines for misfit in failing
    )
    if engine is not None and colocated:
        can_sleep = engine.kind == "sglang" and not engine.sleep_while_training
        yield [{"engine.sleep_while_training": True}] if can_sleep else []
        free = [gpu for gpu in sorted(spare) if gpu not in config.target.gpu_ranks]
        alone = engine.replicas * engine.tensor_parallel_size == 1
        yield [{"engine.gpu_ranks": [gpu]} for gpu in free[:1]] if alone else []
    taken = (
        {*engine.gpu_ranks}
        if engine is not None and not colocated and config.uses_engine
        else set()
    )
    present = [
        gpu
        for gpu in sorted({*spare, *config.target.gpu_ranks} & {*spare, *cards})
        if gpu not in taken
    ]
    if stages and len(present) > len(config.target.gpu_ranks):
        yield [{"target.gpu_ranks": present, "target.sharding": "full_shard"}]
    elif stages and config.target.sharding == "none" and len(config.target.gpu_ranks) > 1:
        yield [{"target.sharding": "full_shard"}]


def _trains(use: Use) -> bool:
    return "weights" in use.parts


def _other_engines(config: Config) -> Iterator[dict[str, Any]]:
    """Return smaller shares of an engine, then larger ones; of an embedded one, whose cache grows, fewer rows."""
    engine = config.engine
    if engine is None:
        return
    if engine.kind == "embedded":
        sizes = [engine.max_running_requests // 2**power for power in range(1, 10)]
        yield from ({"engine.max_running_requests": size} for size in sizes if size >= ROWS_MIN)
        return
    now = round(engine.mem_fraction * 100)
    first = now - 1 - (now - 1) % FRACTION_STEP
    smaller = range(first, FRACTION_MIN - 1, -FRACTION_STEP)
    larger = (
        percent
        for percent in range(first + FRACTION_STEP, FRACTION_MAX + 1, FRACTION_STEP)
        if percent > now
    )
    yield from ({"engine.mem_fraction": percent / 100} for percent in (*smaller, *larger))


def _smaller_micro_batches(config: Config, stage: Stage) -> list[tuple[str, int]]:
    """Return (field, value) of smaller micro-batches, down to one sequence of the longest."""
    settings = getattr(config, stage)
    if settings.micro_batch_tokens == -1:
        sizes = [settings.batch_size // 2**power for power in range(1, 12)]
        return [(f"{stage}.batch_size", size) for size in sizes if size >= 1]
    whole, least = largest_micro_batch(config, stage), longest_sequence(config, stage)
    sizes = [max(least, whole * eighths // 8 // 256 * 256) for eighths in range(7, 0, -1)]
    return [(f"{stage}.micro_batch_tokens", size) for size in dict.fromkeys(sizes) if size < whole]


def _zipped(stages: list[list[tuple[str, int]]]) -> Iterator[dict[str, int]]:
    """Let the stages get smaller together; one that is at its least stays there."""
    for place in range(max(map(len, stages), default=0)):
        yield dict(values[min(place, len(values) - 1)] for values in stages if values)


def _is_half(config: Config, fields: Mapping[str, Any]) -> bool:
    """Return whether nothing is less than half of what it was."""
    for path, value in fields.items():
        section, _, name = path.partition(".")
        was = (
            largest_micro_batch(config, cast(Stage, section))
            if name == "micro_batch_tokens"
            else getattr(getattr(config, section), name)
        )
        if 2 * value < was:
            return False
    return True
