"""What goes wrong in a real run: one clear message, exit code not 0, nothing left running.

What needs no real training is in tests/worker (ports, limits, deaths), tests/worker/test_trainer_jobs.py (a user's
mistakes) and tests/remote (deploy killed in every phase).
"""

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rollouts.run_dir import RunDir
from tests.e2e.conftest import copy_of_repository, save_config, short_demo
from tests.remote.hosts import Laptop, wait_for
from tests.run_processes import commands_of
from tests.training import tiny_task


def deploy_fails(laptop: Laptop, config: Path, run_id: str) -> str:
    done = laptop.deploy(str(config), "--run-id", run_id, timeout_s=800)
    assert done.returncode not in (0, 2), done.stdout + done.stderr
    assert commands_of(run_id) == []
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def rl_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What makes the demo an RL run from a checkpoint, without an SFT stage before it."""
    model = tmp_path_factory.mktemp("model")
    tiny_task.tiny_model(seed=1).save_pretrained(model)
    tiny_task.tiny_tokenizer().save_pretrained(model)
    return {"output.mode": "rl", "model.name": str(model), "model.init": "pretrained"}


@pytest.mark.timeout(900)
def test_a_data_row_that_does_not_parse(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: an RL row that is broken is one error line, naming file and line, and nothing is started."""
    laptop.project = copy_of_repository(tmp_path / "project")
    rows = [
        '{"question": "abc", "answer": "cba"}',
        '{"question": "abd", "answer": "dba"}',
        '{"question": "abe", "ans',
    ]
    broken = "configs/data/letters/broken.jsonl"
    (laptop.project / broken).write_text("\n".join(rows + rows[:2]) + "\n")
    save_config(short_demo(), {"data.rl_mixture.0.name": broken}, tmp_path / "job.json")
    done = laptop.deploy(str(tmp_path / "job.json"), "--run-id", "badrow", timeout_s=800)
    assert (
        done.returncode == 2
        and f"{broken}:3" in done.stderr
        and "Nothing was started." in done.stderr
    )
    assert not (laptop.rollouts_home / "runs" / "badrow").exists()


@pytest.mark.timeout(900)
def test_an_engine_that_never_gets_healthy(
    laptop: Laptop, tmp_path: Path, rl_alone: dict[str, Any]
) -> None:
    """Goal: the deadline is kept and its field named; the engine is gone. Red when readiness was not waited for."""
    save_config(
        short_demo(), {**rl_alone, "limits.engine_ready_timeout_s": 0.2}, tmp_path / "job.json"
    )
    text = deploy_fails(laptop, tmp_path / "job.json", "never")
    assert "engine-0" in text and "engine_ready_timeout_s" in text


@pytest.mark.timeout(900)
def test_ctrl_c_detaches_and_stop_ends_everything(
    laptop: Laptop, tmp_path: Path, rl_alone: dict[str, Any]
) -> None:
    """Goal: Ctrl-C leaves the run alone and says how to come back; stop ends trainer, engine and tmux. Red when SIGINT
    reached the run's processes."""
    save_config(short_demo(), {**rl_alone, "rl.num_epochs": 500}, tmp_path / "job.json")
    process = laptop.start(str(tmp_path / "job.json"), "--run-id", "long")
    run = RunDir(laptop.rollouts_home / "runs" / "long")
    wait_for(run.rollouts.exists, "RL's first samples", timeout_s=600)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 130
    assert all(f"deploy {verb} long" in out + err for verb in ("attach", "stop", "pull"))
    assert len(commands_of("long")) >= 3
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
    assert commands_of("long") == []
    row = next(row for row in laptop.json("ls") if row["run_id"] == "long")
    assert row["state"] == "stopped" and row["exit_code"] not in (0, None)
