"""`deploy stop` in every phase of a run, with the real worker in a real tmux: nothing is left, and what the steps had
done is in a checkpoint."""

import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl
from tests.remote.hosts import Host, Laptop, wait_for, write_config
from tests.remote.link import link
from tests.remote.test_whole_runs import quiet


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run.events) if row["kind"] == kind]


REACHED: dict[str, Callable[[RunDir], Any]] = {
    "building": lambda run: any(
        row.get("action") == "building" for row in events(run, "environment")
    ),
    "engine starting": lambda run: (
        any(row["stage"] == "rl" for row in events(run, "stage_started"))
        and run.process("engine-0").exists()
    ),
    "training": lambda run: run.heeds_stop.exists() and read_jsonl(run.metrics),
    "training, --now": lambda run: run.heeds_stop.exists() and read_jsonl(run.metrics),
    "checkpointing": lambda run: any(run.checkpoints.glob("sft/.*.tmp/model.safetensors")),
    "checkpointing, --now": lambda run: any(run.checkpoints.glob("sft/.*.tmp/model.safetensors")),
    "evaluating": lambda run: len(read_jsonl(run.metrics)) == 3 and not run.heeds_stop.exists(),
    "directory gone": lambda run: run.heeds_stop.exists() and read_jsonl(run.metrics),
    "ended": lambda run: run.exit("run", "supervisor").exists(),
}


@pytest.fixture
def silent_index() -> Iterator[dict[str, str]]:
    """An index of packages that never answers: variables for pip, which waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        yield {"PIP_INDEX_URL": url, "PIP_DEFAULT_TIMEOUT": "600"}


@pytest.mark.parametrize("phase", REACHED)
def test_stop(phase: str, laptop: Laptop, tmp_path: Path, silent_index: dict[str, str]) -> None:
    """Goal: whatever the run does, one stop ends all of it, and says what it has. While steps are trained it leaves a
    whole checkpoint of the last one, and the next stage does not begin."""
    run_id = f"stop-{secrets.token_hex(4)}"
    never = str(tmp_path / "never")
    env = (
        {}
        if phase == "ended"
        else {"STAND_IN_STEPS": "9", "STAND_IN_WAIT": never, "STAND_IN_ENGINE_WAIT": never}
    )
    if phase == "engine starting":
        del env["STAND_IN_WAIT"]
    if phase.startswith("checkpointing"):
        env = {"STAND_IN_HOLD": "checkpoint"}
    if phase == "evaluating":
        env = {"STAND_IN_HOLD": "evaluation"}
    if phase == "building":
        (laptop.rollouts_home / "envs").unlink()
        needs = laptop.project / "pyproject.toml"
        needs.write_text(needs.read_text().replace("train = []", "train = ['never-comes']"))
        env |= silent_index
    config = str(write_config(laptop.project, env=env))
    assert laptop.deploy(config, "--run-id", run_id, "--detach").returncode == 0
    run = RunDir(laptop.rollouts_home / "runs" / run_id)
    wait_for(lambda: REACHED[phase](run), phase)
    if phase == "directory gone":
        while run.path.exists():  # the run goes on writing into it
            shutil.rmtree(run.path, ignore_errors=True)
        done = laptop.deploy("stop", run_id)  # the supervisor may have ended the run by then
        assert done.returncode == 0 or "its directory is gone" in done.stderr, done.stderr
        quiet(run_id)
        return
    said = laptop.json("stop", run_id, *(["--now"] if phase.endswith("--now") else []))
    quiet(run_id)
    ended = phase == "ended"
    assert (said["state"], said["exit_code"]) == (("done", 0) if ended else ("stopped", 143))
    newest = {
        "training": "checkpoints/sft/step_000002",
        "training, --now": "checkpoints/sft/step_000001",
        "engine starting": "checkpoints/sft/step_000009",
        "checkpointing": "checkpoints/sft/step_000002",
        "evaluating": "checkpoints/sft/step_000003",
        "ended": "checkpoints/rl/step_000003",
    }.get(phase)
    assert said["checkpoint"] == newest
    assert newest is None or manifest_problems(run.path / newest) == ()
    if "engine" not in phase and not ended and phase != "building":
        assert list(run.checkpoints.glob("sft/step_*/.*")) == []
        assert [row["stage"] for row in events(run, "stage_started")] == ["sft"]
    if run.path.exists():
        assert list(run.path.glob(".*.tmp")) == []
    assert laptop.json("stop", run_id)["state"] == said["state"], "a second one finds the same"


def test_stop_while_the_code_is_sent(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: a run that is stopped before its launch, by this laptop or another, is not launched; attach does it all the
    same."""
    host, run_id = make_host(), f"stop-{secrets.token_hex(4)}"
    (laptop.project / "big.bin").write_bytes(secrets.token_bytes(4_000_000))
    config = str(write_config(laptop.project, output__mode="sft"))
    with link(host.port) as way:
        way.down_at = 2_000_000  # in the middle of the upload
        target = laptop.know_by(host, way.port)
        deploying = laptop.start(config, "--remote", target, "--run-id", run_id)
        wait_for(lambda: way.is_down or deploying.poll() is not None, "the upload")
        deploying.send_signal(signal.SIGSTOP)
        way.set_down(False)
        assert laptop.json("stop", run_id)["state"] == "not launched"
        deploying.send_signal(signal.SIGCONT)
        _, err = deploying.communicate(timeout=250)
        assert (
            deploying.returncode == 2
            and f"`deploy stop {run_id}` came before" in err
            and "Nothing was started." in err
        )
        assert laptop.deploy("attach", run_id, stdout=subprocess.DEVNULL).returncode == 0
        quiet(run_id)
