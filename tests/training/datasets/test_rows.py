"""Rows out of .jsonl files and local directories: what is read, and what is said when it cannot be."""

import json
import os
from pathlib import Path

import pytest

from rollouts.data_formats.row import DataError
from rollouts.training.datasets.rows import read_rows
from rollouts.training.datasets.selection import Selection


def write(path: Path, *lines: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return str(path)


def test_jsonl_rows_keep_their_line_numbers(tmp_path: Path) -> None:
    """Goal: a row knows its line, blank lines counted. Red when rows were numbered by index."""
    path = write(tmp_path / "a.jsonl", {"q": "x"}, "", {"q": "y", "n": 3})
    rows = read_rows(path)
    assert [(row.where, row.values) for row in rows] == [
        (f"{path}:1", {"q": "x"}),
        (f"{path}:3", {"q": "y", "n": 3}),  # a column that the first row lacks is kept
    ]


def test_strings_that_look_like_dates_stay_strings(tmp_path: Path) -> None:
    """Goal: an answer is what the file says. Red with `load_dataset("json")`, which makes timestamps of these."""
    path = write(tmp_path / "a.jsonl", {"answer": "2020-01-01"}, {"answer": "2021-02-03"})
    assert [row.values["answer"] for row in read_rows(path)] == ["2020-01-01", "2021-02-03"]


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    """Goal: no stale cache, even within one tick of the clock and at the same size. Red with a cache keyed by path."""
    path = write(tmp_path / "a.jsonl", {"q": "old"})
    before = os.stat(path)
    assert read_rows(path)[0].values == {"q": "old"}
    write(tmp_path / "a.jsonl", {"q": "new"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_rows(path)[0].values == {"q": "new"}


def test_max_samples_takes_the_first_rows(tmp_path: Path) -> None:
    """Goal: the first N rows, and no line after them is looked at. Red when the whole file was parsed first."""
    path = write(tmp_path / "a.jsonl", *({"n": n} for n in range(5)), "{broken")
    assert [row.values["n"] for row in read_rows(path, selection=Selection(max_samples=3))] == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['{"a": 1}', "{broken"],
            ":2: not JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        (['{"a": 1}', "", "[1]"], ":3: needs one JSON object per line, found list: '[1]'"),
        ([], ": no rows"),
        (["", "  "], ": no rows"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    """Goal: file, line, value and need. Red (no line) when the loader of `datasets` did the parsing."""
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(path) and message in str(caught.value)


def test_not_utf8_is_named(tmp_path: Path) -> None:
    """Goal: bytes that are no text are a DataError with the file. Red when UnicodeDecodeError came through."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl: cannot be read as UTF-8 text"):
        read_rows(str(path))


@pytest.mark.parametrize(
    "name", ["no/such/file.jsonl", "no/such/directory", "./nothing", "/no/such"]
)
def test_a_missing_path_is_named(name: str) -> None:
    """Goal: a path that is not there says so, and no hub is asked. Red when it went to the hub as an id."""
    with pytest.raises(DataError, match=r"no such (file|directory) \(looked in "):
        read_rows(name)


def test_arguments_without_meaning_are_refused(tmp_path: Path) -> None:
    """Goal: nothing is ignored silently, or sliced as Python would. Red without the checks."""
    path = write(tmp_path / "a.jsonl", {"a": 1})
    with pytest.raises(DataError, match=r"a \.jsonl file has no subsets"):
        read_rows(path, subset="main")
    for selection, message in (
        (Selection(max_samples=0), "max_samples=0"),
        (Selection(start=-1), "start=-1"),
        (Selection(start=3, stop=3), "stop=3, needs > start=3"),
        (Selection(step=0), "step=0"),
    ):
        with pytest.raises(DataError, match=rf"a\.jsonl: {message}"):
            read_rows(path, selection=selection)


def hub_layout(root: Path) -> Path:
    """A directory as a hub repository: two configurations, named in the card, train and test splits."""
    for subset in ("main", "other"):
        for split in ("train", "test"):
            write(
                root / subset / f"{split}.jsonl",
                *({"question": f"{subset} {split} {n}", "answer": "a"} for n in range(4)),
            )
    card = ["---", "configs:"]
    for subset in ("main", "other"):
        card += [f"- config_name: {subset}", "  data_files:"]
        card += [
            line
            for s in ("train", "test")
            for line in (f"  - split: {s}", f"    path: {subset}/{s}.jsonl")
        ]
    write(root / "README.md", *card, "---")
    return root


def test_a_directory_laid_out_as_on_the_hub(tmp_path: Path) -> None:
    """Goal: subset and split select, rows are named by file and line. Red with `split` not handed on."""
    root = hub_layout(tmp_path / "gsm")
    rows = read_rows(str(root), subset="other", split="test", selection=Selection(max_samples=2))
    assert [row.values["question"] for row in rows] == ["other test 0", "other test 1"]
    assert rows[1].where == f"{root}/other/test.jsonl:2"


@pytest.mark.parametrize(
    ("subset", "split"), [("main", "validation"), ("nope", "train"), (None, "train")]
)
def test_an_unknown_split_or_subset_is_named(
    tmp_path: Path, subset: str | None, split: str
) -> None:
    """Goal: the message has the directory, the split, the subset and what there is. Red as a bare ValueError."""
    root = hub_layout(tmp_path / "gsm")
    with pytest.raises(DataError) as caught:
        read_rows(str(root), subset=subset, split=split)
    for part in (str(root), repr(split), repr(subset), "check split and subset"):
        assert part in str(caught.value)
