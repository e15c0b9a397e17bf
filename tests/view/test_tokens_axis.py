"""Runs over the tokens that they trained on."""

import random
from pathlib import Path

import pytest

from rollouts.remote import report_verbs
from rollouts.remote.errors import DeployError
from rollouts.run_dir import RunDir, append_jsonl
from rollouts.view.charts import RunGroup, curve_points
from rollouts.view.run_data import RunData, read_run
from rollouts.view.tokens_axis import equal_tokens, tokens_by_step
from tests.view.runs import rl_row


def run_of(path: Path, *, tokens: float, steps: range, reward: float) -> RunData:
    """A run of rl whose reward falls or rises linearly to `reward` at its last step."""
    path.mkdir()
    for step in steps:
        row = rl_row(step, steps[-1], 0.0, random.Random(0))
        row |= {"trained_tokens": tokens, "reward_mean": reward * step / steps[-1]}
        append_jsonl(RunDir(path).metrics, row)
    return read_run(path)


def test_tokens_add_up_over_steps_that_were_not_logged(tmp_path: Path) -> None:
    """Goal: of every fifth step that is logged the four before count as much. Red with the logged ones alone."""
    run = run_of(tmp_path / "run", tokens=10.0, steps=range(5, 21, 5), reward=1.0)
    assert tokens_by_step(run, "rl") == {5: 50.0, 10: 100.0, 15: 150.0, 20: 200.0}


def test_the_run_that_is_better_at_equal_tokens(tmp_path: Path) -> None:
    """Goal: at as many tokens as the shorter run has, not at its own end, each run's mean of the last tenth. Red with
    the last value: the slow run ends higher."""
    fast = run_of(tmp_path / "fast", tokens=10.0, steps=range(1, 101), reward=0.5)
    slow = run_of(tmp_path / "slow", tokens=40.0, steps=range(1, 101), reward=0.8)
    ((head, *names), row) = equal_tokens([fast, slow], "rl", ["reward_mean"])
    assert (head, names) == ("at 1,000 tokens of rl", ["fast", "slow"])
    mean = sum(0.5 * step / 100 for step in range(91, 101)) / 10
    assert row == [
        "reward_mean",
        f"{mean:.5g}",
        f"{(0.8 * 23 / 100 + 0.8 * 24 / 100 + 0.2) / 3:.5g}",
    ]
    assert equal_tokens([fast, slow], "sft", ["loss"]) == []


def test_a_chart_over_tokens(tmp_path: Path) -> None:
    """Goal: seeds of one config share a line at the mean of their tokens; every raw point is at its own run's. Red with
    the steps kept."""
    runs = tuple(
        run_of(tmp_path / f"run{tokens}", tokens=tokens, steps=range(1, 4), reward=1.0)
        for tokens in (10.0, 20.0)
    )
    points = curve_points([RunGroup("both", runs)], "rl", "reward_mean", by="tokens")
    assert [point["step"] for point in points["raw"]] == [10.0, 20.0, 30.0, 20.0, 40.0, 60.0]
    assert [point["step"] for point in points["main"]] == [15.0, 30.0, 45.0]
    file = tmp_path / "x.svg"
    names = [str(run.path) for run in runs]
    report_verbs.plot(names, metric="reward_mean", stage=None, output=file, by="tokens")
    assert "trained tokens of rl" in file.read_text()
    with pytest.raises(DeployError, match="needs step or tokens"):
        report_verbs.plot(names, metric="reward_mean", stage=None, output=file, by="time")
