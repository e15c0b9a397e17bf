"""What one installs: the wheel alone, in an environment without torch, and a repository that is no clone."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from base_config import Config
from rollouts.config import as_source
from rollouts.manifest import read_tree, tree_digest, tree_names
from rollouts.run_dir import RunDir, read_jsonl
from tests.docs_blocks import blocks_of
from tests.e2e.conftest import (
    ROOT,
    a_laptop,
    a_remote,
    copy_of_repository,
    short_demo,
)
from tests.example_config import replace_at
from tests.ports import free_port
from tests.remote.hosts import Host, Laptop, git
from tests.run_processes import commands_of
from tests.training.process_nursery import shared

BASE_PACKAGES_MAX = 19  # fabric, paramiko, rich and typer, with what they bring; and rollouts
LETTERS = ROOT / "configs" / "data" / "letters"
REWARD = """
import random  # Python's: the one beside this file comes last

import helpers


def score(sample):
    return helpers.share(sample.response, sample.prompt["answer"]) + 0 * random.random()
"""
HELPERS = """
def share(got, wanted):
    return sum(one == other for one, other in zip(got, wanted)) / max(len(got), len(wanted), 1)
"""
RAISES = "raise ImportError('another module was meant')\n"
# What a repository may have without a thought of rollouts: names of its modules, of Python's, of packages it needs
ODD = (
    "base_config.py",
    "deploy.py",
    "random.py",
    "types.py",
    "tests/__init__.py",
    "datasets/__init__.py",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel that `python -m build` makes of the sdist here, and what that requires."""
    directory = tmp_path_factory.mktemp("installed")
    source, tools = copy_of_repository(directory / "source"), directory / "tools"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", "--target", str(tools), "build"], check=True)
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(directory),
        str(source),
    ]
    subprocess.run(
        build, check=True, env={**os.environ, "PYTHONPATH": str(tools)}, stdout=subprocess.DEVNULL
    )
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
    (wheel,) = directory.glob("rollouts-*.whl")
    install = [*pip, "--python", str(directory / "venv"), "install", str(wheel)]
    subprocess.run(install, check=True)
    return directory / "venv"


def answer(installed: Path, cwd: Path, *arguments: str) -> str:
    """What a program of the environment prints, from a directory that is nothing of ours."""
    command = [str(installed / "bin" / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_wheel_brings(installed: Path, tmp_path: Path) -> None:
    """Goal: both commands, the config's names, the locks, the tiny model; few packages, and no torch."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "of another project")
    for name in ODD[:2]:
        (tmp_path / name).write_text(RAISES)
    for command in (("deploy",), ("rollouts",), ("python", "-m", "rollouts")):
        assert answer(installed, tmp_path, *command, "--version") == "rollouts 0.1.0\n"
        assert answer(installed, tmp_path, *command, "--help").startswith("Usage: deploy")
    program = "import rollouts.config as c, base_config as b; print(set(b.__all__) <= set(c.__all__), b.__file__)"
    assert answer(installed, tmp_path.parent, "python", "-c", program).startswith("True ")
    found = {
        file.name: file.read_bytes()
        for file in installed.glob("lib/*/site-packages/rollouts/requirements/*")
    }
    assert found == {file.name: file.read_bytes() for file in (ROOT / "requirements").iterdir()}
    model = {
        file.name: file.read_bytes()
        for file in installed.glob("lib/*/site-packages/rollouts/models/*/*")
    }
    assert model == {
        file.name: file.read_bytes() for file in (ROOT / "configs/models/tiny_qwen2").iterdir()
    }
    listed = json.loads(
        answer(installed, tmp_path, "python", "-m", "pip", "list", "--format", "json")
    )
    names = {row["name"].lower() for row in listed} - {"pip", "setuptools"}
    assert "rollouts" in names and not names & {"torch", "numpy", "transformers"}
    assert len(names) <= BASE_PACKAGES_MAX, sorted(names)


@pytest.fixture
def laptop(tmp_path: Path, installed: Path, environments: Path, tool_path: str) -> Iterator[Laptop]:
    """A laptop on which the wheel is installed, in a repository of its own that begins empty."""
    with a_laptop(tmp_path / "laptop", environments, tool_path) as made:
        made.project, made.command = tmp_path / "mine", (str(installed / "bin/deploy"),)
        made.project.mkdir()
        yield made


@pytest.fixture
def remote(tmp_path: Path, laptop: Laptop, environments: Path, tool_path: str) -> Iterator[Host]:
    with a_remote(tmp_path / "host", laptop, environments, tool_path) as made:
        yield made


def write_repository(directory: Path) -> Config:
    """One's own data, model, rewards and config, and names that others have too."""
    git(directory, "init", "-q")
    (directory / "rewards").mkdir()
    (directory / "rewards/mine.py").write_text(REWARD)
    (directory / "helpers.py").write_text(HELPERS)
    for name in ODD:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(RAISES)
    shutil.copytree(ROOT / "configs/models/tiny_qwen2", directory / "model")
    (directory / "rollouts").mkdir()
    for name in ("train_sft", "train_rl", "test"):
        lines = (LETTERS / f"{name}.jsonl").read_text().splitlines(keepends=True)[:40]
        (directory / "rollouts" / f"{name}.jsonl").write_text("".join(lines))
    mine = {
        "model.name": "model",
        "data.sft_mixture.0.name": "rollouts/train_sft.jsonl",
        "data.rl_mixture.0.name": "rollouts/train_rl.jsonl",
        "data.eval_mixture.0.name": "rollouts/test.jsonl",
        "rl.reward.fn": "rewards.mine.score",
        "rl.reward.workers": 1,  # a process of its own, which has to find the same modules
        "host.constraints_file": "rollouts:requirements/constraints.txt",
        "host.installer": "uv",
        "host.torch_build": "index",  # as other tests have it, whose environment this is
        "engine.sglang_port": free_port(),
        "output.experiment_name": "mine",
    }
    config = short_demo()
    for path, value in mine.items():
        config = replace_at(config, path, value)
    (directory / "run.py").write_text(as_source(config))
    return config


@pytest.mark.timeout(1500)  # the environment may have to be built first
def test_a_repository_of_one_s_own(laptop: Laptop, remote: Host) -> None:
    """Goal: from an empty directory and the wheel to a trained checkpoint: own config, data, model and reward, names
    of Python's and of packages in the way; the record has both digests, of what lies on the host; `deploy data` there
    prints what it prints here, and leaves nothing."""
    write_repository(laptop.project)
    target = ["--remote", remote.target]
    done = laptop.deploy("run.py", *target, "--run-id", "own", timeout_s=1400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    mirror = RunDir(laptop.project / "runs/mine/own")
    assert json.loads(mirror.status.read_text())["state"] == "done"
    assert json.loads(laptop.deploy("ls", "--json").stdout)[0]["state"] == "done"
    rewards = [row["reward_mean"] for row in read_jsonl(mirror.metrics) if "reward_mean" in row]
    assert rewards and all(0 <= reward <= 1 for reward in rewards) and any(rewards)
    home = remote.home
    there = RunDir(home / "runs/own")
    for tree, manifest in (
        (there.code_tree, mirror.code_manifest),
        (there.code_package, mirror.package_manifest),
    ):
        names = [name for name in tree_names(tree) if "__pycache__" not in name]
        assert tree_digest(read_tree(tree, names)) == json.loads(manifest.read_text())["digest"]
    assert (
        not (there.code_tree / "rollouts/run_dir").exists()
        and (there.code_package / "rollouts/run_dir").is_dir()
    )
    assert git(laptop.project, "status", "--porcelain").count("runs") == 0, (
        "results are not the repository's"
    )
    assert commands_of("own") == []
    # it has the packages
    here = dataclasses.replace(laptop, command=(sys.executable, str(ROOT / "deploy.py")))
    wanted, found = here.deploy("data", "run.py"), laptop.deploy("data", "run.py", *target)
    assert (found.returncode, found.stdout) == (
        wanted.returncode,
        wanted.stdout,
    ) and wanted.stdout, found.stderr
    assert not (home / "previews").exists() and (home / "code/mine").resolve() == there.code_tree


TUTORIAL = "docs/guide/tutorial.md"
TYPED_MAX = 15  # lines
# What this machine needs of each run: the environment of other tests, a free port. A stage of RL is cut to one epoch.
HERE = (
    "--set host.installer=uv --set host.torch_build=index --set engine.sglang_port=0"
    " --set host.disk_free_gib_min=0.1 --set rl.num_epochs=1"
)


def typed_lines() -> list[str]:
    blocks = blocks_of(TUTORIAL, (ROOT / TUTORIAL).read_text(encoding="utf-8"))
    lines = [
        line
        for block in blocks
        if block.language in ("sh", "python")
        for line in block.text.splitlines()
    ]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.timeout(1500)  # the environment may have to be built first
def test_the_tutorial(laptop: Laptop, remote: Host, installed: Path, tmp_path: Path) -> None:
    """Goal: what the page has one type, in an empty directory with the wheel alone, here and over a real sshd: both
    runs end with 0, the loss falls, the reward rises."""
    assert len(typed_lines()) <= TYPED_MAX
    laptop.ssh_config(f"Host gpu-7\n  HostName 127.0.0.1\n  Port {remote.port}\n")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/deploy"
    real = shlex.quote(str(installed / "bin/deploy"))
    program.write_text(
        f'#!/bin/sh\ncase $1 in *.py) exec {real} "$@" {HERE};; *) exec {real} "$@";; esac\n'
    )
    program.chmod(0o755)
    laptop.environment["PATH"] = f"{tmp_path / 'bin'}:{laptop.environment['PATH']}"
    log, arguments = tmp_path / "log", [str(laptop.project), TUTORIAL, "", "True"]
    started = shared().start(
        "tests.docs_blocks", arguments, log, environment=laptop._environment({})
    )
    assert shared().wait(started) == 0, log.read_text()[-6000:]
    for name in ("here", "there"):
        rows = read_jsonl(RunDir(laptop.project / "runs/letters" / name).metrics)
        losses = [row["loss"] for row in rows if row["stage"] == "sft"]
        rewards = [row["reward_mean"] for row in rows if row["stage"] == "rl"]
        assert losses[-1] < losses[0] / 4, losses
        assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.1, rewards
