"""load_sft_dataset, load_prompts_from_jsonl and mixtures, over files."""

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from rollouts import training
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.dataset_loaders import (
    DatasetEntry,
    load_prompt_mixture,
    load_prompts_from_jsonl,
    load_sft_dataset,
    load_sft_mixture,
)
from tests.example_config import example_config
from tests.training.datasets.hub import write_hub_dataset
from tests.training.tiny_task import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(path: Path, tag: str, count: int) -> str:
    return write(path, [{"question": f"{tag}{index}", "answer": "x"} for index in range(count)])


def test_samples_hold_tokens_mask_and_prompt(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: what the SFT loop needs, exactly. Red with the end token not trained."""
    path = write(tmp_path / "a.jsonl", [{"question": "abc", "answer": "cba"}])
    (sample,) = load_sft_dataset(path, tokenizer=tokenizer)
    assert tokenizer.decode(sample.tokens) == "<|user|>abc<|end|><|assistant|>cba<|end|>"
    assert sample.loss_mask == [0.0] * 6 + [1.0] * 4
    assert sample.response == "cba" and sample.response_length == 4
    assert isinstance(sample.prompt, dict) and sample.prompt["answer"] == "cba"
    assert sample.metadata["where"] == f"{path}:1"


def test_a_file_a_directory_and_a_hub_layout_read_alike(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: the same rows give the same samples wherever they lie. Red with the directory read in another split."""
    rows = [{"question": f"q{index}", "answer": "a"} for index in range(5)]
    file, directory = write(tmp_path / "f.jsonl", rows), tmp_path / "d"
    write(directory / "train.jsonl", rows)
    write(directory / "test.jsonl", rows[:1])
    tokens = [
        [sample.tokens for sample in load_sft_dataset(name, tokenizer=tokenizer)]
        for name in (file, str(directory))
    ]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 5


def test_the_library_pages_call(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: what users write, as they write it; the directory stands in for the hub's. Red with `subset` dropped."""
    rows = [{"question": f"q{n}", "answer": f"It is {n}. #### {n}"} for n in range(1100)]
    write_hub_dataset(
        tmp_path / "gsm8k", {"main": {"train": rows}, "socratic": {"train": rows[:1]}}
    )
    monkeypatch.chdir(tmp_path)
    samples = training.load_sft_dataset(
        "gsm8k",
        tokenizer=tokenizer,
        split="train",
        subset="main",
        max_samples=1000,
        max_length=2048,
    )
    assert len(samples) == 1000 and samples[999].prompt["answer"] == "999"
    assert (
        tokenizer.decode(samples[7].tokens)
        == "<|user|>q7<|end|><|assistant|>It is 7. #### 7<|end|>"
    )


def test_what_is_left_out_is_counted_by_reason_and_logged(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Goal: nothing is cut or dropped silently. Red when a long example was truncated, and when nothing was logged."""
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    long = {"role": "assistant", "content": "y" * 50}
    path = write(
        tmp_path / "a.jsonl",
        [
            {"messages": [user, assistant]},
            {"messages": [user, long]},
            {"messages": [user]},
            {"messages": [user, long]},
        ],
    )
    spec = DatasetEntry(path, "messages")
    samples, report = load_sft_mixture([spec], tokenizer=tokenizer, max_length=20, seed=0)
    assert len(samples) == report.kept == 1
    assert report.left_out == {
        "longer than max_length=20 tokens": 2,
        "no trained token (no assistant turn)": 1,
    }
    assert report.trained_tokens == 3 and report.total_tokens == 8
    assert f"{path}:3" in str(report)
    with caplog.at_level(logging.WARNING):
        assert len(load_sft_dataset(path, tokenizer=tokenizer, max_length=20)) == 1
    assert "left out 2: longer than max_length=20 tokens" in caplog.text


def test_an_example_of_exactly_max_length_stays(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: the limit is inclusive. Red with >=."""
    path = write(tmp_path / "a.jsonl", [{"question": "abc", "answer": "cba"}])  # 10 tokens
    assert len(load_sft_dataset(path, tokenizer=tokenizer, max_length=10)) == 1
    with pytest.raises(
        DataError, match=r"no example is left to train on: .*left out 1: longer than max_length=9"
    ):
        load_sft_dataset(path, tokenizer=tokenizer, max_length=9)


def test_a_mixture_is_one_seeded_shuffle_with_repeats(tmp_path: Path) -> None:
    """Goal: every row `repeat` times, the first max_samples rows only, order by the seed alone. Red without repeat."""
    spec = example_config().data.sft_mixture[0]
    specs = [
        replace(
            spec,
            name=questions(tmp_path / f"{tag}.jsonl", tag, 10),
            max_samples=count,
            repeat=repeat,
        )
        for tag, count, repeat in (("a", 4, 2), ("b", -1, 1))
    ]
    texts = [row["messages"][0]["content"] for row in load_prompt_mixture(specs, seed=7)]
    assert Counter(texts) == {**{f"a{n}": 2 for n in range(4)}, **{f"b{n}": 1 for n in range(10)}}
    assert texts == [row["messages"][0]["content"] for row in load_prompt_mixture(specs, seed=7)]
    assert texts != [row["messages"][0]["content"] for row in load_prompt_mixture(specs, seed=8)]
    assert texts != sorted(texts)


def test_sft_and_prompts_of_a_mixture_come_in_the_same_order(
    tmp_path: Path, tokenizer: Any
) -> None:
    """Goal: one shuffle, whatever is made of the rows. Red when SFT shuffled after tokenizing, by another stream."""
    spec = DatasetEntry(questions(tmp_path / "a.jsonl", "a", 12), "question_answer")
    samples, _ = load_sft_mixture([spec], tokenizer=tokenizer, max_length=64, seed=3)
    assert [sample.prompt for sample in samples] == load_prompt_mixture([spec], seed=3)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("start", 4, [4, 5]),
        ("stop", 2, [0, 1]),
        ("step", 3, [0, 3]),
        ("max_samples", 1, [0]),
        ("repeat", 2, [0, 1, 2, 3, 4, 5] * 2),
        ("shuffle_seed", 3, np.random.default_rng(3).permutation(6).tolist()),
        ("split", "test", [6]),
        ("subset", "other", [7]),
    ],
)
def test_each_field_of_a_spec_chooses_rows(
    tmp_path: Path, tokenizer: Any, field: str, value: Any, expected: list[int]
) -> None:
    """Goal: what the config says is what is read. Red for each field when it was not handed on."""
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(8)]
    subsets = {"main": {"train": rows[:6], "test": rows[6:7]}, "other": {"train": rows[7:]}}
    root = write_hub_dataset(tmp_path / "set", subsets)
    spec = replace(
        example_config().data.sft_mixture[0], name=str(root), **{"subset": "main", field: value}
    )
    for chosen in (spec, replace(spec, streaming=True)):
        samples, _ = load_sft_mixture([chosen], tokenizer=tokenizer, max_length=64, seed=None)
        found = [int(sample.prompt["messages"][0]["content"][1:]) for sample in samples]
        assert sorted(found) == sorted(expected)
        assert found == expected or chosen.streaming  # a stream is shuffled in another way


def test_streaming_makes_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a set too large for the disk can be read. Red when `streaming` of the spec was not handed on."""
    root = write_hub_dataset(
        tmp_path / "set", {"main": {"train": [{"question": "q", "answer": "a"}]}}
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for streaming in (True, False):
        load_prompt_mixture(
            [DatasetEntry(str(root), None, subset="main", streaming=streaming)], seed=0
        )
        assert bool(list(tmp_path.rglob("*.arrow"))) is not streaming


def test_a_mixture_without_a_seed_is_a_curriculum(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: nanochat's task sequence: as listed, each data set whole. Red when None seeded a shuffle."""
    easy, hard = (questions(tmp_path / f"{tag}.jsonl", tag, 3) for tag in ("e", "h"))
    specs = [DatasetEntry(easy, None, repeat=2), DatasetEntry(hard, None, start=1)]
    samples, _ = load_sft_mixture(specs, tokenizer=tokenizer, max_length=64, seed=None)
    texts = [sample.prompt["messages"][0]["content"] for sample in samples]
    assert texts == ["e0", "e1", "e2", "e0", "e1", "e2", "h1", "h2"]


def test_custom_json_has_an_array_on_each_line(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: nanochat's identity file. Red when a line had to be an object, and when one was taken in silence."""
    turns = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
    path = tmp_path / "identity.jsonl"
    path.write_text(json.dumps(turns) + "\n" + json.dumps([*turns, *turns]) + "\n")
    samples = load_sft_dataset(str(path), tokenizer=tokenizer, format="custom_json")
    assert [sample.prompt["messages"] for sample in samples] == [turns[:1], [*turns, turns[0]]]
    assert load_prompts_from_jsonl(path, "custom_json") == [sample.prompt for sample in samples]
    with pytest.raises(
        DataError, match=r"identity\.jsonl:1: needs one JSON object per line, found list"
    ):
        load_sft_dataset(str(path), tokenizer=tokenizer)
    write(path, [{"messages": turns}])
    with pytest.raises(
        DataError, match=r"identity\.jsonl:1: needs one JSON array of messages per line, found dict"
    ):
        load_sft_dataset(str(path), tokenizer=tokenizer, format="custom_json")


def test_text_and_conversations_in_one_mixture(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: plain text trains beside chats, and is no prompt. Red when a text without messages became one."""
    text = DatasetEntry(write(tmp_path / "t.jsonl", [{"text": "abc" * 9}]), "text")
    chats = DatasetEntry(questions(tmp_path / "a.jsonl", "a", 2), None)
    samples, report = load_sft_mixture([text, chats], tokenizer=tokenizer, max_length=16, seed=0)
    assert len(samples) == 4 and report.texts_split == 1 and report.pieces == 2
    with pytest.raises(DataError, match=r"t\.jsonl:1: plain text has no prompt to answer"):
        load_prompt_mixture([chats, text], seed=0)


def test_a_synthetic_task_in_a_mixture() -> None:
    """Goal: its slice, split and repeat count like any other's. Red when `start` was left out."""
    spec = DatasetEntry("spelling", "simple_spelling", start=2, max_samples=2, repeat=2)
    whole = DatasetEntry("spelling", "simple_spelling", stop=4)
    rows, all_rows = (load_prompt_mixture([entry], seed=0) for entry in (spec, whole))
    assert len(rows) == 4 and len(all_rows) == 4
    assert {row["answer"] for row in rows} < {row["answer"] for row in all_rows}
    assert {row["answer"] for row in rows} & {
        row["answer"] for row in load_prompt_mixture([replace(whole, split="test")], seed=0)
    } == set()


def test_an_empty_mixture_and_a_bad_repeat_are_errors(tmp_path: Path) -> None:
    """Goal: no training on nothing. Red without the checks."""
    with pytest.raises(DataError, match="the mixture is empty"):
        load_prompt_mixture([], seed=0)
    spec = DatasetEntry(questions(tmp_path / "a.jsonl", "a", 2), "question_answer", repeat=0)
    with pytest.raises(DataError, match="repeat=0"):
        load_prompt_mixture([spec], seed=0)


def test_prompts_from_jsonl(tmp_path: Path) -> None:
    """Goal: three kinds of lines, in file order, other columns kept. Red when rows without an answer were refused."""
    user = [{"role": "user", "content": "hi"}]
    path = write(
        tmp_path / "p.jsonl",
        [{"prompt": "hi", "level": 2}, {"messages": user}, {"question": "hi", "answer": "yo"}],
    )
    assert load_prompts_from_jsonl(path) == [
        {"messages": user, "level": 2},
        {"messages": user, "format": "messages"},
        {"messages": user, "answer": "yo", "format": "question_answer"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " "}, ":1: prompt=' '; needs a string"),
        ({"text": "x"}, ":1: plain text has no prompt"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    """Goal: file, line, value, need. Red when an empty prompt was taken."""
    with pytest.raises(DataError, match=message):
        load_prompts_from_jsonl(write(tmp_path / "p.jsonl", [row]))
    with pytest.raises(DataError, match=r"needs a \.jsonl file"):
        load_prompts_from_jsonl(tmp_path / "p.txt")
