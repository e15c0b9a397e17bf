"""Packing beside TRL: `trl.pack_dataset` ("bfd") fills as many rows as we do; its collator lays tokens out alike."""

import random

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rollouts.training.forward import pack
from rollouts.training.loops.batching import collate, split_batch
from rollouts.training.loops.packing import pack_best_fit

PAD = 0


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(4, 60))  # TRL cuts what is longer; we never do
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)), capacity


def documents(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(len(lengths))
    return [[rng.randrange(1, 1000) for _ in range(length)] for length in lengths]


@settings(max_examples=60, derandomize=True, database=None)
@given(lengths_and_capacity())
def test_rows_are_filled_as_trl_fills_them(drawn: tuple[list[int], int]) -> None:
    """Goal: the same number of rows, each as full, and every document whole in one of them.

    Both are best-fit decreasing; only documents of one length, or rows with equal room, may change places.
    Red with the first row that fits taken instead of the best.
    """
    lengths, capacity = drawn
    given_documents = documents(lengths)
    theirs = pack_dataset(Dataset.from_dict({"input_ids": given_documents}), capacity, "bfd")
    bins = pack_best_fit(lengths, capacity)
    our_fill = sorted(sum(lengths[index] for index in bin_) for bin_ in bins)
    assert our_fill == sorted(map(len, theirs["input_ids"]))
    unpacked = [
        ids
        for row, row_lengths in zip(theirs["input_ids"], theirs["seq_lengths"], strict=True)
        for ids in torch.tensor(row).split(row_lengths)
    ]
    ours = [given_documents[index] for bin_ in bins for index in bin_]
    assert sorted(map(torch.Tensor.tolist, unpacked)) == sorted(ours) == sorted(given_documents)


@pytest.mark.parametrize("seed", range(5))
def test_a_packed_row_is_laid_out_as_trls(seed: int) -> None:
    """Goal: the same ids, positions that start anew and boundaries as TRL's padding-free collator, on equal documents.

    Red with positions that run on through the row.
    """
    rng = random.Random(seed)
    rows = documents([rng.randint(1, 40) for _ in range(12)])
    batch = collate(rows, [[1.0] * len(row) for row in rows], pad_token_id=PAD)
    micro_batches = list(
        split_batch(batch, rank=0, world_size=1, micro_batch_size=None, micro_batch_tokens=90)
    )
    assert len(micro_batches) > 1
    for micro_batch in micro_batches:
        packed = pack(micro_batch["input_ids"], micro_batch["attention_mask"])
        lengths = micro_batch["attention_mask"].sum(1).tolist()
        examples = [
            {"input_ids": ids[:length].tolist()}
            for ids, length in zip(micro_batch["input_ids"], lengths, strict=True)
        ]
        theirs = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)(examples)
        assert torch.equal(packed.input_ids, theirs["input_ids"])
        assert torch.equal(packed.position_ids, theirs["position_ids"])
        assert torch.equal(packed.documents.offsets, theirs["cu_seq_lens_q"])
