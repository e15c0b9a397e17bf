"""The shipped nanochat mixture over small local directories of the same names and layouts as the hub's."""

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from base_config import DatasetSpec, load_config
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat import Rendering
from rollouts.training.datasets.dataset_loaders import (
    load_examples,
    load_prompt_mixture,
    load_sft_mixture,
)
from tests.training.datasets.families import family_tokenizer
from tests.training.datasets.hub import write_hub_dataset, write_parquet
from tests.training.datasets.test_chat import trained_spans

ROOT = Path(__file__).resolve().parents[3]
CONFIG = load_config(ROOT / "configs" / "nanochat_sft_rl.py")
SIZES = {"ARC-Easy": 23, "ARC-Challenge": 11, "main": 30, "smoltalk": 40}


def arc(subset: str, count: int) -> list[dict[str, Any]]:
    choices = {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}
    return [
        {
            "id": f"{subset}_{n}",
            "question": f"{subset} {n}?",
            "choices": choices,
            "answerKey": "ABC"[n % 3],
        }
        for n in range(count)
    ]


def gsm8k(split: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"{split} {n}?",
            "answer": f"It is {n}+1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}",
        }
        for n in range(count)
    ]


def smoltalk(count: int) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": "Be kind."}]
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
    return [
        {"messages": [*(system if n % 4 == 0 else []), *turns, *turns], "source": f"s{n}"}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the config's names lie; a local directory goes before a hub id of its name."""
    root = tmp_path_factory.mktemp("hub")
    subsets = ("ARC-Easy", "ARC-Challenge")
    write_hub_dataset(
        root / "allenai" / "ai2_arc",
        {
            subset: {"train": arc(subset, SIZES[subset]), "test": arc(subset, 5)}
            for subset in subsets
        },
    )
    write_hub_dataset(
        root / "openai" / "gsm8k",
        {"main": {"train": gsm8k("train", SIZES["main"]), "test": gsm8k("test", 4)}},
    )
    write_parquet(
        root / "HuggingFaceTB" / "smol-smoltalk" / "data", "train", smoltalk(SIZES["smoltalk"]), 3
    )
    (root / "configs" / "data").mkdir(parents=True)
    shutil.copytree(ROOT / "configs" / "data" / "identity", root / "configs" / "data" / "identity")
    return root


@pytest.fixture
def here(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(hub / "cache"))


def specs(**changes: Any) -> list[DatasetSpec]:
    return [replace(spec, **changes) for spec in CONFIG.data.sft_mixture]


def test_the_declared_mixture_is_nanochats() -> None:
    """Goal: tasks, slices and shuffles of the recipe. Red with SmolTalk unsliced, or a hub set unshuffled."""
    declared = [
        (spec.name, spec.subset, spec.format, spec.shuffle_seed, spec.stop) for spec in specs()
    ]
    assert declared == [
        ("allenai/ai2_arc", "ARC-Easy", "multiple_choice", 42, -1),
        ("allenai/ai2_arc", "ARC-Challenge", "multiple_choice", 42, -1),
        ("openai/gsm8k", "main", "gsm8k_calculator", 42, -1),
        ("HuggingFaceTB/smol-smoltalk", None, "smoltalk", 42, 10_000),
        ("configs/data/identity/train.jsonl", None, "custom_json", None, -1),
        ("simple_spelling", None, "simple_spelling", None, 300),
        ("spelling_bee", None, "spelling_bee", None, 300),
    ]
    assert CONFIG.data.shuffle_seed == 42 and all(
        spec.repeat == 1 and spec.split == "train" for spec in specs()
    )


def test_every_task_renders_and_nothing_is_lost(here: None) -> None:
    """Goal: the whole mixture through one real kind of template: all rows, each task's text, the order of nanochat's
    `random.Random(42)` over (task, index), each set shuffled by 42 first. Red with `stop` left out of the selection.
    """
    chosen = [replace(spec, stop=25) if spec.format == "smoltalk" else spec for spec in specs()]
    samples, report = load_sft_mixture(
        chosen, tokenizer=family_tokenizer("qwen2_5"), max_length=CONFIG.data.max_length, seed=42
    )
    assert (
        report.left_out == {}
        and report.kept == len(samples) == 23 + 11 + 30 + 25 + 1000 + 300 + 300
    )
    counts = Counter(sample.prompt["format"] for sample in samples)  # type: ignore[index]
    assert (
        counts["multiple_choice"] == 34
        and counts["smoltalk"] == 25
        and counts["custom_json"] == 1000
    )

    loaded = [load_examples(spec) for spec in chosen]
    order = [
        (task, index) for task, examples in enumerate(loaded) for index in range(len(examples))
    ]
    random.Random(42).shuffle(order)
    assert [sample.prompt for sample in samples] == [
        loaded[task][index].prompt for task, index in order
    ]
    expected = datasets.Dataset.from_list(arc("ARC-Easy", 23)).shuffle(seed=42)["id"][:]
    assert [example.prompt["id"] for example in loaded[0]] == expected


def test_what_is_trained_of_a_calculator_call(here: None) -> None:
    """Goal: text, call and end marker 1; the tool's output and all else 0. Red with the tool's message trained."""
    tokenizer = family_tokenizer("qwen2_5")
    (spec,) = [replace(spec, stop=1) for spec in specs() if spec.format == "gsm8k_calculator"]
    (sample,), _ = load_sft_mixture([spec], tokenizer=tokenizer, max_length=-1, seed=None)
    question = sample.prompt["messages"][0]["content"]  # type: ignore[index]
    number = int(question.removeprefix("train ").removesuffix("?"))
    assert trained_spans(tokenizer, Rendering(sample.tokens, sample.loss_mask, ())) == [
        f"It is {number}+1 = \n<tool_call>\n"
        f'{{"name": "calculator", "arguments": {{"expression": "{number}+1"}}}}\n</tool_call><|im_end|>',
        f"{number + 1}.\n#### {number + 1}<|im_end|>",
    ]
    text = tokenizer.decode(sample.tokens)
    assert (
        f"<tool_response>\n{number + 1}\n</tool_response>" in text
        and '"name": "calculator", "description"' in text
    )


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "smollm",
            r"train-00000-of-00001\.parquet row \d+: the chat template leaves out the tool 'calculator'",
        ),
        (
            "llama3",
            r"train-00000-of-00001\.parquet row \d+: messages\[1\]: the chat template leaves out content",
        ),
    ],
)
def test_a_template_without_calculator_calls_is_named(
    here: None, family: str, message: str
) -> None:
    """Goal: a template that drops a call, or the text beside it, stops the run and names the row, never trains less.

    Red without the checks: SmolLM's trained half a solution, Llama's a call out of nowhere.
    """
    (spec,) = [spec for spec in specs() if spec.format == "gsm8k_calculator"]
    with pytest.raises(DataError, match=message):
        load_sft_mixture([spec], tokenizer=family_tokenizer(family), max_length=-1, seed=0)


def test_rl_and_evaluation_have_prompts_with_answers(here: None) -> None:
    """Goal: every row that RL and evaluation ask has what its reward reads. Red with text rows among them."""
    rows = load_prompt_mixture(CONFIG.data.rl_mixture, seed=42)
    assert len(rows) == 30 and all(row["answer"].isdigit() and "tools" not in row for row in rows)
    evaluated = load_prompt_mixture(CONFIG.data.eval_mixture, seed=42)
    assert Counter(row["format"] for row in evaluated) == {
        "multiple_choice": 10,
        "gsm8k": 4,
        "simple_spelling": 100,
    }
    assert all(row["answer"] for row in evaluated)
