"""The rules over a run's records: each finds what it is for, and says nothing of a run that goes well."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.health.rules import RULES, symptoms
from rollouts.run_dir import RunDir, append_jsonl
from rollouts.view.run_data import read_run
from tests.view.runs import eval_row, write_run

STEPS = 60


def rewritten(run: RunDir, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text("".join(json.dumps({**row, **change(row)}) + "\n" for row in rows))


def late(
    key: str, value: float, *, after: int = STEPS - 30
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {key: value} if row["stage"] == "rl" and row["step"] > after else {}


CASES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "reward_flat": (
        lambda row: {"reward_mean": 0.4 + 0.01 * (row["step"] % 3)},
        "0.41 in the first 15 steps",
    ),
    "groups_without_contrast": (late("groups_zero_std_frac", 0.9), "90% of the groups"),
    "entropy_collapse": (late("entropy", 0.01), "to 0.01 nats"),
    "sampler_kl_grows": (late("kl_sampler", 0.5), "to 0.5"),
    "truncated": (late("truncated_frac", 0.4), "40% of the responses"),
    "length_drift": (late("response_length_mean", 90.0), "to 90 tokens"),
    "grad_norm_spikes": (
        lambda row: {"grad_norm": 50.0} if row["step"] == 33 else {},
        "50 at step 33",
    ),
    "throughput_drop": (late("tokens_per_s", 400.0), "400 tokens/s"),
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that goes well: its one event of a restart is taken out."""
    made = write_run(tmp_path / "run", steps=STEPS)
    kept = [
        line
        for line in made.events.read_text().splitlines(keepends=True)
        if "engine_restarted" not in line
    ]
    made.events.write_text("".join(kept))
    return made


def test_a_run_that_goes_well_has_none(run: RunDir) -> None:
    """Goal: no rule cries wolf. Red with a bound of 0 for truncation."""
    assert symptoms(read_run(run.path)) == ()


def test_a_run_that_has_just_begun_has_none(tmp_path: Path) -> None:
    """Goal: a few steps are no evidence."""
    made = write_run(tmp_path / "run", steps=3)
    made.events.unlink()
    assert symptoms(read_run(made.path)) == ()


@pytest.mark.parametrize("cause", CASES)
def test_each_rule_finds_its_case(run: RunDir, cause: str) -> None:
    """Goal: a number out of bounds is found by its rule and no other, with the number. Red with any check returning
    nothing."""
    change, said = CASES[cause]
    rewritten(run, change)
    found = symptoms(read_run(run.path))
    assert {symptom.cause for symptom in found} == {cause}
    assert any(said in symptom.detail for symptom in found), found


def test_validation_loss_that_rises_is_found(run: RunDir) -> None:
    """Goal: the least value and the last are named. Red with one evaluation after the least enough."""
    append_jsonl(run.eval, eval_row("sft", STEPS, "validation_loss", 1.0))
    append_jsonl(run.eval, eval_row("sft", STEPS + 1, "validation_loss", 1.2))
    assert symptoms(read_run(run.path)) == ()
    append_jsonl(run.eval, eval_row("sft", STEPS + 2, "validation_loss", 1.3))
    (found,) = symptoms(read_run(run.path))
    assert (
        found.cause == "validation_rises" and "1 at step 60, and is 1.3 at step 62" in found.detail
    )


def test_restarts_are_found(tmp_path: Path) -> None:
    """Goal: how often, which engine and why. Red with the reason left out."""
    (found,) = symptoms(read_run(write_run(tmp_path / "run").path))
    assert found.cause == "engine_restarts" and "engine-0: it died" in found.detail


def usage(*, use: float, at: float, stage: str = "rl") -> dict[str, Any]:
    gpus = [
        {"gpu": 0, "processes": ["trainer-0"], "use": 0.9},
        {"gpu": 1, "processes": ["engine-0"], "use": use},
    ]
    return {"time": at, "stage": stage, "gpus": gpus, "processes": []}


def test_an_idle_gpu_is_found(run: RunDir) -> None:
    """Goal: the GPU that waits is named with what it belongs to; before the first step, where models are loaded, and
    with a few samples nothing is said. Red with the time before the first step counted."""
    first = next(row for row in map(json.loads, run.metrics.open()) if row["stage"] == "rl")["time"]
    append_jsonl(run.gpu, *(usage(use=0.0, at=first - 200 + i) for i in range(100)))
    append_jsonl(run.gpu, *(usage(use=0.0, at=first + i) for i in range(20)))
    assert symptoms(read_run(run.path)) == ()
    append_jsonl(run.gpu, *(usage(use=0.4, at=first + 20 + i) for i in range(60)))
    (found,) = symptoms(read_run(run.path))
    assert found.cause == "gpu_idle" and found.stage == "rl"
    assert "GPU 1 (engine-0) was idle 70% of the time" in found.detail
    assert "GPU 0" not in found.detail


def test_every_rule_says_what_to_do() -> None:
    """Goal: a name of its own, a bound, a meaning and a fix for each, and a test. Red with a rule without a fix."""
    assert len({rule.cause for rule in RULES}) == len(RULES)
    assert {rule.cause for rule in RULES} == {
        *CASES,
        "validation_rises",
        "engine_restarts",
        "gpu_idle",
    }
    assert all(value for rule in RULES for value in dataclasses.astuple(rule))
