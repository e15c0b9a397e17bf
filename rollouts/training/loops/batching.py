"""Sequences to a padded batch, and a batch to each rank's micro-batches. Pure: tensors in, tensors out.

B sequences, T tokens of the longest. A batch holds [B, T] and [B] tensors, and numbers that belong to the whole step.
"""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from rollouts.training.loops.packing import pack_best_fit
from rollouts.training.seams import Batch
from rollouts.training.token_selection import trained_tokens


def collate(
    tokens: Sequence[Sequence[int]], loss_masks: Sequence[Sequence[float]], *, pad_token_id: int
) -> Batch:
    """Right-padded "input_ids", "labels", "attention_mask", "loss_mask" [B, T], and "tokens_global".

    What is padding follows from lengths alone: a real token that equals `pad_token_id`, the end of a turn say, stays.
    """
    width = max(map(len, tokens))
    input_ids = pad(tokens, width, pad_token_id, torch.long)
    loss_mask = pad(loss_masks, width, 0.0, torch.float32)
    lengths = torch.tensor([len(row) for row in tokens])
    return {
        "input_ids": input_ids,
        "labels": input_ids,
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        "loss_mask": loss_mask,
        "tokens_global": trained_tokens(loss_mask),
    }


def pad(rows: Sequence[Sequence[float]], width: int, value: float, dtype: torch.dtype) -> Tensor:
    """Return rows of any lengths as [B, width], filled up on the right."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype)


def split_batch(
    batch: Batch,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int | None,
    micro_batch_tokens: int | None = None,
    equal_counts: bool = False,
) -> Iterator[Batch]:
    """This rank's micro-batches of a step's batch, each trimmed to its longest sequence.

    Sequences are dealt to ranks in order of length, so that ranks get equal work. `micro_batch_tokens`: as many as fit
    into so many tokens, padding not counted (`pack_best_fit`); else `micro_batch_size` of them, or all for None.
    "tokens_global" and other numbers pass unchanged: the losses of all micro-batches on all ranks add up to the step's.
    `equal_counts`: a rank that has fewer than another gets blank ones (`blank_batch`) too.
    """
    deal = partial(
        dealt_rows,
        batch,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
    )
    chosen = deal(rank=rank)
    for rows in chosen:
        yield _rows_of(batch, rows, int(batch["attention_mask"][rows[0]].sum()))
    if equal_counts:
        most = max(len(deal(rank=other)) for other in range(world_size))
        yield from [blank_batch(batch)] * (most - len(chosen))


def dealt_rows(
    batch: Batch,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int | None,
    micro_batch_tokens: int | None = None,
) -> list[Tensor]:
    """Return which rows of a step's batch each of a rank's micro-batches has, the longest first."""
    lengths = batch["attention_mask"].sum(1)
    own = torch.argsort(lengths, descending=True, stable=True)[rank::world_size]
    if micro_batch_tokens is not None:
        return [own[bin_] for bin_ in pack_best_fit(lengths[own].tolist(), micro_batch_tokens)]
    return [rows for rows in own.split(micro_batch_size or max(1, len(own))) if len(rows)]


def blank_batch(batch: Batch) -> Batch:
    """Return the shortest sequence of `batch`, none of it trained on: for a rank without a micro-batch left.

    Where a model is sharded, every forward pass needs all ranks. Its loss and its gradient are 0.
    """
    lengths = batch["attention_mask"].sum(1)
    row = lengths.argmin()[None]
    blank = _rows_of(batch, row, int(lengths[row]))
    return {**blank, "loss_mask": torch.zeros_like(blank["loss_mask"])}


def step_indices(count: int, batch_size: int, step: int, seed: int | None) -> list[int]:
    """Return which of `count` examples make up step `step` (from 0): positions in an endless run of epochs.

    Each epoch is shuffled by (`seed`, epoch); with seed None every one keeps the examples' own order, a curriculum.

    A pure function of its arguments, so that a resumed run continues with exactly the examples that would have come.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: _epoch_order(count, epoch, seed)
        for epoch in {position // count for position in positions}
    }
    return [orders[position // count][position % count] for position in positions]


# a step lies in one epoch or two; shuffling 460K examples takes longer than a small step
@lru_cache(maxsize=2)
def _epoch_order(count: int, epoch: int, seed: int | None) -> tuple[int, ...]:
    order = list(range(count))
    if seed is not None:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _rows_of(batch: Batch, rows: Tensor, width: int) -> Batch:
    """Return the chosen rows of every tensor, cut to `width` tokens; numbers as they are."""
    return cast(Batch, {key: _take(value, rows, width) for key, value in batch.items()})


def _take(value: Any, rows: Tensor, width: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value[rows, :width] if value.ndim == 2 else value[rows]
