"""What goes wrong in a real run: one clear message, exit code not 0, nothing left running."""

import json
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.run_dir import RunDir, read_jsonl
from tests.e2e.conftest import ROOT, processes_of
from tests.remote.hosts import Host, Laptop, wait_for


def deploy_fails(laptop: Laptop, config: Path, run_id: str) -> str:
    done = laptop.deploy(str(config), "--run-id", run_id, timeout_s=800)
    assert done.returncode not in (0, 2), done.stdout + done.stderr
    assert processes_of(run_id) == []
    return done.stdout + done.stderr


@pytest.fixture
def broken_data() -> Any:
    """A data file in the repository whose third row does not parse; removed afterwards."""
    file = ROOT / "configs" / "data" / "letters" / "broken_for_test.jsonl"
    rows = ['{"question": "abc", "answer": "cba"}', '{"question": "abd", "answer": "dba"}', '{"question": "abe", "ans']
    file.write_text("\n".join(rows) + "\n")
    yield file.relative_to(ROOT)
    file.unlink()


@pytest.mark.timeout(900)
def test_a_data_row_that_does_not_parse(laptop: Laptop, write_config: Callable[..., Path], broken_data: Path) -> None:
    """Goal: an RL row that is broken stops the run before SFT trains, naming file and line. Red when load_data read
    only its own stage's mixture: SFT ran first."""
    text = deploy_fails(laptop, write_config({"data.rl_mixture.0.name": str(broken_data)}), "badrow")
    assert f"{broken_data}:3" in text
    assert not (RunDir(laptop.rollouts_home / "runs" / "badrow").metrics).exists()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rl.reward_fn": "rollouts.training.rewards.no_such"}, "has no 'no_such'"),
        ({"rl.filter_fn": "no_such_package.keep"}, "no module 'no_such_package'"),
        ({"sft.matrix_lr": 1e30, "sft.num_iterations": 8, "output.mode": "sft"}, "not applied"),
    ],
    ids=["reward", "filter", "diverges"],
)
def test_a_trainer_that_raises(
    laptop: Laptop, write_config: Callable[..., Path], changes: dict[str, Any], reason: str
) -> None:
    """Goal: a mistake is one error line at the laptop, with the reason. Red when only torchrun's report arrived."""
    assert reason in deploy_fails(laptop, write_config(changes), "raises")


@pytest.mark.timeout(900)
def test_an_engine_that_never_gets_healthy(laptop: Laptop, write_config: Callable[..., Path]) -> None:
    """Goal: the deadline is kept and its field named; the engine is gone. Red when readiness was not waited for."""
    text = deploy_fails(laptop, write_config({"limits.engine_ready_timeout_s": 0.2}), "never")
    assert "engine-0" in text and "engine_ready_timeout_s" in text


@pytest.mark.timeout(900)
def test_a_port_taken_after_the_plan(laptop: Laptop, write_config: Callable[..., Path]) -> None:
    """Goal: a stranger on the engine's port is not taken for the engine. Red when any 200 counted as ready."""
    config = write_config({})
    port = json.loads(config.read_text())["engine"]["sglang_port"]
    process = laptop.start(str(config), "--run-id", "taken")
    run = RunDir(laptop.rollouts_home / "runs" / "taken")
    wait_for(run.metrics.exists, "SFT's first metric", timeout_s=600)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        out, err = process.communicate(timeout=300)
    assert process.returncode not in (0, 2)
    assert str(port) in out + err
    assert processes_of("taken") == []


@pytest.mark.timeout(900)
def test_ctrl_c_detaches_and_stop_ends_everything(laptop: Laptop, write_config: Callable[..., Path]) -> None:
    """Goal: Ctrl-C leaves the run alone and says how to come back; stop ends trainer, engine and tmux. Red when SIGINT
    reached the run's processes."""
    config = write_config({"rl.num_epochs": 500})
    process = laptop.start(str(config), "--run-id", "long")
    run = RunDir(laptop.rollouts_home / "runs" / "long")
    wait_for(run.rollouts.exists, "RL's first samples", timeout_s=600)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert all(f"deploy {verb} long" in out + err for verb in ("attach", "stop", "pull"))
    assert len(processes_of("long")) >= 3
    sessions = subprocess.run(
        ["tmux", "list-windows", "-t", "=long", "-F", "#W"],
        env={"TMUX_TMPDIR": str(laptop.tmux_dir), "PATH": laptop.environment["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"supervisor", "engine-0", "trainer"} <= set(sessions.stdout.split())
    stopped = laptop.deploy("stop", "long")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert processes_of("long") == []
    row = next(row for row in laptop.json("ls") if row["run_id"] == "long")
    assert row["state"] == "stopped" and row["exit_code"] not in (0, None)


PHASES: dict[str, Callable[[RunDir], bool]] = {
    "sync": lambda run: run.code_tree.exists(),
    "launch": lambda run: run.plan.exists(),
    "bootstrap": lambda run: "building" in [row.get("action") for row in read_jsonl(run.events)],
    "sft": lambda run: bool(read_jsonl(run.metrics)),
    "rl": lambda run: run.rollouts.exists(),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
def test_killing_deploy_loses_nothing(
    laptop: Laptop, remote: Host, write_config: Callable[..., Path], phase: str
) -> None:
    """Goal: after kill -9 of deploy at any phase, attach goes on to the end and every line is here exactly once. Red
    when attach only watched: a launch killed while syncing never went on."""
    config = write_config({})
    if phase == "bootstrap":  # killed in the middle of a real build, which goes on without the laptop
        (remote.home / "envs").unlink()
    process = laptop.start(str(config), "--remote", remote.target, "--run-id", phase)
    run = RunDir(remote.run_path(phase))
    wait_for(lambda: PHASES[phase](run), phase, timeout_s=600)
    process.kill()
    process.communicate()
    done = laptop.deploy("attach", phase, timeout_s=800)
    assert done.returncode == 0, done.stdout + done.stderr
    mirror = RunDir(config.parent / "results" / "short" / phase)
    for file in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl", "events.jsonl"):
        assert (mirror.path / file).read_bytes() == (run.path / file).read_bytes(), file
    assert [row["step"] for row in read_jsonl(mirror.metrics) if row["stage"] == "rl"] == [1, 2, 3, 4]
    assert processes_of(phase) == []
