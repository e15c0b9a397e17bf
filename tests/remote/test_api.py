"""rollouts.api: what the commands do, from Python."""

import dataclasses
import json
import sys
from collections.abc import Callable

import pytest

from tests.remote.hosts import Host, Laptop, write_config

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


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_notebook(where: str, laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: a run is launched, waited for and read from Python, here and over SSH; nothing but what the script prints
    reaches stdout, and what cannot be is an exception. Red with the progress lines printed."""
    host = make_host() if where == "remote" else None
    notebook = dataclasses.replace(laptop, command=(sys.executable, "-P", "-c", NOTEBOOK))
    done = notebook.deploy(str(write_config(laptop.project)), host.target if host else "")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["state"], found["status"], found["same"], found["config"]) == ("done", "done", True, True)
    assert found["steps"] == [1, 2, 3] and found["stages"] == ["rl", "sft"]
    assert found["ended"] == "run_ended"
    assert "from-python" in found["refusals"][0] and "there is no run 'nowhere'" in found["refusals"][1]
