"""What the trainer loads for a config: orders, plain text, the report of what was left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base_config import AgentConfig, Config
from rollouts.data_formats.row import DataError
from rollouts.worker.builders.data import load_data, prompt_tokens_max, report_of, sft_seed
from tests.example_config import example_config, replace_at
from tests.training.process_nursery import shared
from tests.training.tiny_task import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def config_over(directory: Path, **data: Any) -> Config:
    """The example config over three small files: questions q0..q5 to train on, e0..e1 to evaluate."""
    config = example_config()
    for mixture, tag, count in (
        ("sft_mixture", "q", 6),
        ("rl_mixture", "r", 4),
        ("eval_mixture", "e", 2),
    ):
        file = directory / f"{tag}.jsonl"
        rows = [{"question": f"{tag}{n}", "answer": "x"} for n in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = replace_at(config, f"data.{mixture}.0.name", str(file))
    return replace(config, data=replace(config.data, **data))


def asked(samples: Any) -> list[str]:
    return [sample.prompt["messages"][0]["content"] for sample in samples]


def test_the_order_of_sft(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: sft_order decides, in the mixture and in the loop's epochs. Red when the mixture was shuffled anyway."""
    listed = [f"q{n}" for n in range(6)]
    sequence = config_over(tmp_path, sft_order="sequence")
    assert asked(load_data(sequence, tokenizer, "sft").sft) == listed and sft_seed(sequence) is None
    shuffled = config_over(tmp_path, shuffle_seed=5)
    assert (
        sorted(asked(load_data(shuffled, tokenizer, "sft").sft)) == listed
        and sft_seed(shuffled) == 5
    )
    assert asked(load_data(shuffled, tokenizer, "sft").sft) != listed


def test_plain_text_has_a_validation_loss_but_no_question(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: eval_mixture may hold both kinds; each counts where it can. Red when a text row was to be answered."""
    config = config_over(tmp_path)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "abc"}) + "\n")
    spec = config.data.eval_mixture[0]
    text = replace(spec, name=str(tmp_path / "t.jsonl"), format="text")
    both = load_data(replace_at(config, "data.eval_mixture", [spec, text]), tokenizer, "sft")
    assert len(both.eval_samples) == 3 and len(both.eval_rows) == 2
    alone = load_data(replace_at(config, "data.eval_mixture", [text]), tokenizer, "sft")
    assert len(alone.eval_samples) == 1 and not alone.eval_rows


def test_the_report_of_what_was_left_out(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: it reaches the trainer, which writes it into the run's events. Red when it was dropped after logging."""
    config = config_over(tmp_path, max_length=24)
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write(json.dumps({"question": "long" * 9, "answer": "x"}) + "\n")
    report = dict(load_data(config, tokenizer, "sft").reports)["sft_mixture"]
    assert report.kept == 6
    assert report.left_out == {"longer than max_length=24 tokens": 1} and "q.jsonl:7" in str(report)
    assert "sft_mixture" not in dict(load_data(config, tokenizer, "rl").reports)


def test_prompts_leave_room_for_an_answer(tmp_path: Path, tokenizer: Any) -> None:
    """Goal: every prompt of RL and evaluation is measured before anything trains, against the lesser of the two limits;
    an episode's first with what its environment offers. Red: the engine refused it when it was sampled."""
    config = config_over(tmp_path)
    # a prompt has three tokens more, an answer 8
    for tag, count in ("r", 30), ("e", 40), ("r", 53), ("r", 100):
        with (tmp_path / f"{tag}.jsonl").open("a") as file:
            file.write(json.dumps({"question": "a" * count, "answer": "x"}) + "\n")
    assert prompt_tokens_max(config, tokenizer) == 64 - 8
    # the model's own
    assert prompt_tokens_max(replace_at(config, "data.max_length", 2000), tokenizer) == 256 - 8
    data = load_data(config, tokenizer, "sft")
    assert len(data.prompts) == 4 + 2 and len(data.eval_rows) == 3
    assert "rl_mixture: 6 prompts; left out 1: prompt longer than 56 tokens (" in report_of(data)
    assert f"{tmp_path}/r.jsonl:7)" in report_of(data) and "answers to" not in report_of(data)
    small = replace_at(config, "engine.context_length", 40)
    data = load_data(small, tokenizer, "rl")
    assert len(data.prompts) == 4 and len(data.eval_rows) == 2
    assert "left out 3: prompt longer than 32 tokens" in report_of(
        data
    ) and "answers to" in report_of(data)
    with pytest.raises(
        DataError, match=r"no prompt is left .*r\.jsonl:\d.*, \.\.\.\); the longest has 103 tokens"
    ):
        load_data(replace_at(config, "engine.context_length", 10), tokenizer, "rl")
    agent = AgentConfig(
        environment="rollouts.agents.environment.AskAgain",
        tool_format="hermes",
        turns_max=2,
        tokens_max=34,
        timeout_s=60.0,
    )
    episodes = replace_at(config, "rl.agent", agent)
    assert (
        prompt_tokens_max(episodes, tokenizer) == 33
        and len(load_data(episodes, tokenizer, "rl").prompts) == 5
    )
    offered = replace_at(
        config,
        "rl.agent",
        replace(agent, environment="rollouts.agents.environment.CalculatorEnvironment"),
    )
    told = report_of(load_data(offered, tokenizer, "rl"))
    assert (
        "the model does not see the environment's tools: " in told
        and "leaves out the tool 'calculator'" in told
    )


def test_a_stage_over_plain_text_alone(tmp_path: Path) -> None:
    """Goal: a real trainer process: text is trained and evaluated by its loss alone, and what was left out stands in
    the run's events. Red when evaluation needed rows to answer (no eval.jsonl), and without the note."""
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"text": "abc " * 9}) + "\n" + json.dumps({"text": ""}) + "\n"
    )
    config = config_over(tmp_path, sft_order="sequence", max_length=16)
    text = replace(config.data.sft_mixture[0], name=str(tmp_path / "t.jsonl"), format="text")
    changes = {
        "data.sft_mixture": [text],
        "data.eval_mixture": [text],
        "sft.num_iterations": 2,
        "sft.eval_every": 1,
        "output.mode": "sft",
    }
    for path, value in changes.items():
        config = replace_at(config, path, value)
    assert config.problems() == ()
    run = tmp_path / "run"
    for name in ("processes", "checkpoints"):
        (run / name).mkdir(parents=True)
    config.save(run / "config.json")
    log = tmp_path / "trainer.log"
    pid = shared().start("rollouts.worker.trainer", ["--run-dir", str(run), "--stage", "sft"], log)
    assert shared().wait(pid) == 0, log.read_text()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (note,) = [event["message"] for event in events if event["kind"] == "note"]
    assert "1 long texts became 3 pieces; left out 1: no trained token (empty text)" in note
    evaluated = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert {row["metric"] for row in evaluated} == {"validation_loss"} and len(evaluated) == 3


def test_rows_that_the_reward_cannot_score_are_left_out_before_training(
    tmp_path: Path, tokenizer: Any
) -> None:
    """Goal: counted by reason, with file and line; none left is an error. Red: RewardError when one was sampled."""
    pytest.importorskip("math_verify")
    config = replace_at(
        config_over(tmp_path), "rl.reward.fn", "rollouts.training.rewards.math_verify"
    )
    answers = ["72", r"\frac12", r"\begin{cases} x \\ 0 \end{cases}", "3 4", "Yes"]
    file = tmp_path / "r.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": f"r{n}", "answer": one}) + "\n" for n, one in enumerate(answers)
        )
    )
    data = load_data(config, tokenizer, "rl")
    kept: list[Any] = list(data.prompts)
    assert sorted(row["messages"][0]["content"] for row in kept) == ["r0", "r1", "r4"]
    told = report_of(data)
    assert (
        "left out 2: answer cannot be read to its end as mathematics" in told
        and f"{file}:3" in told
    )
    file.write_text(json.dumps({"question": "r", "answer": "3 4"}) + "\n")
    with pytest.raises(
        DataError, match=r"no prompt is left that can be used: .*left out 1: answer cannot be read"
    ):
        load_data(config, tokenizer, "rl")
