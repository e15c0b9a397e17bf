"""The main job: it learns, here; it is the same over SSH, with two ranks; what it leaves behind can be used."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from base_config import load_config
from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl
from tests.e2e.conftest import DEMO, processes_of
from tests.example_config import replace_at
from tests.remote.hosts import Host, Laptop, free_port

SEED = 1


def exact_match(run: RunDir) -> dict[str, float]:
    rows = [row for row in read_jsonl(run.eval) if row["metric"] == "exact_match"]
    return {row["stage"]: row["value"] for row in rows}


@pytest.mark.timeout(1500)  # the environment may have to be built first
def test_the_demo_learns_here(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: held-out exact match rises by >= 0.30 from the end of SFT to the end of RL. Red with matrix_lr=0 in RL."""
    config = load_config(DEMO)
    for path, value in {
        "model.init_seed": SEED,
        "data.shuffle_seed": SEED,
        "rl.seed": SEED,
        "engine.sglang_port": free_port(),
        "output.save_dir": str(tmp_path / "results"),
    }.items():
        config = replace_at(config, path, value)
    config.save(tmp_path / "demo.json")
    done = laptop.deploy(str(tmp_path / "demo.json"), "--run-id", "demo", timeout_s=1400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = RunDir(tmp_path / "results" / config.output.experiment_name / "demo")
    values = exact_match(run)
    print(values)
    assert values["rl"] - values["sft"] >= 0.30, values
    assert values["base"] <= values["sft"]
    assert "exact_match" in done.stdout  # the before/after table
    assert processes_of("demo") == []


@pytest.mark.timeout(900)
def test_the_same_over_ssh_with_two_ranks(laptop: Laptop, remote: Host, write_config: Callable[..., Path]) -> None:
    """Goal: a run on a real sshd with two torchrun ranks ends 0 and all results are here. Red with rsync of
    checkpoints left out, and with --nproc-per-node fixed at 1."""
    config = write_config({"target.gpu_ranks": [0, 1], "sft.batch_size": 32, "rl.loss": "ppo"})
    done = laptop.deploy(str(config), "--remote", remote.target, "--run-id", "two", timeout_s=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = RunDir(config.parent / "results" / "short" / "two")
    assert {path.name for path in (run.path / "processes").iterdir()} >= {
        "sft-trainer-rank0.json",
        "sft-trainer-rank1.json",
        "rl-trainer-rank1.json",
    }
    metrics = read_jsonl(run.metrics)
    assert [(row["stage"], row["step"]) for row in metrics if row["stage"] == "rl"] == [("rl", n) for n in range(1, 5)]
    assert all(math.isfinite(row["loss"]) for row in metrics)
    rl = [row for row in metrics if row["stage"] == "rl"]
    assert all(row["logp_diff_abs"] < 1e-5 for row in rl), rl  # trainer and engine agree on the sampled tokens
    samples = read_jsonl(run.rollouts)
    assert len(samples) == 4 * 4 * 4
    assert {row["weight_version"] for row in samples} == {"0", "1", "2", "3"}
    assert [row["stage"] for row in read_jsonl(run.eval) if row["metric"] == "exact_match"] == ["base", "sft"] + [
        "rl"
    ] * 3
    for stage, step in (("sft", 4), ("rl", 4)):
        checkpoint = run.checkpoints / stage / f"step_{step:06d}"
        assert manifest_problems(checkpoint) == ()
        assert run.latest_checkpoint(stage).resolve() == checkpoint.resolve()
    assert processes_of("two") == []


@pytest.mark.timeout(900)
def test_checkpoints_load_and_the_saved_config_runs_again(laptop: Laptop, write_config: Callable[..., Path]) -> None:
    """Goal: AutoModelForCausalLM loads what a run leaves; config.json of a run deploys as it is; the engine's exact
    match before RL equals the trainer's after SFT. Red when checkpoints held no config, or RL began from the base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = write_config({"sft.num_iterations": 60})
    assert laptop.deploy(str(config), "--run-id", "first", timeout_s=800).returncode == 0
    run = RunDir(config.parent / "results" / "short" / "first")
    for stage in ("sft", "rl"):
        AutoModelForCausalLM.from_pretrained(run.latest_checkpoint(stage))
        tokenizer = AutoTokenizer.from_pretrained(run.latest_checkpoint(stage))
        assert tokenizer.chat_template
    rows = [row for row in read_jsonl(run.eval) if row["metric"] == "exact_match"]
    by_stage = {(row["stage"], row["step"]): row["value"] for row in rows}
    assert by_stage["sft", 60] == by_stage["rl", 0] > 0
    assert laptop.deploy(str(run.config), "--run-id", "again", timeout_s=800).returncode == 0
    again = RunDir(run.path.parent / "again")

    def losses(which: RunDir) -> list[float]:
        return [row["loss"] for row in read_jsonl(which.metrics)]

    assert losses(run) == losses(again)  # same seeds, same numbers: SFT, sampling and RL


@pytest.mark.timeout(900)
def test_a_stage_resumes_from_its_own_checkpoint(laptop: Laptop, write_config: Callable[..., Path]) -> None:
    """Goal: 4 steps + resume + 4 steps are 8 steps, bit for bit, for SFT through deploy. Red when the optimizer's
    state was not restored."""
    changes = {"output.mode": "sft", "sft.num_iterations": 8, "sft.checkpoint_every": 4, "sft.log_every": 1}
    whole = write_config(changes, "whole")
    assert laptop.deploy(str(whole), "--run-id", "whole", timeout_s=800).returncode == 0
    source = laptop.rollouts_home / "runs/whole/checkpoints/sft/step_000004"
    resumed = write_config({**changes, "output.source_checkpoint": str(source)}, "resumed")
    done = laptop.deploy(str(resumed), "--run-id", "resumed", timeout_s=800)
    assert done.returncode == 0, done.stdout[-3000:]
    runs = [RunDir(whole.parent / "results" / "short" / name) for name in ("whole", "resumed")]
    tail, again = (
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_jsonl(run.metrics)][-4:] for run in runs
    )
    assert [step for step, *_ in again] == [5, 6, 7, 8]
    assert tail == again
    weights = [(run.latest_checkpoint("sft") / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    assert json.loads((runs[1].latest_checkpoint("sft") / "metadata.json").read_text())["step"] == 8
