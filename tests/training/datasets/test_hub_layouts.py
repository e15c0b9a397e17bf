"""Local directories laid out as on the hub, through the real `datasets`: shards, cards, streaming, broken files."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from rollouts.data_formats.row import DataError
from rollouts.training.datasets import rows as rows_module
from rollouts.training.datasets.rows import read_rows
from rollouts.training.datasets.selection import Selection
from tests.training.datasets.hub import write_card, write_hub_dataset, write_jsonl, write_parquet

TRAIN = [{"question": f"q{index}", "answer": "a"} for index in range(7)]
TEST = [{"question": "held out", "answer": "a"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_hub_dataset(
        tmp_path / "gsm", {"main": {"train": TRAIN, "test": TEST}, "socratic": {"train": TEST}}, 2
    )


def questions(*args: Any, **options: Any) -> list[str]:
    return [row.values["question"] for row in read_rows(*args, **options)]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_shards_by_subset_and_split(root: Path, streaming: bool) -> None:
    """Goal: the card decides which files; rows are named by shard and row. Red with rows counted over all shards."""
    rows = read_rows(str(root), subset="main", streaming=streaming)
    assert [row.values for row in rows] == TRAIN
    shard = root / "main" / "train-00001-of-00002.parquet"
    assert [rows[3].where, rows[4].where] == [
        f"{str(shard).replace('00001-of', '00000-of')} row 3",
        f"{shard} row 0",
    ]
    assert questions(str(root), subset="main", split="test", streaming=streaming) == ["held out"]
    assert questions(str(root), subset="socratic", streaming=streaming) == ["held out"]


def test_shards_without_a_card(tmp_path: Path) -> None:
    """Goal: data/train-00000-of-00002.parquet is enough, as on the hub. Red when a card was required."""
    write_parquet(tmp_path / "set" / "data", "train", TRAIN, 2)
    write_parquet(tmp_path / "set" / "data", "test", TEST)
    assert questions(str(tmp_path / "set")) == [row["question"] for row in TRAIN]
    assert questions(str(tmp_path / "set"), split="test") == ["held out"]


def test_several_jsonl_files_of_a_split(tmp_path: Path) -> None:
    """Goal: lines of a directory's files keep file and line, dates stay text, and a message has its own keys alone.

    Red with the loader of `datasets`, which gave "[train] row 1", a timestamp, and nulls for other rows' keys.
    """
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    first = [{"messages": [{"role": "user", "content": "hi"}], "day": "2020-01-01"}]
    second = [{"messages": [call], "day": "2020-01-02"}]
    files = [
        write_jsonl(tmp_path / "set" / "parts" / f"{n}.jsonl", rows)
        for n, rows in enumerate((first, second))
    ]
    write_card(tmp_path / "set", {"default": {"train": "parts/*.jsonl"}})
    rows = read_rows(str(tmp_path / "set"))
    assert [row.values for row in rows] == [*first, *second]
    assert [row.where for row in rows] == [f"{file}:1" for file in files]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_card_that_declares_features(tmp_path: Path, streaming: bool) -> None:
    """Goal: ai2_arc's card declares `choices` as a sequence of a struct; a row has it as lists. Red when a row came as
    a list of pairs."""
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    root = write_hub_dataset(
        tmp_path / "arc", {"ARC-Easy": {"train": [{"choices": choices, "answerKey": "A"}]}}
    )
    card = (root / "README.md").read_text().removeprefix("---\n")
    struct = "".join(f"    - name: {name}\n      dtype: string\n" for name in choices)
    declared = f"  - name: choices\n    sequence:\n{struct}  - name: answerKey\n    dtype: string\n"
    info = f"dataset_info:\n- config_name: ARC-Easy\n  features:\n{declared}"
    (root / "README.md").write_text(f"---\n{info}{card}")
    (row,) = read_rows(str(root), subset="ARC-Easy", streaming=streaming)
    assert row.values == {"choices": choices, "answerKey": "A"}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_shuffle_before_the_slice(tmp_path: Path, kind: str) -> None:
    """Goal: the rows of `load_dataset(...).shuffle(seed=42).select(...)`, as nanochat takes them, with their own names.

    Red when the rows after a shuffle were named by their new place.
    """
    if kind == "parquet":
        (file,) = write_parquet(tmp_path / "set" / "data", "train", TRAIN)
        name, template = str(tmp_path / "set"), f"{file} row {{}}"
    else:
        name = str(write_jsonl(tmp_path / "set.jsonl", TRAIN))
        template = f"{name}:{{}}"
    expected = datasets.Dataset.from_list(TRAIN).shuffle(seed=42)["question"][1:7:2]
    rows = read_rows(name, selection=Selection(42, 1, 7, 2))
    assert [row.values["question"] for row in rows] == expected
    offset = 0 if kind == "parquet" else 1
    assert [row.where for row in rows] == [template.format(int(q[1:]) + offset) for q in expected]


def test_streaming_pulls_only_what_is_needed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: three rows of a large set read three rows, and no copy is made. Red with `streaming` not handed on."""
    pulled: list[int] = []
    enumerate_ = enumerate

    def counting(rows: Any) -> Any:
        for index, row in enumerate_(rows):
            pulled.append(index)
            yield index, row

    monkeypatch.setattr(rows_module, "enumerate", counting, raising=False)
    got = questions(str(root), subset="main", streaming=True, selection=Selection(max_samples=3))
    assert got == ["q0", "q1", "q2"] and pulled == [0, 1, 2]
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow"))


def test_a_streamed_shuffle_is_seeded(root: Path) -> None:
    """Goal: the same seed, the same rows, whatever their order on disk. Red without the seed handed on."""
    first = questions(str(root), subset="main", streaming=True, selection=Selection(shuffle_seed=5))
    assert first == questions(
        str(root), subset="main", streaming=True, selection=Selection(shuffle_seed=5)
    )
    assert sorted(first) == [row["question"] for row in TRAIN] != first


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_shard_is_named(root: Path, streaming: bool) -> None:
    """Goal: the file and why. Red when the loader's "An error occurred while generating the dataset" was all."""
    shard = root / "main" / "train-00001-of-00002.parquet"
    shard.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=rf"^{shard}: cannot be read as parquet: .*magic bytes"):
        read_rows(str(root), subset="main", streaming=streaming)


def test_a_broken_file_of_another_kind_keeps_the_cause(tmp_path: Path) -> None:
    """Goal: what `datasets` found, not only that it failed. Red with str(error) alone."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.json").write_text('[{"question": "x"}, {"question": ')
    with pytest.raises(
        DataError, match=r"cannot read split 'train'.*Expected object or value at position 32"
    ):
        read_rows(str(tmp_path / "set"))


def test_a_broken_line_of_a_directory_is_named(tmp_path: Path) -> None:
    """Goal: file and line, in a directory too. Red with the loader of `datasets`."""
    write_jsonl(tmp_path / "set" / "train.jsonl", TRAIN)
    with (tmp_path / "set" / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"set/train\.jsonl:8: not JSON"):
        read_rows(str(tmp_path / "set"))


def test_a_slice_beyond_the_end_is_named(root: Path) -> None:
    """Goal: an empty selection is a mistake in the config. Red when it gave []."""
    with pytest.raises(DataError, match=r"no rows in \[7::1\] of split 'train'"):
        read_rows(str(root), subset="main", selection=Selection(start=7))
