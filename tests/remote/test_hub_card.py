"""Rows of folders laid out as on the hub, with a card: the plan counts what `datasets` would read, or says nothing."""

import dataclasses
from pathlib import Path

import pytest

from rollouts.remote.inputs.data_files import count_rows
from rollouts.remote.inputs.paths import SentFiles
from tests.example_config import example_config

FILES = {
    "main/train-00000-of-00002.jsonl": 3,
    "main/train-00001-of-00002.jsonl": 4,
    "main/test.jsonl": 2,
    "socratic/train.jsonl": 9,
    "extra.jsonl": 1,
}
AS_PUSHED = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test.jsonl
  default: true
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train.jsonl
dataset_info:
  config_name: main
  splits:
  - name: train
    num_examples: 99
---
# GSM8K
configs: none
"""
BY_HAND = """---
configs:
  - config_name: "default"   # quoted, further in
    data_files:
      - split: train
        path:
          - "main/train-00001-of-00002.jsonl"
          - 'extra.jsonl'
---
"""
ONE_PATTERN = '---\nconfigs:\n- config_name: default\n  data_files: "main/*.jsonl"\n---\n'
FLOW = "---\nconfigs: [{config_name: default, data_files: extra.jsonl}]\n---\n"
WITHOUT = "---\nlicense: mit\ntags: [a, b]\n---\n"
CASES = [  # card, subset, split, rows (None: not counted)
    (AS_PUSHED, "main", "train", 7),
    (AS_PUSHED, "main", "test", 2),
    (AS_PUSHED, None, "train", 7),
    (AS_PUSHED, "socratic", "train", 9),
    (AS_PUSHED, "socratic", "test", None),
    (AS_PUSHED, "other", "train", None),
    (BY_HAND, None, "train", 5),
    (ONE_PATTERN, None, "train", None),
    (FLOW, None, "train", None),
    (WITHOUT, None, "train", None),  # extra.jsonl is of no split by its name
    ("", None, "train", None),
]


@pytest.mark.parametrize(("card", "subset", "split", "rows"), CASES)
def test_the_plan_counts_what_datasets_would_read(
    tmp_path: Path, card: str, subset: str | None, split: str, rows: int | None
) -> None:
    """Goal: a card's configs decide, in files that are counted, not by the numbers that the card says; where it is not
    plain, nothing is said. Red with each folder that has a card left out: no rows were known."""
    for name, count in FILES.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text('{"question": "q", "answer": "a"}\n' * count)
    (tmp_path / "set" / "README.md").write_text(card)
    sent = SentFiles(
        tmp_path,
        [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()],
    )
    spec = dataclasses.replace(
        example_config().data.rl_mixture[0], name="set", split=split, subset=subset
    )
    assert count_rows(spec, sent).rows == rows
    if rows is not None:
        import datasets

        found = datasets.load_dataset_builder(str(tmp_path / "set"), name=subset).config.data_files[
            split
        ]
        inside = [str(Path(file).relative_to(tmp_path / "set")) for file in found]
        assert sum(FILES[file] for file in inside) == rows
