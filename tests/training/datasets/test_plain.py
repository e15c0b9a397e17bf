"""Rows are plain data as they load, or an error that names row and column; nothing of a .jsonl line is guessed."""

import datetime
import decimal
import json
import uuid
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from rollouts.data_formats.row import DataError
from rollouts.training.datasets import load_sft_dataset
from rollouts.training.datasets.chat import render_conversation, render_prompt
from rollouts.training.datasets.dataset_loaders import DatasetEntry, load_prompt_mixture
from rollouts.training.datasets.plain import to_plain
from rollouts.training.datasets.rows import read_rows
from tests.training.datasets.families import FAMILIES, TOOLS
from tests.training.tiny_task import tiny_tokenizer

UTC = datetime.UTC
ZONE = datetime.timezone(datetime.timedelta(hours=2))


def parquet(directory: Path, **columns: Any) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), directory / "train.parquet")
    return str(directory)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (datetime.datetime(2024, 5, 1, 12, 30), pyarrow.timestamp("us"), "2024-05-01T12:30:00"),
        (
            datetime.datetime(2024, 5, 1, tzinfo=UTC),
            pyarrow.timestamp("ns", "UTC"),
            "2024-05-01T00:00:00+00:00",
        ),
        (datetime.date(2024, 5, 1), pyarrow.date32(), "2024-05-01"),
        (datetime.time(12, 30, 1), pyarrow.time64("us"), "12:30:01"),
        (datetime.timedelta(minutes=2), pyarrow.duration("s"), 120.0),
        (decimal.Decimal("72.50"), pyarrow.decimal128(10, 2), "72.50"),
        (decimal.Decimal("72.00"), pyarrow.decimal128(10, 2), "72"),
        ({"when": [datetime.date(2024, 5, 1)]}, None, {"when": ["2024-05-01"]}),
        ({"a": None, "b": [{"c": None, "d": 1}]}, None, {"b": [{"d": 1}]}),
    ],
)
def test_rows_of_parquet_are_plain(tmp_path: Path, value: Any, kind: Any, expected: Any) -> None:
    """Goal: what a prompt holds can be written as JSON, from the first row on. Red: a TypeError after sampling."""
    column = pyarrow.array([value], kind) if kind is not None else pyarrow.array([value])
    name = parquet(tmp_path / "set", question=["q"], answer=["a"], extra=column)
    (row,) = load_prompt_mixture([DatasetEntry(name, "question_answer")], seed=0)
    assert row["extra"] == expected and json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_missing_number_is_missing(tmp_path: Path) -> None:
    """Goal: pandas writes a gap as NaN, in parquet and in JSON lines. Red: a bare NaN reached the run's files; a
    file of JSON lines was refused whole."""
    name = parquet(
        tmp_path / "set", question=["q", "r"], answer=["a", "b"], level=[float("nan"), 2.0]
    )
    assert [row.values.get("level") for row in read_rows(name)] == [None, 2.0]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"question": "q", "level": NaN}\n{"question": "r", "level": 2.0}\n')
    assert [row.values.get("level") for row in read_rows(str(lines))] == [None, 2.0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"\x89PNG"]}, r"train.parquet row 0: column 'image' holds 4 bytes"),
        ({"meta": [{"raw": [b"x", b"yz"]}]}, r"row 0: column 'meta'\['raw'\]\[0\] holds 1 bytes"),
        ({"score": [float("inf")]}, r"row 0: column 'score' is inf, which JSON cannot hold"),
    ],
)
def test_what_has_no_plain_form_is_named(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    """Goal: row, column and fix before anything trains. Red: the checkpoint after the first update failed."""
    with pytest.raises(DataError, match=message):
        read_rows(parquet(tmp_path / "set", question=["q"], answer=["a"], **columns))


def test_numpys_and_others_values_are_plain() -> None:
    """Goal: rows that a script makes, too. Red: numpy's scalars were passed on."""
    identity = uuid.UUID(int=5)
    made = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "b": np.bool_(True),
        "list": np.arange(2),
        "t": (1, 2),
        "id": identity,
    }
    plain = to_plain({**made, "s": np.str_("a"), "when": pandas.Timestamp("2024-05-01")})
    expected = {
        "n": 3,
        "x": 0.5,
        "b": True,
        "list": [0, 1],
        "t": [1, 2],
        "id": str(identity),
        "s": "a",
    }
    assert plain == {**expected, "when": "2024-05-01T00:00:00"}
    assert (
        json.loads(json.dumps(plain)) == plain
        and type(plain["n"]) is int
        and type(plain["s"]) is str
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            r'{"question": "a\ud83d b", "answer": "x"}',
            r":2: column 'question' has half of a surrogate pair, \\ud83d",
        ),
        (
            r'{"question": "q", "answer": "x", "tags": [{"k": "\udc00"}]}',
            r":2: column 'tags'\[0\]\['k'\] has half",
        ),
        (r'{"question": "q", "answer": "x", "\ud800": 1}', ":2: .*half of a surrogate pair"),
        (
            '{"question": "q", "answer": "x", "n": ' + "9" * 5000 + "}",
            ":2: a number that cannot be read",
        ),
        (
            '{"question": "q", "answer": "x", "n": ' + "[" * 900 + "]" * 900 + "}",
            ":2: lists and objects within each",
        ),
        ('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", ":2: lists and objects within each"),
        ('{"question": "q", "answer": "x", "n": [-Infinity]}', ":2: not JSON: -Infinity"),
        ('{"question": "q", "answer": "x", "n": 1e999}', ":2: the number 1e999 is too large"),
        ('{"question": "q", "answer": "x", "answer": "y"}', ":2: the key 'answer' occurs twice"),
        ('{"question": "q", "answer": "x"} {}', ":2: not JSON: Extra data"),
    ],
)
def test_a_line_that_would_have_to_be_guessed_is_named(
    tmp_path: Path, line: str, message: str
) -> None:
    """Goal: file and line for all that no reader can take as it stands. Red: TypeError of the tokenizer for one row of
    256, ValueError, RecursionError; the others were taken in silence."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load_sft_dataset(str(path), tokenizer=tiny_tokenizer())
    assert str(caught.value).startswith(f"{path}:2: ") and len(str(caught.value)) < 1000


def test_line_ends_marks_and_whole_pairs_are_no_errors(tmp_path: Path) -> None:
    """Goal: files as Windows and other tools write them. Red: a byte order mark was "not JSON"."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"q": "a"}\r\n\r\n  \r\n{"q": "\\ud83d\\ude42"}\r\n{"q": "x\xe2\x80\xa8y"}'
    )
    rows = read_rows(str(path))
    assert [row.values["q"] for row in rows] == ["a", "🙂", "x\u2028y"]
    assert [row.where for row in rows] == [f"{path}:{number}" for number in (1, 4, 5)]


def test_bytes_of_another_encoding_are_named(tmp_path: Path) -> None:
    """Goal: Latin-1 and UTF-16 say so, with the line. Red without the line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"q": "a"}\n{"q": "caf\xe9"}\n')
    with pytest.raises(
        DataError,
        match=rf"cannot be read as UTF-8 text: {path}:2 has the byte 0xe9 at character 11",
    ):
        read_rows(str(path))
    path.write_text('{"q": "a"}', encoding="utf-16")
    with pytest.raises(DataError, match=r"a.jsonl:1 has the byte 0xff"):
        read_rows(str(path))


def test_half_a_character_in_memory_is_named() -> None:
    """Goal: conversations that a script makes, too. Red: TypeError: TextEncodeInput must be Union."""
    messages = [{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"f:1: .*half of a surrogate pair"):
        render_conversation(tiny_tokenizer(), messages, "f:1")
    with pytest.raises(DataError, match=r"prompt: .*half of a surrogate pair"):
        render_prompt(tiny_tokenizer(), "a\ud83d")


ARGUMENTS = {"unit": None, "city": "Paris", "days": [None, 1]}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"type": "string", "default": None}},
        },
    },
}


@pytest.mark.parametrize("as_text", [False, True])
def test_null_is_a_value_where_nobody_padded(tmp_path: Path, as_text: bool) -> None:
    """Goal: rows of .jsonl and JSON text are trained as `apply_chat_template` renders them, nulls and all; a file's
    padding of properties goes. Red: {"city": "Paris"} alone, and no default."""
    tokenizer = FAMILIES["qwen2_5"].tokenizer()
    call = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    row: dict[str, Any] = {"messages": messages, "tools": [SCHEMA]}
    expected = tokenizer.apply_chat_template(messages, tools=[SCHEMA], return_dict=False)
    if as_text:
        stored = {**call, "function": {**call["function"], "arguments": json.dumps(ARGUMENTS)}}
        row = {
            "messages": [messages[0], {**messages[1], "tool_calls": [stored]}],
            "tools": json.dumps([SCHEMA]),
        }
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    (sample,) = load_sft_dataset(str(path), tokenizer=tokenizer)
    assert sample.tokens == expected
    assert '"default": null' in tokenizer.decode(expected) and '"unit": null' in tokenizer.decode(
        expected
    )
    padded = json.loads(json.dumps(SCHEMA))
    padded["function"]["parameters"]["properties"]["x"] = None
    assert render_prompt(tokenizer, {"messages": messages[:1], "tools": [padded]}) == render_prompt(
        tokenizer, {"messages": messages[:1], "tools": [SCHEMA]}
    )


def test_arrows_padding_goes(tmp_path: Path) -> None:
    """Goal: rows of parquet render as they were before Arrow gave each the keys of all. Red without the stripping."""
    tokenizer = FAMILIES["qwen2_5"].tokenizer()
    calls = [
        {"function": {"name": "calculator", "arguments": {key: "1"}}}
        for key in ("expression", "other")
    ]
    rows = [
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [one]},
        ]
        for one in calls
    ]
    name = parquet(tmp_path / "set", messages=rows)
    samples = load_sft_dataset(name, tokenizer=tokenizer)
    assert [sample.tokens for sample in samples] == [
        tokenizer.apply_chat_template(messages, return_dict=False) for messages in rows
    ]
    assert TOOLS


def test_a_set_that_was_saved_to_disk_says_what_to_do(tmp_path: Path) -> None:
    """Goal: the fix is another way to save it. Red: "check split and subset"; and so for a type that nobody reads."""
    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"load_from_disk.*Fix: write it with to_parquet"):
        read_rows(str(tmp_path / "saved"))
    pairs = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    with pytest.raises(DataError, match="Fix: leave the column of that type out"):
        read_rows(parquet(tmp_path / "set", question=["q"], extra=pairs))
