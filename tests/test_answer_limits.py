"""Limits of the answers that the trainer gives itself: what the config allows, and configs from before the limits."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollouts.config import Config, ConfigError
from rollouts.config.answer_limits import AnswerLimits, answer_limits, row_tokens_max
from tests.example_config import example_config, replace_at

SAVED = "/runs/a/rollouts.jsonl"
ADDED = ("in_process_rows", "in_process_new_tokens", "in_process_batch_tokens")


def config_with(**changes: Any) -> Config:
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path.replace("__", "."), value)
    return config


@pytest.mark.parametrize(
    ("changes", "stage", "answers"),
    [
        ({}, "sft", True),
        ({}, "rl", False),  # the engine does
        ({"output__mode": "rl"}, "sft", False),
        ({"rl__sampling__source": SAVED}, "rl", True),
        ({"eval__in_process_rows": 0}, "sft", False),
        ({"data__eval_mixture": []}, "sft", False),
        ({"data__eval_mixture.0.format": "text"}, "sft", False),
    ],
)
def test_who_answers_in_process(changes: dict[str, Any], stage: Any, answers: bool) -> None:
    """Goal: limits exist where a stage answers without an engine, and only there. Red with the engine left out."""
    assert (answer_limits(config_with(**changes), stage) is not None) is answers


def test_answers_are_as_long_in_both_stages() -> None:
    """Goal: rl.max_new_tokens (8) is the least of both, so that sft and rl are measured alike. Red with the field
    alone."""
    for new_tokens, expected in ((5, 5), (100, 8)):
        limits = answer_limits(config_with(eval__in_process_new_tokens=new_tokens), "sft")
        assert limits is not None and limits.new_tokens == expected
    alone = config_with(output__mode="sft", rl=None, eval__in_process_new_tokens=100)
    assert row_tokens_max(alone) == 64 + 100
    assert row_tokens_max(config_with(eval__num_samples=4)) == 64 * 4


def test_what_is_sampled_at_most() -> None:
    """Goal: rows, greedy and sampled, times tokens; a limit above the rows counts no more than there are."""
    limits = AnswerLimits(rows=10, samples=3, new_tokens=7, batch_rows=256, batch_tokens=100)
    assert limits.new_tokens_max(8) == 8 * 4 * 7
    assert limits.new_tokens_max(500) == 10 * 4 * 7


def written(directory: Path, leave_out: tuple[str, ...], **changes: Any) -> Path:
    data = config_with(**changes).to_json()
    for key in leave_out:
        del data["eval"][key]
    path = directory / "config.json"
    path.write_text(json.dumps(data))
    return path


def test_a_config_of_an_earlier_run_loads(tmp_path: Path) -> None:
    """Goal: it has what that run had, no limit, and says so. Red with the fields missing."""
    said: list[str] = []
    assert Config.load(written(tmp_path, ADDED), said.append) == config_with(
        eval__in_process_new_tokens=8
    )
    assert len(said) == 1
    alone = Config.load(written(tmp_path, ADDED, output__mode="sft", rl=None))
    assert alone.eval.in_process_new_tokens == alone.data.max_length


def test_a_field_that_was_forgotten_is_named(tmp_path: Path) -> None:
    """Goal: one of the three missing is a mistake, not an earlier version. Red with each filled in by itself."""
    with pytest.raises(
        ConfigError, match=r"config.eval.in_process_rows: missing; EvalConfig has no defaults"
    ):
        Config.load(written(tmp_path, ADDED[:1]))
