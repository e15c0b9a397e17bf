"""Hosts and laptops for this folder: what is slow to make is made once."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.remote.hosts import (
    Host,
    Laptop,
    host,
    keygen,
    kill_tmux,
    make_laptop,
    make_project,
    tool_directory,
)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests share: a key for logging in, all tools on a PATH, environments that were built once."""
    directory = tmp_path_factory.mktemp("shared")
    keygen(directory / "key")
    tool_directory(directory / "bin")
    (directory / "envs").mkdir()
    make_project(directory / "project")
    return directory


@pytest.fixture
def project(shared: Path, tmp_path: Path) -> Path:
    """A git repository of this test's own."""
    return Path(shutil.copytree(shared / "project", tmp_path / "project", symlinks=True))


@pytest.fixture
def laptop(shared: Path, project: Path, tmp_path: Path) -> Iterator[Laptop]:
    """A laptop in `project`, which is a host as well; it shares built environments with the others."""
    tmux_dir = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))  # a socket's path has to be short
    made = make_laptop(tmp_path / "laptop", project, tmux_dir)
    for name in ("", ".pub"):
        shutil.copy(f"{shared}/key{name}", f"{made.key}{name}")
    share_environments(made.rollouts_home, shared)
    yield made
    kill_tmux(tmux_dir)


@pytest.fixture
def make_host(shared: Path, laptop: Laptop, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Start an sshd that the laptop may log in to; known=False leaves its key unknown there."""
    with contextlib.ExitStack() as stack:
        made: list[Host] = []

        def make(*, known: bool = True, path: Path | None = None, **options: Any) -> Host:
            directory = tmp_path / f"host{len(made)}"
            one = stack.enter_context(
                host(directory, shared / "key", path=path or shared / "bin", **options)
            )
            share_environments(one.home, shared)
            made.append(one)
            if known:
                laptop.know(*made)
            return one

        yield make


def share_environments(home: Path, shared: Path) -> None:
    if not home.exists():
        home.mkdir(parents=True)
        (home / "envs").symlink_to(shared / "envs")
