"""Chat templates rendered in worker processes: the same samples, read lazily, and no process left."""

import multiprocessing
import os
from collections.abc import Iterator

import pytest

from rollouts.data_formats.examples import Example
from rollouts.data_formats.row import DataError
from rollouts.training.datasets import dataset_loaders, sft
from rollouts.training.datasets.render_workers import CHUNKS_PER_WORKER
from rollouts.training.datasets.sft import build_sft_samples
from rollouts.worker.builders.data import _spare_cores
from tests.training.datasets.families import FAMILIES
from tests.training.datasets.test_chat_families import CHAT
from tests.training.datasets.test_chat_sft import example


def rows(count: int, broken: int = -1) -> list[Example]:
    ask = [{"role": "user", "content": "count"}, {"role": "system", "content": "no"}]
    return [
        example([ask[n == broken], *CHAT[1:], {"role": "assistant", "content": "x" * (n + 1)}], n)
        for n in range(count)
    ]


def test_workers_give_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: speed alone changes, and a stream is not read to its end first; a broken row is named, the workers end.

    Red with the chunks in the order in which they were done, without the bound, and without the shutdown.
    """
    monkeypatch.setattr(sft, "EXAMPLES_PER_CALL", 2)
    tokenizer = FAMILIES["gemma2"].tokenizer()
    expected = build_sft_samples(rows(30), tokenizer, max_length=-1)
    read: list[int] = []
    handed_out: list[int] = []

    def stream() -> Iterator[Example]:
        for index, one in enumerate(rows(30)):
            read.append(index)
            handed_out.append(kept())
            yield one

    reports: list[sft.SFTReport] = []
    monkeypatch.setattr(sft, "SFTReport", lambda: reports.append(original()) or reports[-1])
    original = type(expected[1])

    def kept() -> int:
        return reports[-1].kept

    assert build_sft_samples(stream(), tokenizer, max_length=-1, num_workers=1) == expected
    assert max(at - done for at, done in zip(read, handed_out, strict=True)) <= 2 * (
        CHUNKS_PER_WORKER + 2
    )
    with pytest.raises(
        DataError, match=r"f\.jsonl:5: the chat template refuses .*System role not supported"
    ):
        build_sft_samples(rows(30, broken=5), tokenizer, max_length=-1, num_workers=2)
    assert multiprocessing.active_children() == []


def test_few_examples_start_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: processes only where they pay. Red when num_workers was handed on for any number of examples."""
    asked: list[int] = []

    def build(
        examples: list[Example], tokenizer: object, *, max_length: int, num_workers: int
    ) -> tuple:
        asked.append(num_workers)
        return [], sft.SFTReport()

    monkeypatch.setattr(dataset_loaders, "build_sft_samples", build)
    monkeypatch.setattr(dataset_loaders, "_mix", lambda specs, seed: rows(3))
    for enough in (4, 3):
        monkeypatch.setattr(dataset_loaders, "WORKERS_PAY_FROM", enough)
        dataset_loaders.load_sft_mixture([], tokenizer=None, max_length=-1, seed=0, num_workers=7)
    assert asked == [0, 7]


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(48, 8, 6), (96, 1, 16), (8, 8, 0), (1, 1, 0)]
)
def test_ranks_share_the_hosts_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, expected: int
) -> None:
    """Goal: eight ranks that render at once do not start eight times too many. Red without LOCAL_WORLD_SIZE."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert _spare_cores() == expected
