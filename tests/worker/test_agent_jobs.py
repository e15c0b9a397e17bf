"""Agents in a job: the trainer's entry with a real engine, environments and rewards named by the config."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from base_config import AgentConfig, RewardConfig, load_config
from rollouts.run_dir import RunDir, read_jsonl
from rollouts.training.rl_losses import sft_loss
from tests.engines.serving import serving
from tests.example_config import replace_at
from tests.training import tiny_task
from tests.worker.test_trainer_jobs import ROOT, config, rows, train

AGENT = AgentConfig(
    environment="tests.agents.environments.TwoTurns",
    tool_format="hermes",
    turns_max=3,
    tokens_max=60,
    timeout_s=60.0,
)
OWN = {"rl.agent": AGENT, "rl.reward": None}
SAMPLED = {"eval.num_samples": 2, "eval.pass_at": [1]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was taught to say a few letters and end its turn, whatever it is asked."""
    directory = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny_task.tiny_model(seed=1), tiny_task.tiny_tokenizer()
    said = "".join(
        f"<|user|>{'again' * (n % 2) or 'xyz'}<|end|><|assistant|>{'abc'[: n % 4]}<|end|>"
        for n in range(8)
    )
    ids = torch.tensor([tokenizer(said)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        sft_loss(
            model(input_ids=ids).logits, ids, torch.ones_like(ids, dtype=torch.float32)
        ).backward()
        optimizer.step()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine_url(model: Path) -> Iterator[str]:
    with serving(model) as url:
        yield url


@pytest.fixture
def job(model: Path, engine_url: str, tmp_path: Path) -> Callable[[dict[str, Any]], RunDir]:
    """Runs the rl stage without evaluation."""
    return lambda changes: train(
        tmp_path / "run",
        "rl",
        config(model, "rl", {**changes, "data.eval_mixture": []}),
        engine_url,
    )


@pytest.fixture(scope="module")
def run(model: Path, engine_url: str, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    directory = tmp_path_factory.mktemp("runs") / "agent"
    return train(directory, "rl", config(model, "rl", {**OWN, **SAMPLED}), engine_url)


def test_an_agent_job_trains_on_episodes(run: RunDir) -> None:
    """Goal: rl.agent's environment makes the rollouts, and rewards them. Red with make_generate_fn in any case."""
    samples = read_jsonl(run.rollouts)
    assert len(samples) == 48 and [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 3]
    finished = [sample for sample in samples if sample["metadata"]["ended"] == "done"]
    assert finished, "some of 48 episodes end both turns in 8 tokens"
    for sample in samples:
        assert sample["reward"] == sum(sample["metadata"]["turn_rewards"])
        assert sample["prompt_id"] and sample["weight_version"] == str(sample["step"] - 1)
        assert len(sample["rollout_log_probs"]) == sample["response_length"]
    for sample in finished:
        assert sample["metadata"]["turns"] == 2
        assert [m["role"] for m in sample["metadata"]["messages"]] == [
            "user",
            "assistant",
            "user",
            "assistant",
        ]
    assert run.latest_checkpoint("rl").resolve().name == "step_000003"


def test_the_shipped_agent_config_runs(model: Path, engine_url: str, tmp_path: Path) -> None:
    """Goal: configs/00_cpu_sft_rl_agent.py's rl stage, two steps of it: who was wrong was asked again, and only they.

    Red with the question not asked again.
    """
    shipped = load_config(ROOT / "configs" / "00_cpu_sft_rl_agent.py")
    (prompts,) = shipped.data.rl_mixture
    changes = {
        "model.name": str(model),
        "model.init": "pretrained",
        "output.mode": "rl",
        "data.eval_mixture": [],
    }
    for path, value in {
        **changes,
        "data.rl_mixture": [dataclasses.replace(prompts, max_samples=32)],
    }.items():
        shipped = replace_at(shipped, path, value)
    run = train(tmp_path / "run", "rl", shipped, engine_url)
    samples = read_jsonl(run.rollouts)
    assert len(samples) == 2 * 16 * 8 and len(read_jsonl(run.metrics)) == 2
    for sample in samples:
        asked = [
            message["content"]
            for message in sample["metadata"]["messages"]
            if message["role"] == "user"
        ]
        assert set(asked) == {sample["prompt"]["messages"][-1]["content"]}
        assert sample["reward"] == {"done": 1.0 / len(asked)}.get(sample["metadata"]["ended"], 0.0)
    assert any(sample["metadata"]["turns"] == 2 for sample in samples)


def test_it_is_on_policy(run: RunDir) -> None:
    """Goal: over the turns of an episode the trainer's log-probs are the sampler's.

    Red with the log-probs of what the environment said left out, where 0 stands for them.
    """
    for row in read_jsonl(run.metrics):
        assert row["logp_diff_abs"] < 1e-5


def test_evaluation_plays_episodes(run: RunDir) -> None:
    """Goal: greedy ones, and sampled ones for pass@k, judged by the same reward. Red with evaluate_with_engine."""
    assert {row["step"] for row in rows(run)} == {0, 3}
    assert {row["metric"] for row in rows(run)} == {"exact_match", "reward", "pass@1"}
    for row in rows(run, metric="reward", task="all"):
        right = rows(run, metric="exact_match", task="all", step=row["step"])[0]["value"]
        assert right <= row["value"] <= 1.0
    assert "eval_reward" in read_jsonl(run.metrics)[-1]


def test_a_reward_function_stands_in_for_the_environments(job: Any) -> None:
    """Goal: rl.reward.fn in rl.reward.workers processes, which are gone after. Red with reward_fn not passed on."""
    changes = {
        **OWN,
        "rl.reward": RewardConfig(fn="tests.training.slow_rewards.process_id", workers=2),
    }
    run = job(changes)
    ids = {int(sample["reward"]) for sample in read_jsonl(run.rollouts)}
    assert 1 <= len(ids) <= 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in ids)


def test_rewards_over_the_time_limit_are_counted(job: Any, tmp_path: Path) -> None:
    """Goal: limits.reward_timeout_s reaches the run, and the error says what dropped the groups. Hung with 1e6 s."""
    slow = {"rl.reward.fn": "tests.training.slow_rewards.hangs", "limits.reward_timeout_s": 0.1}
    with pytest.raises(SystemExit):
        job({**slow, "rl.sampling.retries_max": 0})
    (event,) = [
        event for event in read_jsonl(RunDir(tmp_path / "run").events) if event["kind"] == "error"
    ]
    assert "reward_timeout dropped 4" in event["message"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ("Broken", "Broken.respond() raised KeyError: 'no such key' (/"),
        ("NeverStarts", "NeverStarts.start() took more than 0.5 s, the episode's limit"),
        ("unmade", "unmade() raised OSError: no database"),
    ],
)
def test_an_environments_mistake_is_one_error_line(
    job: Any, capsys: pytest.CaptureFixture, environment: str, reason: str
) -> None:
    """Goal: environment, place and prompt row. Red with the exception passed through: a traceback."""
    agent = AgentConfig(
        environment=f"tests.agents.environments.{environment}",
        tool_format="json",
        turns_max=2,
        tokens_max=60,
        timeout_s=0.5 if environment == "NeverStarts" else 60.0,
    )
    changes = {**OWN, "rl.agent": agent}
    with pytest.raises(SystemExit):
        job(changes)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and reason in errors[0] and "for prompt {'" in errors[0]
