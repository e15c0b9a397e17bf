"""Data sets and how they are mixed."""

from dataclasses import dataclass
from typing import Literal

from rollouts.data_formats import FormatName


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One data set of a mixture: rows shuffled by shuffle_seed, of those [start:stop:step], the first max_samples."""

    # hub id, a directory laid out as on the hub, or a .jsonl file (relative to the repository's root)
    name: str
    # how a row becomes a conversation: docs/reference/data-formats.md. "spelling_bee" and "simple_spelling" are
    # made here, without end: `name` is a label. "text" has no conversation: for sft_mixture and validation loss
    format: FormatName
    split: str  # of a hub data set or directory, such as "train"
    subset: str | None  # the hub's configuration name
    # as datasets' shuffle; None: rows in their order. Streamed: in windows of 10,000 rows
    shuffle_seed: int | None
    start: int  # the first row, counted from 0
    stop: int  # -1: to the end
    step: int  # take every step-th row
    max_samples: int  # -1: all
    streaming: bool  # fetch rows one by one and only those needed; for sets too large to download
    repeat: int  # how often the rows are in the mixture


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the stages train on, and what is held out."""

    sft_mixture: list[DatasetSpec]  # conversations that SFT trains on; [] without an sft stage
    sft_order: Literal[
        "shuffled", "sequence"
    ]  # sequence: the mixture as listed, every epoch; a curriculum
    rl_mixture: list[DatasetSpec]  # prompts that RL samples for; [] without an rl stage
    eval_mixture: list[
        DatasetSpec
    ]  # held out: validation loss and exact match; [] turns evaluation off
    max_length: int  # tokens; a longer conversation is left out and counted, a longer text split into pieces
    shuffle_seed: int  # of the order of the mixture
