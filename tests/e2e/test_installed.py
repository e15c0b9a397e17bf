"""What one installs: the wheel alone, in an environment without torch, and a repository that is no clone."""

import json
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
from tests.e2e.conftest import (
    ROOT,
    a_laptop,
    a_remote,
    copy_of_repository,
    processes_of,
    short_demo,
)
from tests.example_config import replace_at
from tests.remote.hosts import Host, Laptop, free_port, git

BASE_PACKAGES_MAX = 24  # typer brings pydantic, fabric its own: both are what the project is built on
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
ODD = ("base_config.py", "deploy.py", "random.py", "types.py", "tests/__init__.py", "datasets/__init__.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel that this repository builds, and what that requires."""
    directory = tmp_path_factory.mktemp("installed")
    source = copy_of_repository(directory / "source")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(source)]
    subprocess.run(build, check=True)
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
    """Goal: both commands, the config's names, the locks; few packages, and no torch. Red with requirements/ left out,
    and with `deploy` taken from a deploy.py of the directory."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "of another project")
    for name in ODD[:2]:
        (tmp_path / name).write_text(RAISES)
    for command in (("deploy",), ("rollouts",), ("python", "-m", "rollouts")):
        assert answer(installed, tmp_path, *command, "--version") == "rollouts 0.1.0\n"
        assert answer(installed, tmp_path, *command, "--help").startswith("Usage: deploy")
    program = "import rollouts.config as c, base_config as b; print(set(b.__all__) <= set(c.__all__), b.__file__)"
    assert answer(installed, tmp_path.parent, "python", "-c", program).startswith("True ")
    found = {file.name: file.read_bytes() for file in installed.glob("lib/*/site-packages/rollouts/requirements/*")}
    assert found == {file.name: file.read_bytes() for file in (ROOT / "requirements").iterdir()}
    listed = json.loads(answer(installed, tmp_path, "python", "-m", "pip", "list", "--format", "json"))
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
@pytest.mark.parametrize("where", ["here", "over SSH"])
def test_a_repository_of_one_s_own(where: str, laptop: Laptop, remote: Host) -> None:
    """Goal: from an empty directory and the wheel to a trained checkpoint: own config, data, model and reward, names
    of Python's and of packages in the way; the record has both digests, of what lies on the host. Red with the
    repository first on the search path, with the trainer started in code/package, and with one tree sent."""
    write_repository(laptop.project)
    target = ["--remote", remote.target] if where == "over SSH" else []
    done = laptop.deploy("run.py", *target, "--run-id", "own", timeout_s=1400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    mirror = RunDir(laptop.project / "runs/mine/own")
    assert json.loads(mirror.status.read_text())["state"] == "done"
    assert json.loads(laptop.deploy("ls", "--json").stdout)[0]["state"] == "done"
    rewards = [row["reward_mean"] for row in read_jsonl(mirror.metrics) if "reward_mean" in row]
    assert rewards and all(0 <= reward <= 1 for reward in rewards) and any(rewards)
    home = remote.home if where == "over SSH" else laptop.rollouts_home
    there = RunDir(home / "runs/own")
    for tree, manifest in ((there.code_tree, mirror.code_manifest), (there.code_package, mirror.package_manifest)):
        names = [name for name in tree_names(tree) if "__pycache__" not in name]
        assert tree_digest(read_tree(tree, names)) == json.loads(manifest.read_text())["digest"]
    assert not (there.code_tree / "rollouts/run_dir").exists() and (there.code_package / "rollouts/run_dir").is_dir()
    assert git(laptop.project, "status", "--porcelain").count("runs") == 0, "results are not the repository's"
    assert processes_of("own") == []
