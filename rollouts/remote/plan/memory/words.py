"""The memory plan in words: a table of GPUs and stages, problems, notes. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rollouts.config import Config
from rollouts.remote.errors import Problem
from rollouts.remote.plan.memory.engine_memory import GIB, Card
from rollouts.remote.plan.memory.fit import TIGHT_SHARE, Change, Misfit
from rollouts.remote.plan.memory.uses import Use

COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "head",
    "answers",
    "reference",
    "buckets",
    "other",
)
ENGINE_COLUMNS = ("engine", "engine's graphs", "engine, asleep")


def gib(count: float) -> str:
    return f"{count / GIB:.1f}"


def memory_lines(found: Sequence[Use], cards: Mapping[int, Card]) -> Iterator[str]:
    """Return a table with a row for each kind of GPU in each stage; nothing for no use."""
    rows = list(_grouped(found, cards))
    if not rows:
        return
    names = [
        name for name in (*COLUMNS, *ENGINE_COLUMNS) if any(name in use.parts for _, use in rows)
    ]
    table = [["GPU", "stage", *names, "in all", "there is"]]
    for gpus, use in rows:
        have = cards[use.gpu].have
        cells = [gib(use.parts[name]) if name in use.parts else "" for name in names]
        needed = (
            f">= {gib(use.needed)}"
            if use.unknown and use.parts
            else gib(use.needed)
            if use.parts
            else "?"
        )
        table.append([gpus, use.stage, *cells, needed, "?" if have is None else gib(have)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    yield "memory in GiB at the fullest moment, by arithmetic (docs/reference/gpu-hosts.md#memory):"
    for row in table:
        cells = [
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _grouped(found: Sequence[Use], cards: Mapping[int, Card]) -> Iterator[tuple[str, Use]]:
    """Return uses of one stage that are alike together, with their GPUs as "0, 1"."""
    groups: dict[Any, list[Use]] = {}
    for use in found:
        key = (use.stage, use.moment, tuple(use.parts.items()), use.unknown, cards[use.gpu].have)
        groups.setdefault(key, []).append(use)
    for group in groups.values():
        yield ", ".join(str(use.gpu) for use in group), group[0]


def misfit_problems(
    config: Config,
    found: Sequence[Misfit],
    change: Change | None,
    names: Mapping[int, str],
    target: str,
) -> Iterator[Problem]:
    """Name GPUs, stage, what is needed, what there is, and the nearest change that fits."""
    groups: dict[Any, list[Misfit]] = {}
    for misfit in found:
        key = (misfit.use.stage, misfit.reason, tuple(misfit.use.parts.items()), misfit.have)
        groups.setdefault(key, []).append(misfit)
    for group in groups.values():
        first = group[0]
        ranks = [misfit.use.gpu for misfit in group]
        which = (
            f"GPU {ranks[0]} is" if len(ranks) == 1 else f"GPUs {', '.join(map(str, ranks))} are"
        )
        few = f"{target}: {which} too small for the {first.use.stage} stage."
        if first.reason:
            few = f"{target}: the engine has too little of GPU {ranks[0]} in the {first.use.stage} stage."
        yield Problem(
            few,
            found=f"{names.get(ranks[0], 'card')}: {gib(first.have)} GiB to use",
            needed=first.reason
            or f"{gib(first.use.needed)} GiB {_moment(first.use)}: {_parts_words(first.use)}",
            fix=change_words(config, change),
        )


def _moment(use: Use) -> str:
    return f"at least, without {' and '.join(use.unknown)}" if use.unknown else f"at {use.moment}"


def _parts_words(use: Use) -> str:
    return ", ".join(
        f"{name} {gib(use.parts[name])}" for name in use.parts if use.parts[name] >= GIB / 20
    )


def change_words(config: Config, change: Change | None) -> str:
    """Say the nearest change that fits."""
    if change is None:
        return (
            "no change of mem_fraction, micro-batches, activation_checkpointing, sleep_while_training or sharding over"
            " these GPUs fits: take a larger card, a smaller model, or model.lora"
        )
    fields = ", ".join(f"{path}={value!r}" for path, value in change.fields.items())
    return f"set {fields}: the nearest change that fits, {gib(change.needed)} of {gib(change.have)} GiB"


def memory_notes(found: Sequence[Use], cards: Mapping[int, Card]) -> Iterator[str]:
    """Say what is tight, and what is not known."""
    for gpus, use in _grouped(found, cards):
        have = cards[use.gpu].have
        where = f"memory of GPU {gpus} in the {use.stage} stage"
        if use.unknown:
            yield f"{where}: not known: {'; '.join(use.unknown)}"
        if have is None and use.parts:
            yield f"{where}: {gib(use.needed)} GiB are needed; what the card, or its slice, has is not told"
        elif have is not None and TIGHT_SHARE * have < use.needed <= have:
            yield f"{where} is tight: {gib(use.needed)} of {gib(have)} GiB, by sums that may be off by a tenth"
