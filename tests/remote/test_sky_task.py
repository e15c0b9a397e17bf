"""A run as a task of SkyPilot: its YAML against the parts of SkyPilot's schema that it uses. SkyPilot is not needed."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from base_config import Config
from rollouts.remote.sky_task import task_problems, task_text
from tests.cloud.test_rented_runs import RENTS
from tests.example_config import example_config, replace_at
from tests.remote.hosts import Laptop, write_config

# Of sky/utils/schemas.py (0.14.1): get_task_schema and get_resources_schema, which allow no other fields
TASK: dict[str, Any] = {"name": str, "num_nodes": int, "workdir": str, "setup": str, "run": str}
RESOURCES: dict[str, Any] = {"accelerators": list, "cpus": str, "disk_size": int, "use_spot": bool}


def as_skypilot_reads(text: str) -> dict[str, Any]:
    task = yaml.safe_load(text)
    resources = task["resources"]
    assert set(task) <= {*TASK, "resources", "secrets"} and set(resources) <= set(RESOURCES)
    assert all(isinstance(task[name], kind) for name, kind in TASK.items())
    assert all(isinstance(value, RESOURCES[name]) for name, value in resources.items())
    for script in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[script], text=True, check=True)
    return dict(task)


def config_of(**changes: Any) -> Config:
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path.replace("__", "."), value)
    return config


GPUS = {"target__device_type": "cuda", "target__gpu_ranks": [0, 1], "engine": None, "rl": None}
GPUS |= {"output__mode": "sft", "provision": RENTS, "host__secrets": ["HF_TOKEN"]}


def test_a_task_as_skypilot_reads_it() -> None:
    """Goal: GPUs, disk and code are the config's; the machine starts the same run, and rents none itself. Red with
    `provision` left in what it runs: it would have rented another machine."""
    text = task_text(
        config_of(**GPUS), "night", "configs/a b.py", ["seed=2"], root=Path("/r"), version="1.2"
    )
    task = as_skypilot_reads(text)
    assert task["resources"] == {"accelerators": ["H100:2"], "disk_size": 50, "use_spot": False}
    assert (task["name"], task["workdir"], task["num_nodes"]) == ("night", "/r", 1)
    assert task["secrets"] == {"HF_TOKEN": None}
    assert "pip install -q 'rollouts==1.2'" in task["setup"]
    command = "deploy 'configs/a b.py' --run-id night --set seed=2 --set provision=None"
    assert task["run"].rstrip().endswith(command)
    bare = as_skypilot_reads(task_text(config_of(), "n", "c.py", [], root=Path("/r"), version=""))
    assert bare["resources"] == {"cpus": "4+"} and "pip install -q .\n" in bare["setup"]


@pytest.mark.parametrize(
    ("changes", "runs", "alone", "message"),
    [
        ({}, 1, False, "--sky writes a task, which SkyPilot starts."),
        ({}, 3, True, "--sky writes one run, and --set asks for 3."),
        (
            {"target__hosts": 2},
            1,
            True,
            "the config asks for 2 hosts, and a task is one machine's.",
        ),
        ({**GPUS, "provision": None}, 1, True, "does not say which GPUs SkyPilot is to ask for."),
    ],
)
def test_what_is_no_task(changes: dict[str, Any], runs: int, alone: bool, message: str) -> None:
    """Goal: what a task cannot hold is said, and nothing is written."""
    (problem,) = task_problems(config_of(**changes), runs=runs, alone=alone)
    assert message in problem.message


def test_the_command_writes_it(laptop: Laptop) -> None:
    """Goal: `deploy CONFIG --sky FILE` writes the task and says how it is started, followed and ended; a config that
    git ignores would not be there. Red with that one written: its machine had no such file."""
    ignored = str(write_config(laptop.project))
    refused = laptop.deploy(ignored, "--sky", "task.yaml")
    assert refused.returncode == 2 and "does not send what git ignores" in refused.stderr
    assert not (laptop.project / "task.yaml").exists()
    config = str(Path(ignored).rename(laptop.project / "configs" / "job.json"))
    done = laptop.deploy(config, "--sky", "task.yaml", "--run-id", "night")
    assert done.returncode == 0, done.stderr
    assert "sky launch -c night task.yaml" in done.stdout
    assert "deploy attach night --remote night" in done.stdout
    task = as_skypilot_reads((laptop.project / "task.yaml").read_text())
    assert task["workdir"] == str(laptop.project)
    assert "deploy configs/job.json --run-id night" in task["run"]
