"""A private tmux server for this folder's tests, environments to build, and a check that nothing of a run is left."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments.virtual_environment import ensure_environment
from tests.worker.environments import deadline, write_wheel
from tests.worker.stands import Host, private_tmux, survivors


@pytest.fixture(scope="session")
def private_server() -> Iterator[None]:
    directory = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))  # a socket's path has to be short
    with private_tmux(directory):
        yield
    shutil.rmtree(directory)


@pytest.fixture
def host(private_server: None, tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path / "home")
    yield made
    left = {run.run_id: survivors(run) for run in made.launched}
    for line in [line for lines in left.values() for line in lines]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split(":")[0]), signal.SIGKILL)
    assert not any(left.values()), f"processes outlived their run: {left}"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two versions of a package that says its version."""
    directory = tmp_path_factory.mktemp("wheels")
    for version in ("1.0", "2.0"):
        write_wheel(directory, "tiny-thing", version)
    return directory


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real virtual environment with pip: seconds to make, so made once, and copied without its marker."""
    directory = tmp_path_factory.mktemp("prepared")
    spec = EnvironmentSpec(
        name="real",
        path=str(directory / "env"),
        installer="pip",
        base_python=sys.executable,
        requirements=[],
        requirements_no_deps=[],
        constraints="",
    )
    ensure_environment(spec, RunDir(directory / "run"), deadline())
    (directory / "env" / ".complete").rename(directory / "marker")
    return directory / "env"


@pytest.fixture
def quick_python(prepared: Path, tmp_path: Path) -> str:
    """A base interpreter whose `-m venv PATH` copies the prepared environment; it notes each time."""
    path = tmp_path / "base" / "python3"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\necho made >> {tmp_path}/made\nsleep 0.3\ncp -a {prepared} "$3"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def spec(tmp_path: Path, wheels: Path, quick_python: str) -> EnvironmentSpec:
    return EnvironmentSpec(
        name="trainer",
        path=str(tmp_path / "envs" / "key1"),
        installer="pip",
        base_python=quick_python,
        requirements=["--no-index", f"--find-links {wheels}", "tiny-thing"],
        requirements_no_deps=[],
        constraints="tiny-thing==1.0\n",
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "runs" / "r1")
    made.path.mkdir(parents=True)
    return made
