"""The main job: it learns, here; it is the same over SSH, with two ranks; what it leaves behind can be used."""

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from base_config import Config, load_config
from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl
from tests.e2e.conftest import (
    DEMO,
    Far,
    beyond_loopback,
    save_config,
    short_demo,
    sockets_seen,
)
from tests.example_config import policy_loss
from tests.remote.hosts import Laptop, wait_for
from tests.run_processes import commands_of

SEED = 1


@pytest.mark.timeout(1500)  # the environment may have to be built first
def test_the_demo_learns_here(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: held-out exact match rises by >= 0.30 from the end of SFT to step 100 of RL, of the 300 that the demo has.
    Red with matrix_lr=0 in RL."""
    changes = {
        "model.init_seed": SEED,
        "data.shuffle_seed": SEED,
        "rl.sampling.seed": SEED,
        "rl.num_epochs": 1,
        "data.rl_mixture.0.max_samples": 32 * 100,
        "rl.eval_every": -1,
    }
    config = save_config(load_config(DEMO), changes, tmp_path / "demo.json")
    with sockets_seen("demo") as sockets:
        done = laptop.deploy(str(tmp_path / "demo.json"), "--run-id", "demo", timeout_s=1400)
    assert sockets and beyond_loopback(sockets) == []  # red with torchrun's own store
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run = RunDir(tmp_path / "results" / config.output.experiment_name / "demo")
    values = {row["stage"]: row["value"] for row in exact_match(run)}
    print(values)
    assert values["rl"] - values["sft"] >= 0.30, values
    assert values["base"] <= values["sft"]
    assert "exact_match" in done.stdout  # the before/after table
    assert commands_of("demo") == []


def exact_match(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run.eval) if row["metric"] == "exact_match"]


SFT_STEPS = 40
TWO_RANKS = {
    "target.gpu_ranks": [0, 1],
    "sft.batch_size": 32,
    "sft.num_iterations": SFT_STEPS,
    "sft.eval_every": SFT_STEPS // 2,
    "sft.checkpoint_every": SFT_STEPS // 2,
    "sft.log_every": 1,
    "rl.loss": policy_loss(),
}


@dataclass(frozen=True)
class Two:
    """A run of two ranks over SSH, during which `deploy` was killed twice: here, and there."""

    config: Config
    here: RunDir
    there: RunDir
    sockets: set[tuple[str, str]]  # conftest.sockets_seen


@pytest.fixture(scope="module")
def two(far: Far) -> Two:
    config = save_config(short_demo(), TWO_RANKS, far.directory / "two.json")
    with sockets_seen("two") as sockets:
        made = Two(config, far.mirror(config, "two"), RunDir(far.remote.run_path("two")), sockets)
        deploying = far.laptop.start(
            str(far.directory / "two.json"), "--remote", far.remote.target, "--run-id", "two"
        )
        kill_at(deploying, lambda: read_jsonl(made.there.metrics), "SFT's first step")
        kill_at(far.laptop.start("attach", "two"), made.there.rollouts.exists, "RL's first samples")
        done = far.laptop.deploy("attach", "two", timeout_s=800)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return made


def kill_at(process: "subprocess.Popen[str]", condition: Callable[[], Any], what: str) -> None:
    wait_for(condition, what, timeout_s=600)
    process.kill()
    process.communicate()


@pytest.mark.timeout(900)
def test_two_ranks_listen_on_loopback_alone(two: Two) -> None:
    """Goal: over a whole run no process of it, torchrun's agent, ranks and engine, listens where other machines reach
    it. Red with `--standalone`: two stores of the agent's, one of which unpickles what it is sent, on all addresses."""
    assert two.sockets and beyond_loopback(two.sockets) == []


@pytest.mark.timeout(900)
def test_the_same_over_ssh_with_two_ranks(two: Two) -> None:
    """Goal: a run on a real sshd with two torchrun ranks ends 0 and all results are here. Red with rsync of
    checkpoints left out, and with --nproc-per-node fixed at 1."""
    run = two.here
    assert {path.name for path in (run.path / "processes").iterdir()} >= {
        "sft-trainer-rank0.json",
        "sft-trainer-rank1.json",
        "rl-trainer-rank1.json",
    }
    metrics = read_jsonl(run.metrics)
    assert all(math.isfinite(row["loss"]) for row in metrics)
    rl = [row for row in metrics if row["stage"] == "rl"]
    # trainer and engine agree on the sampled tokens
    assert all(row["logp_diff_abs"] < 1e-5 for row in rl), rl
    samples = read_jsonl(run.rollouts)
    assert len(samples) == 4 * 4 * 4
    assert {row["weight_version"] for row in samples} == {"0", "1", "2", "3"}
    assert [row["stage"] for row in exact_match(run)] == ["base", "sft"] + ["rl"] * 3
    for stage, step in (("sft", SFT_STEPS), ("rl", 4)):
        checkpoint = run.checkpoints / stage / f"step_{step:06d}"
        assert manifest_problems(checkpoint) == ()
        assert run.latest_checkpoint(stage).resolve() == checkpoint.resolve()
    assert commands_of("two") == []


@pytest.mark.timeout(900)
def test_killing_deploy_loses_nothing(two: Two) -> None:
    """Goal: after kill -9 of deploy in SFT, and of attach in RL, another attach goes on to the end and every line is
    here exactly once. tests/remote kills it in every phase, with a stand-in for training."""
    for file in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl", "events.jsonl"):
        assert (two.here.path / file).read_bytes() == (two.there.path / file).read_bytes(), file
    steps = [(row["stage"], row["step"]) for row in read_jsonl(two.here.metrics)]
    assert steps == [
        *(("sft", n) for n in range(1, SFT_STEPS + 1)),
        *(("rl", n) for n in range(1, 5)),
    ]


@pytest.mark.timeout(900)
def test_checkpoints_load(two: Two) -> None:
    """Goal: AutoModelForCausalLM loads what a run leaves; the engine's exact match before RL equals the trainer's after
    SFT. Red when checkpoints held no config, or RL began from the base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in ("sft", "rl"):
        AutoModelForCausalLM.from_pretrained(two.here.latest_checkpoint(stage))
        tokenizer = AutoTokenizer.from_pretrained(two.here.latest_checkpoint(stage))
        assert tokenizer.chat_template
    by_stage = {(row["stage"], row["step"]): row["value"] for row in exact_match(two.here)}
    assert by_stage["sft", SFT_STEPS] == by_stage["rl", 0] > 0


@pytest.mark.timeout(900)
def test_the_saved_config_resumes_a_stage_from_its_own_checkpoint(far: Far, two: Two) -> None:
    """Goal: config.json of a run deploys as it is, and half the steps + resume + the other half are all of them, bit
    for bit, for SFT through deploy. Red when the optimizer's state was not restored."""
    half = SFT_STEPS // 2
    source = two.there.checkpoints / "sft" / f"step_{half:06d}"
    done = far.laptop.deploy(
        str(two.here.config),
        *("--set", "output.mode=sft", "--set", f"output.source_checkpoint={source}"),
        *("--remote", far.remote.target, "--run-id", "resumed"),
        timeout_s=800,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    runs = [two.here, far.mirror(two.config, "resumed")]
    tail, again = (
        [
            (row["step"], row["loss"], row["grad_norm"])
            for row in read_jsonl(run.metrics)
            if row["stage"] == "sft"
        ][-half:]
        for run in runs
    )
    assert [step for step, *_ in again] == list(range(half + 1, SFT_STEPS + 1))
    assert tail == again
    weights = [(run.latest_checkpoint("sft") / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    metadata = json.loads((runs[1].latest_checkpoint("sft") / "metadata.json").read_text())
    assert metadata["step"] == SFT_STEPS
