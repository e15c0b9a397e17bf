"""A private tmux server for this folder's tests, and a check after each that nothing of its runs is left."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
