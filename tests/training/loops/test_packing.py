"""Best-fit packing: the bound, the order, nothing lost; and the micro-batches that are cut by it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.training.loops.batching import collate, split_batch
from rollouts.training.loops.packing import pack_best_fit
from tests.training.tiny import sft_samples


def test_the_fullest_bin_that_fits_is_taken():
    """Goal: best fit, longest first. Red with the first bin that fits taken: 3 would stand beside 5."""
    assert pack_best_fit([5, 3, 7, 2, 3], 10) == [[2, 1], [0, 4, 3]]
    assert pack_best_fit([6, 7, 3], 10) == [[1, 2], [0]]


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_nothing_is_lost_or_overfull(lengths, capacity):
    """Goal: each index once; over capacity only alone; no two bins fit into one. Red with rooms not updated."""
    bins = pack_best_fit(lengths, capacity)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in bin_) for bin_ in bins]
    assert all(
        total <= capacity or len(bin_) == 1 for total, bin_ in zip(totals, bins, strict=True)
    )
    smallest = sorted(totals)[:2]
    assert len(smallest) < 2 or sum(smallest) > capacity


def test_capacity_must_hold_a_token():
    """Goal: a capacity of 0 is refused. Red without the check: every sequence would get its own pass in silence."""
    with pytest.raises(ValueError, match="capacity=0: needs >= 1 token"):
        pack_best_fit([1], 0)


def test_micro_batches_are_filled_by_tokens():
    """Goal: `micro_batch_tokens` bounds real tokens, each sequence once. Red with padded sizes counted."""
    samples = sft_samples(11)
    batch = collate([s.tokens for s in samples], [s.loss_mask for s in samples], pad_token_id=1)
    seen, totals = [], []
    for rank in range(2):
        for micro in split_batch(
            batch, rank=rank, world_size=2, micro_batch_size=1, micro_batch_tokens=20
        ):
            lengths = micro["attention_mask"].sum(1).tolist()
            totals.append(sum(lengths))
            assert micro["input_ids"].shape == (len(lengths), max(lengths))
            assert micro["tokens_global"] == batch["tokens_global"]
            seen += [
                ids[:length].tolist()
                for ids, length in zip(micro["input_ids"], lengths, strict=True)
            ]
    assert sorted(seen) == sorted(sample.tokens for sample in samples)
    assert max(totals) <= 20 and len(totals) < len(samples) / 2
