"""A new data format is a function and a declaration, in one file: every part that asks reads them there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollouts.data_formats import FORMAT_NAMES, FORMATS, format_named, format_shown
from rollouts.data_formats.row import DataError, Row
from rollouts.remote.inputs.row_values import row_problem
from rollouts.training.rewards import is_correct, resolve
from rollouts.training.types import Sample
from tests.docs_blocks import ROOT

FUNCTION = """
def _prompt_completion(row: Row, others: dict[str, Any], name: str) -> Example:
    answer = row.values["completion"]
    turns = [_user(row.values["prompt"]), _assistant(answer)]
    return conversation_example(row.where, turns, others, format=name, answer=answer)

"""
DECLARATION = """FORMATS: tuple[DataFormat, ...] = (
    DataFormat(
        name="prompt_completion",
        columns={"prompt": "text", "completion": "text"},
        example=_prompt_completion,
        known_by=("prompt", "completion"),
        judge="choice_letter",
        usual_reward="rollouts.training.rewards.exact_match",
    ),
"""
ASKED = """
import json, sys
from pathlib import Path
from base_config import changed, load_config
from rollouts.remote.inputs.data_files import absent_columns
from rollouts.remote.inputs.paths import SentFiles
from rollouts.remote.inputs.row_values import row_problem
from rollouts.remote.new_config import data_choice
from rollouts.training.datasets.dataset_loaders import DatasetEntry, load_examples
from rollouts.training.rewards import is_correct
from rollouts.training.types import Sample

config = load_config("configs/00_cpu_sft_rl.py")
config = changed(config, {"data.rl_mixture.0.format": "prompt_completion", "data.rl_mixture.0.name": "mine.jsonl"})
sent = SentFiles(Path.cwd(), ["mine.jsonl"])
(example,) = load_examples(DatasetEntry("mine.jsonl", None))
print(json.dumps({
    "problems": config.problems(),
    "another": changed(config, {"data.rl_mixture.0.format": "prompt_completon"}).problems(),
    "new": data_choice("mine.jsonl", None).format,
    "empty": row_problem("prompt_completion", {"prompt": "2 + 2?", "completion": " "}),
    "absent": absent_columns(config.data.rl_mixture, ["prompt", "level"], sent),
    "prompt": example.prompt,
    "judged": is_correct(Sample(prompt=example.prompt, response="(4)")),
}))
"""


def test_one_declaration_is_a_whole_format(tmp_path: Path) -> None:
    """Goal: config, `deploy new`, the look at rows before a run, the trainer's reader and the judge know a format from
    its declaration alone. Red with the keys that hold a text listed beside the look at rows: an empty completion
    passed."""
    for name in ("rollouts", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "base_config.py", tmp_path)
    formats = tmp_path / "rollouts" / "data_formats" / "formats.py"
    head, start, declared = formats.read_text().partition("FORMATS: tuple[DataFormat, ...] = (\n")
    assert start
    formats.write_text(head + FUNCTION + DECLARATION + declared)
    row = {"prompt": "2 + 2?", "completion": "4", "level": 3}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    command = [sys.executable, "-c", ASKED]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    (another,) = said.pop("another")
    assert "did you mean 'prompt_completion'?" in another
    assert said == {
        "problems": [],
        "new": "prompt_completion",
        "empty": "completion=' '; format 'prompt_completion' needs a text that is not empty",
        "absent": ["prompt"],
        "prompt": {
            "level": 3,
            "format": "prompt_completion",
            "messages": [{"role": "user", "content": "2 + 2?"}],
            "answer": "4",
        },
        "judged": 1.0,
    }


def a_row(name: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "text": "12 #### 12",
        "text or empty": "once",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "choices": {"text": ["a"], "label": ["12 #### 12"]},
    }
    return {column: values[kind] for column, kind in format_named(name).columns.items()}


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("wrong", [None, 3, "", " "])
def test_the_look_before_a_run_and_the_trainer_agree_on_texts(name: str, wrong: Any) -> None:
    """Goal: a text that the trainer refuses is a problem before anything is sent, for each column of each format. Red
    with `text_needed` asked by one of the two alone."""
    declared = format_named(name)
    whole = a_row(name)
    declared.read(Row("f.jsonl:1", whole))
    assert not row_problem(name, next(iter(whole.values())) if declared.is_array else whole)
    for column, kind in declared.columns.items():
        if kind not in ("text", "text or empty"):
            continue
        row = {**whole, column: wrong}
        if isinstance(wrong, str) and kind == "text or empty":
            declared.read(Row("f.jsonl:1", row))
            assert row_problem(name, row) == ""
            continue
        with pytest.raises(DataError, match=f"^f.jsonl:1: {column}={wrong!r}; format '{name}'"):
            declared.read(Row("f.jsonl:1", row))
        assert row_problem(name, row).startswith(f"{column}={wrong!r}; format '{name}'")


def test_declarations_name_what_there_is() -> None:
    """Goal: a declaration's judge and usual reward are found before anybody trains. Red with a judge of another
    name: KeyError on import."""
    assert len(FORMAT_NAMES) == len(FORMATS), "each name once"
    for declared in FORMATS:
        prompt = {"format": declared.name, "answer": "4"}
        assert is_correct(Sample(prompt=prompt, response="#### 4")) in (0.0, 1.0)
        if declared.usual_reward is not None:
            resolve(declared.usual_reward)
        assert set(declared.known_by) <= set(declared.columns), declared.name


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (
            [{"question": "a", "answer": "b #### 2"}, {"question": "a", "answer": "2"}],
            "question_answer",
        ),
        ([{"question": "a", "answer": "b #### two"}], "question_answer"),
        ([{"question": "a", "answer": "b", "choices": {}}], "multiple_choice"),
        ([{"question": "a"}], None),
        ([{"messages": [], "text": "a"}], "messages"),
        ([[], {"text": "a"}], None),
        (["text"], None),
        ([None], None),
    ],
)
def test_the_format_that_all_rows_show(rows: list[Any], name: str | None) -> None:
    """Goal: `deploy new` and the library tell a format by one rule, and none is guessed at. Red with the first row
    looked at alone."""
    found = format_shown(rows)
    assert (found.name if found else None) == name
