"""A model's way to another host: the real receiver, as a run starts it."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rollouts.engines.command_lines import receiver_argv, receiver_ready_url, url_of
from rollouts.engines.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, shared_keys
from rollouts.engines.send_model import SendError, keep_only, send_directory
from rollouts.worker.supervise.engine_answers import answers_ready
from tests.ports import free_port
from tests.remote.hosts import wait_for

KEYS = shared_keys("the group's")


@dataclass
class Receiver:
    url: str
    weights: Path
    log: Path

    @property
    def versions(self) -> Path:
        return self.weights / "versions"


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    port, made = free_port(), tmp_path / "there"
    argv = receiver_argv(
        sys.executable, "127.0.0.1", port, weights=str(made), versions=str(made / "versions")
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, env={**os.environ, **KEYS}, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers_ready(receiver_ready_url("127.0.0.1", port)), "the receiver")
        yield Receiver(url_of("127.0.0.1", port), made, tmp_path / "log")
    finally:
        process.terminate()
        assert process.wait(timeout=200) == 0


def model(directory: Path, weights: bytes) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "training_state.pt").write_bytes(b"an optimizer's")
    (directory / "optimizer").mkdir()
    return directory


def test_a_model_arrives_whole(receiver: Receiver, tmp_path: Path) -> None:
    """Goal: what engines read arrives, byte for byte, without an optimizer's state; small files that are there already
    are taken from the version before; then the others go. Red with `.pt` sent."""
    send = {"key": KEYS[ADMIN_KEY_VARIABLE]}
    first = model(tmp_path / "version_000001", os.urandom(3_000_000))
    (tmp_path / "latest").symlink_to(first.name)
    start = Path(send_directory(receiver.url, tmp_path / "latest", "start", **send))
    assert start == receiver.weights / "start"
    there = Path(send_directory(receiver.url, first, first.name, **send))
    assert sorted(path.name for path in there.iterdir()) == ["config.json", "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert (there / name).read_bytes() == (first / name).read_bytes()
    second = model(tmp_path / "version_000002", os.urandom(1_000_000))
    again = Path(send_directory(receiver.url, second, second.name, **send))
    assert (again / "config.json").stat().st_ino == (there / "config.json").stat().st_ino
    keep_only(receiver.url, second.name, **send)
    assert [path.name for path in receiver.versions.iterdir()] == ["version_000002"]
    assert start.is_dir()  # an engine that is started again begins with it


def test_strangers_and_strange_names(receiver: Receiver, tmp_path: Path) -> None:
    """Goal: without the admin key nothing is taken, nor is what does not name a model or lies elsewhere."""
    source = model(tmp_path / "version_000001", b"weights")
    for key in (None, KEYS[API_KEY_VARIABLE], "another"):
        with pytest.raises(SendError, match="needs the run's key"):
            send_directory(receiver.url, source, source.name, key=key)
    for name in ("..", "version_1", "other", "version_000001%2f.."):
        with pytest.raises(SendError, match=r"does not name a model|no such thing"):
            send_directory(receiver.url, source, name, key=KEYS[ADMIN_KEY_VARIABLE])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{receiver.url}/files/start/config.json", timeout=60)
    assert not receiver.weights.exists()


def test_no_room(receiver: Receiver, tmp_path: Path) -> None:
    """Goal: what the other side cannot write is an error that names it."""
    receiver.weights.write_text("a file in the directory's place")
    source = model(tmp_path / "version_000001", b"weights")
    with pytest.raises(SendError, match=f"{os.uname().nodename}: .*there"):
        send_directory(receiver.url, source, "start", key=KEYS[ADMIN_KEY_VARIABLE])
