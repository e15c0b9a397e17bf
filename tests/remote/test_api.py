"""rollouts.api: what the commands do, from Python."""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.api import DeployError, Run
from rollouts.run_dir import RunDir, read_jsonl
from tests.remote.hosts import WAIT_S, Host, Laptop, wait_for, write_config

NOTEBOOK = """
import json, sys
from base_config import load_config
from rollouts.api import DeployError, deploy, find, runs

config_path, remote = sys.argv[1], sys.argv[2] or None
run = deploy(load_config(config_path), remote=remote, run_id="from-python")
state = run.wait()
rows = run.metrics(stage="rl")
try:
    deploy(load_config(config_path), remote=remote, run_id="from-python")
    refusal = ""
except DeployError as error:
    refusal = str(error)
try:
    find("nowhere")
except DeployError as error:
    refusal_too = str(error)
json.dump({
    "state": state, "status": run.status()["state"], "same": [run] == runs() == [find("from-p")],
    "steps": [row["step"] for row in rows], "stages": sorted({row["stage"] for row in run.metrics()}),
    "ended": run.events()[-1]["kind"], "config": run.config == load_config(config_path),
    "refusals": [refusal, refusal_too],
}, sys.stdout)
"""


INTERRUPTED = """
import sys
from base_config import load_config
from rollouts.api import deploy

try:
    deploy(load_config(sys.argv[1]), run_id="left").wait()
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_waiting(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: the run goes on, and what follows or stops it is told, in Python and in a terminal."""
    config = str(write_config(laptop.project, env={"STAND_IN_WAIT": str(tmp_path / "go")}))
    notebook = dataclasses.replace(laptop, command=(sys.executable, "-P", "-c", INTERRUPTED))
    process = notebook.start(config, start_new_session=True)
    mirror = RunDir(laptop.project / "runs/example/left")
    wait_for(
        lambda: mirror.metrics.exists() and read_jsonl(mirror.metrics), "the first step, followed"
    )
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (0, "interrupted\n"), err
    assert (
        "find('left').wait() follows it again, .stop() ends it" in err and "deploy stop left" in err
    ), err
    assert laptop.json("status", "left")["state"] == "running"
    (tmp_path / "go").touch()
    assert laptop.deploy("attach", "left").returncode == 0


def test_a_frame_without_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: what to install is said. Red with ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DeployError, match="pandas is not installed") as caught:
        Run("a", "local", tmp_path).frame()
    assert "pip install pandas" in caught.value.text()


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_notebook(where: str, laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: a run is launched, waited for and read from Python, here and over SSH; nothing but what the script prints
    reaches stdout, and what cannot be is an exception. Red with the progress lines printed."""
    host = make_host() if where == "remote" else None
    notebook = dataclasses.replace(laptop, command=(sys.executable, "-P", "-c", NOTEBOOK))
    done = notebook.deploy(str(write_config(laptop.project)), host.target if host else "")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["state"], found["status"], found["same"], found["config"]) == (
        "done",
        "done",
        True,
        True,
    )
    assert found["steps"] == [1, 2, 3] and found["stages"] == ["rl", "sft"]
    assert found["ended"] == "run_ended"
    assert (
        "from-python" in found["refusals"][0]
        and "there is no run 'nowhere'" in found["refusals"][1]
    )
