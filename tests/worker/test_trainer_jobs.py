"""The trainer's entry with a real engine: sampling, training, evaluating, replaying, collecting."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from base_config import Config
from rollouts.run_dir import RunDir, read_jsonl
from rollouts.training.loops.train_step import StepsError
from rollouts.training.types import Sample
from rollouts.worker import trainer
from rollouts.worker.stages.parts import require_steps_left
from tests.engines.scripted import Scripted
from tests.engines.serving import serving
from tests.example_config import example_config, policy_loss, replace_at, value_model
from tests.training import tiny_task

ROOT = Path(__file__).resolve().parents[2]
CRITIC = {
    "rl.baseline": value_model(clip=0.2),
    "rl.loss": policy_loss(advantage_norm="batch", updates_per_batch=2),
}
SAMPLED = {"eval.num_samples": 3, "eval.pass_at": [1, 3]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_task.tiny_model(seed=1).save_pretrained(directory)
    tiny_task.tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine_url(model: Path) -> Iterator[str]:
    with serving(model) as url:
        yield url


def config(model: Path, mode: str, changes: dict[str, Any]) -> Config:
    """Three RL steps (two SFT) of 4 prompts x 4 samples, and held-out rows of two data sets."""
    base = example_config()
    (spec,) = base.data.eval_mixture
    prompts = dataclasses.replace(base.data.rl_mixture[0], max_samples=12)
    held_out = [
        dataclasses.replace(spec, max_samples=6),
        dataclasses.replace(spec, name="configs/data/letters/train_sft.jsonl", max_samples=4),
    ]
    fields = {
        "model.name": str(model),
        "model.init": "pretrained",
        "output.mode": mode,
        "sft.num_iterations": 2,
    }
    fields |= {"data.rl_mixture": [prompts], "data.eval_mixture": held_out, **changes}
    for path, value in fields.items():
        base = replace_at(base, path, value)
    assert base.problems() == ()
    return base


def train(directory: Path, stage: str, config: Config, *urls: str) -> RunDir:
    """The trainer's `main`, as torchrun starts it on one rank, but in this process: loading torch takes longest."""
    run = RunDir(directory)
    directory.mkdir()
    config.save(run.config)
    engines = [item for url in urls for item in ("--engine-url", url)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(
            sys, "argv", ["trainer", "--run-dir", str(directory), "--stage", stage, *engines]
        )
        assert trainer.main() == 0
    return run


@pytest.fixture(scope="module")
def live(model: Path, engine_url: str, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """PPO with a value head on what a real engine samples."""
    directory = tmp_path_factory.mktemp("runs") / "live"
    return train(directory, "rl", config(model, "rl", {**CRITIC, **SAMPLED}), engine_url)


def rows(run: RunDir, **fields: Any) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run.eval) if fields.items() <= row.items()]


def test_a_value_head_is_trained_by_the_job(live: RunDir) -> None:
    """Goal: a ValueModel as rl.baseline and its fields reach the run. Red with value_head=None in build_backend.

    Red also with updates_per_batch not passed on.
    """
    metrics = read_jsonl(live.metrics)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all({"explained_variance", "value_loss", "clip_fraction"} <= set(row) for row in metrics)
    assert metrics[0]["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert metrics[-1]["explained_variance"] != 0.0
    # the mean of two updates, of which the second is off the sampler's policy; the first step had no reward
    assert max(row["logp_diff_abs"] for row in metrics) > 1e-4


def test_pass_at_k_and_tasks_reach_eval_jsonl(live: RunDir) -> None:
    """Goal: eval.* and each data set's rows, before and after. Red with eval.num_samples not passed on."""
    tasks = ["all", "configs/data/letters/test.jsonl", "configs/data/letters/train_sft.jsonl"]
    found = [(row["step"], row["task"], row["metric"]) for row in rows(live)]
    metrics = ["exact_match", "pass@1", "pass@3"]
    assert sorted(found) == sorted(
        (step, task, metric) for step in (0, 3) for task in tasks for metric in metrics
    )
    for step in (0, 3):
        for metric in metrics:
            total, first, second = (
                rows(live, step=step, task=task, metric=metric)[0]["value"] for task in tasks
            )
            assert total == pytest.approx((6 * first + 4 * second) / 10)


def test_every_answer_is_kept(live: RunDir) -> None:
    """Goal: a line for each held-out row and evaluation, which says what eval.jsonl counts; "which rows got worse" is
    a join over `row`. Red with the answers dropped after they were counted."""
    answers = read_jsonl(live.eval_samples)
    assert [(row["step"], row["row"]) for row in answers] == [
        (step, row) for step in (0, 3) for row in range(10)
    ]
    assert {"stage", "task", "prompt_id", "prompt", "expected", "answer", "num_correct"} <= set(
        answers[0]
    )
    before, after = ({row["row"]: row for row in answers if row["step"] == step} for step in (0, 3))
    assert all(before[row]["prompt_id"] == after[row]["prompt_id"] for row in before)
    for step, found in ((0, before), (3, after)):
        (counted,) = rows(live, step=step, task="all", metric="exact_match")
        assert counted["value"] == pytest.approx(sum(row["correct"] for row in found.values()) / 10)
        assert all(
            row["correct"] == (row["answer"].strip() == row["expected"]) for row in found.values()
        )


def test_a_run_that_learns_nothing_says_so(model: Path, engine_url: str, tmp_path: Path) -> None:
    """Goal: `warning` events with a cause and a sentence, and the share of groups without contrast in the metrics.
    Red with the alarms left out of the loggers."""
    changes = {"rl.reward.fn": f"{__name__}.never", "rl.eval_every": -1, "data.eval_mixture": []}
    run = train(tmp_path / "nothing", "rl", config(model, "rl", changes), engine_url)
    assert [row["groups_zero_std_frac"] for row in read_jsonl(run.metrics)] == [1.0] * 3
    warnings = [event for event in read_jsonl(run.events) if event["kind"] == "warning"]
    assert {"no_contrast"} <= {event["cause"] for event in warnings}
    assert all(
        (event["stage"], event["step"]) == ("rl", 3) and "Fix: " in event["message"]
        for event in warnings
    )
    assert len({event["cause"] for event in warnings}) == len(warnings)


def never(sample: Sample) -> float:
    return 0.0


def test_resuming_beyond_the_end_is_an_error(tmp_path: Path) -> None:
    """Goal: both numbers and the fix. Red with an empty range of steps as work done: state done, exit code 0."""
    (tmp_path / "metadata.json").write_text(json.dumps({"stage": "sft", "step": 104}))
    for steps in (52, 104):
        with pytest.raises(
            StepsError,
            match=rf"is of sft step 104, .* {steps} steps.*Fix: raise sft.num_iterations",
        ):
            require_steps_left("sft", tmp_path, steps)
    require_steps_left("sft", tmp_path, 105)


def test_the_engine_says_who_it_is_before_it_is_used(
    live: RunDir, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Goal: its kind and version are in the events; a version that nobody tested, and another kind than the config's,
    end the run in one error, before any sample. Red with the kinds not compared."""
    notes = [event["message"] for event in read_jsonl(live.events) if event["kind"] == "note"]
    assert any(
        note.startswith("engine http://127.0.0.1:") and ": embedded 1" in note for note in notes
    )
    with (
        Scripted({"/server_info": (200, '{"version": "9.9.9"}')}) as server,
        pytest.raises(SystemExit),
    ):
        train(tmp_path / "unknown", "rl", config(model, "rl", {}), server.url)
    assert "error: " in (error := capsys.readouterr().err)
    assert "sglang 9.9.9 is not a version this client knows" in error and server.calls == [
        "/server_info"
    ]
    with (
        Scripted(
            {"/server_info": (200, '{"version": "0.5.21", "model_path": "/nowhere"}')}
        ) as server,
        pytest.raises(SystemExit),
    ):
        train(tmp_path / "other", "rl", config(model, "rl", {}), server.url)
    assert "is sglang 0.5.21, needs embedded, as the config's engine" in capsys.readouterr().err
    assert server.calls == ["/server_info"]


def test_a_replay_needs_no_engine_and_gives_the_same_run(
    live: RunDir, model: Path, tmp_path: Path
) -> None:
    """Goal: sampling.source = the run's rollouts.jsonl: its losses bit for bit, evaluated in process.
    Red with a shuffle.

    The same weights give the same greedy number by engine and in process. Two epochs are twice the steps.
    """
    changes = {
        **CRITIC,
        "rl.sampling.source": str(live.rollouts),
        "rl.num_epochs": 2,
        "engine": None,
        "data.rl_mixture": [],
    }
    run = train(tmp_path / "replay", "rl", config(model, "rl", changes))
    found, expected = read_jsonl(run.metrics), read_jsonl(live.metrics)
    assert len(found) == 6
    for key in (
        "loss",
        "grad_norm",
        "reward_mean",
        "explained_variance",
        "value_loss",
        "logp_diff_abs",
        "lag_max",
    ):
        assert [row[key] for row in found[:3]] == [row[key] for row in expected], key
    assert not run.rollouts.exists() and not run.weights.exists()
    assert rows(run, step=0) and {row["metric"] for row in rows(run)} == {"exact_match"}
    for row in rows(run, step=0):
        assert [row["value"]] == [
            other["value"] for other in rows(live, step=0, task=row["task"], metric="exact_match")
        ]
    assert run.latest_checkpoint("rl").resolve().name == "step_000006"


def test_a_replay_at_another_temperature_is_one_error_line(
    live: RunDir, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Goal: the user's mistake in one line, with file and line number. Red with DataError passed through."""
    changes = {"rl.sampling.source": str(live.rollouts), "rl.temperature": 0.5, "engine": None}
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "replay", "rl", config(model, "rl", changes))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1
    assert len(errors) == 1 and "rollouts.jsonl:1: was sampled at temperature 1.0" in errors[0]


def test_rollouts_alone(live: RunDir, model: Path, engine_url: str, tmp_path: Path) -> None:
    """Goal: engine_only scores and writes what a later run trains on; no model is loaded, none is saved.

    Red with a backend built all the same.
    """
    run = train(
        tmp_path / "collect",
        "rl",
        config(model, "rl", {"rl.sampling.source": "engine_only", **SAMPLED}),
        engine_url,
    )
    assert not (run.checkpoints / "rl").exists() and not run.weights.exists()
    metrics, samples = read_jsonl(run.metrics), read_jsonl(run.rollouts)
    assert [row["step"] for row in metrics] == [1, 2, 3] and len(samples) == 48
    assert metrics[0]["reward_mean"] == pytest.approx(
        sum(row["reward"] for row in samples[:16]) / 16
    )
    assert "loss" not in metrics[0]
    assert {(row["step"], row["metric"]) for row in rows(run)} == {
        (0, "exact_match"),
        (0, "pass@1"),
        (0, "pass@3"),
    }
    changes = {
        "rl.sampling.source": str(run.rollouts),
        "engine": None,
        "rl.eval_every": -1,
        "data.eval_mixture": [],
    }
    later = train(tmp_path / "later", "rl", config(model, "rl", changes))
    assert [row["reward_mean"] for row in read_jsonl(later.metrics)] == [
        row["reward_mean"] for row in metrics
    ]


def test_sft_evaluates_the_same_way(model: Path, tmp_path: Path) -> None:
    """Goal: validation loss of each task, and answers before and after, in the SFT stage; a tensor of the model's files
    that the model does not have is in a note. Red with one task alone, and with the tensor named in a log alone."""
    own = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(own / "model.safetensors") | {"v_head.weight": torch.ones(2)}
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    run = train(
        tmp_path / "sft",
        "sft",
        config(own, "sft", {**SAMPLED, "sft.eval_every": 1, "sft.eval_steps": 1}),
    )
    notes = [event["message"] for event in read_jsonl(run.events) if event["kind"] == "note"]
    assert [note for note in notes if note.endswith("tensors that the model lacks: v_head.weight")]
    losses = rows(run, metric="validation_loss")
    assert {(row["stage"], row["step"]) for row in losses} == {("base", 0), ("sft", 1), ("sft", 2)}
    assert len({row["task"] for row in losses}) == 3
    assert {row["step"] for row in rows(run, metric="pass@3")} == {0, 2} and len(
        rows(run, metric="pass@3")
    ) == 6
    last = [json.loads(line) for line in run.metrics.read_text().splitlines()][-1]
    assert (
        last["eval_validation_loss"]
        == rows(run, metric="validation_loss", step=2, task="all")[0]["value"]
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rl.reward.fn": "rollouts.training.rewards.no_such"}, "has no 'no_such'"),
        ({"rl.sampling.filter_fn": "no_such_package.keep"}, "no module 'no_such_package'"),
        ({"model.init": "random", "sft.matrix_lr": 1e30, "sft.num_iterations": 8}, "not applied"),
    ],
    ids=["reward", "filter", "diverges"],
)
def test_a_mistake_ends_sft_in_one_error_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    """Goal: what is wrong with RL is said before SFT trains, and a diverging model is not trained on: one line, one
    event. tests/e2e has one such end at the laptop. Red with RewardError and FloatingPointError
    passed through."""
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "run", "sft", config(model, "sft+rl", changes))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(errors) == 1 and reason in errors[0]
    run = RunDir(tmp_path / "run")
    (event,) = [event for event in read_jsonl(run.events) if event["kind"] == "error"]
    assert event["message"] in errors[0]
    assert "sft.matrix_lr" in changes or not run.metrics.exists()
