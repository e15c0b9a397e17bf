"""The real thing from end to end: the real repository, environment, torchrun, engine server, sshd, rsync and tmux."""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from base_config import Config, load_config
from rollouts.run_dir import RunDir
from tests.built_environments import ENVIRONMENTS, installer_settings
from tests.example_config import replace_at
from tests.ports import free_port
from tests.remote.hosts import Host, Laptop, git, host, kill_tmux, make_laptop
from tests.run_processes import processes_of

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "configs" / "00_cpu_sft_rl.py"


@pytest.fixture(scope="session")
def environments() -> Path:
    """Environments on this machine outlive the tests: one is built in minutes, and every run here wants the same."""
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    return ENVIRONMENTS


@pytest.fixture(scope="session")
def tool_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH on which python3 is the one that runs the tests: environments are keyed by its version. And their uv."""
    tools = tmp_path_factory.mktemp("tools")
    (tools / "uv").symlink_to(Path(sys.executable).with_name("uv"))
    return f"{Path(sys.base_prefix) / 'bin'}:{tools}:{os.environ['PATH']}"


@contextmanager
def a_laptop(directory: Path, environments: Path, tool_path: str) -> Iterator[Laptop]:
    """A laptop with a home of its own, in this repository as it stands."""
    tmux_dir = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    made = make_laptop(directory, ROOT, tmux_dir)
    made.environment.update({"PATH": tool_path, **installer_settings()})
    made.rollouts_home.mkdir()
    (made.rollouts_home / "envs").symlink_to(environments)
    yield made
    kill_tmux(tmux_dir)


@contextmanager
def a_remote(directory: Path, laptop: Laptop, environments: Path, tool_path: str) -> Iterator[Host]:
    """An sshd with a home of its own, which the laptop knows and may log in to."""
    with host(
        directory, laptop.key, path=Path(tool_path), environment=installer_settings()
    ) as made:
        made.home.mkdir(parents=True)
        (made.home / "envs").symlink_to(environments)
        laptop.know(made)
        yield made


@pytest.fixture
def laptop(tmp_path: Path, environments: Path, tool_path: str) -> Iterator[Laptop]:
    with a_laptop(tmp_path / "laptop", environments, tool_path) as made:
        yield made


def copy_of_repository(directory: Path) -> Path:
    """This repository as it stands, for a test that changes it: other tests send it to their hosts meanwhile."""
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split(
        "\0"
    ):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name, follow_symlinks=False)
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "a copy")
    return directory


@dataclass(frozen=True)
class Far:
    """A laptop and a host that it reaches over SSH, for tests that look at one run from several sides."""

    laptop: Laptop
    remote: Host
    directory: Path

    def mirror(self, config: Config, run_id: str) -> RunDir:
        return RunDir(self.directory / "results" / config.output.experiment_name / run_id)


@pytest.fixture(scope="module")
def far(
    tmp_path_factory: pytest.TempPathFactory, environments: Path, tool_path: str
) -> Iterator[Far]:
    directory = tmp_path_factory.mktemp("far")
    with (
        a_laptop(directory / "laptop", environments, tool_path) as laptop,
        a_remote(directory / "host", laptop, environments, tool_path) as remote,
    ):
        yield Far(laptop, remote, directory)


def save_config(config: Config, changes: Mapping[str, Any], file: Path) -> Config:
    """`config` with changes by field path ({"rl.num_epochs": 1}), a free port and its results beside
    `file`, where it is saved."""
    own = {
        "engine.sglang_port": free_port(),
        "output.save_dir": str(file.parent / "results"),
        "host.installer": "uv",  # pip takes minutes of this: tests/worker have it install small packages
        "host.torch_build": "index",  # whatever this machine offers: its environments are shared by all tests
    }
    for path, value in {**own, **changes}.items():
        config = replace_at(config, path, value)
    config.save(file)
    return config


def short_demo(demo: Path = DEMO) -> Config:
    """The demo, cut to a handful of steps."""
    config = load_config(demo)
    assert config.sft is not None and config.rl is not None and config.engine is not None
    changes: dict[str, Any] = {
        "sft.num_iterations": 4,
        "sft.eval_every": 2,
        "rl.num_epochs": 1,
        "rl.examples_per_step": 4,
        "rl.num_samples": 4,
        "rl.eval_every": 2,
        "rl.eval_examples": 20,
        "data.rl_mixture.0.max_samples": 16,
        "data.eval_mixture.0.max_samples": 40,
        "host.disk_free_gib_min": 0.1,
        "output.experiment_name": "short",
    }
    for path, value in changes.items():
        config = replace_at(config, path, value)
    return config


# 127.x, ::1, ::ffff:127.0.0.1
LOOPBACK = "7F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"


@contextmanager
def sockets_seen(run_id: str) -> Iterator[set[tuple[str, str]]]:
    """(address in hexadecimal, process) of every socket on which a process of the run listened meanwhile, as /proc
    shows them. Looked at several times a second."""
    seen: set[tuple[str, str]] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            seen.update(_listening(run_id))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def beyond_loopback(seen: set[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(found for found in seen if not found[0].endswith(LOOPBACK))


def _listening(run_id: str) -> Iterator[tuple[str, str]]:
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    for pid in processes_of(run_id):
        entry = Path(f"/proc/{pid}")
        try:
            name = (entry / "comm").read_text().strip()
            held = {os.readlink(file) for file in (entry / "fd").iterdir()}
        except OSError:  # ended meanwhile
            continue
        yield from ((sockets[link], name) for link in held & sockets.keys())
