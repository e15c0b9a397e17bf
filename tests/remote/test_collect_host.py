"""`deploy gc` from a laptop: it lists, asks, and removes on a real host what also lies here."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.remote import collect_host
from rollouts.remote.errors import DeployError
from rollouts.run_dir import RunDir
from tests.remote.hosts import Host, Laptop
from tests.remote.test_remove import fill, home, make_run

assert home  # a fixture
LIST = {"older_than": "0m", "yes": False, "confirm": None}


def test_over_ssh(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: without --yes a list and its sum, with it the same goes from the host, and nothing else. Red with the list
    taken for agreed."""
    host = make_host()
    run = fill(RunDir(host.run_path("old")))
    run.lock.touch()
    shutil.copytree(run.checkpoints / "rl/step_000000", run.checkpoints / "rl/step_000001")
    (run.path / "weights").mkdir()
    (run.weights / "model.bin").write_bytes(os.urandom(1 << 20))
    listed = laptop.deploy("gc", "--remote", host.target, "--older-than", "0m")
    assert listed.returncode == 0, listed.stderr
    assert (
        "1.0 MiB on" in listed.stdout
        and "--yes` removes it" in listed.stdout
        and run.weights.exists()
    )
    assert "stays: 2 checkpoints: the only copy" in listed.stdout  # red with "2 checkpoint"
    answer = laptop.json("gc", "--remote", host.target, "--older-than", "0m", "--yes")
    assert (
        sorted(map(os.path.basename, answer["removed"])) == ["tree", "weights"]
        and answer["problems"] == []
    )
    assert answer["bytes"] > 1 << 20 and not run.weights.exists() and not run.code_tree.exists()
    assert (run.checkpoints / "rl/step_000000/model.safetensors").exists() and run.metrics.exists()


def test_a_terminal_is_asked_and_copies_may_go(home: Path) -> None:
    """Goal: what was answered counts; a checkpoint goes once its copy here is whole. Red with `have` left empty, and
    with "on local" for the machine that the list calls this one."""
    entry, run = make_run(home, "old")
    run.lock.touch()
    source, copy = run.checkpoints / "rl/step_000000", entry.mirror.checkpoints / "rl/step_000000"
    copy.mkdir(parents=True)
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    refused = collect_host.collect(
        None, **{**LIST, "confirm": lambda text: "checkpoint" not in text}
    )  # type: ignore[arg-type]
    assert refused.text == "nothing was removed" and source.exists()
    done = collect_host.collect(None, **{**LIST, "confirm": lambda text: "checkpoint" in text})  # type: ignore[arg-type]
    assert done.text.startswith("removed 2 of 2: ") and done.text.endswith(" on this machine")
    assert not source.exists() and (copy / "model.safetensors").exists()


def test_a_copy_that_goes_while_the_question_stands(home: Path) -> None:
    """Goal: what lies here is looked at again after the answer: a checkpoint whose copy went meanwhile stays, and that
    is told. Red with the copies of before the question."""
    entry, run = make_run(home, "old")
    run.lock.touch()
    source, copy = run.checkpoints / "rl/step_000000", entry.mirror.checkpoints / "rl/step_000000"
    shutil.copytree(source, copy)

    def answered(text: str) -> bool:
        shutil.rmtree(copy)
        return "checkpoint" in text

    done = collect_host.collect(None, **{**LIST, "confirm": answered})  # type: ignore[arg-type]
    assert (source / "model.safetensors").exists() and not run.code_tree.exists()
    assert any("stays: the only copy" in remark for remark in done.remarks)


@pytest.mark.parametrize(
    "text", ["soon", "-1d", "14", time.strftime("%Y-01-01", time.gmtime(time.time() + 4e7))]
)
def test_times_that_mean_nothing(text: str, home: Path) -> None:
    """Goal: a wrong --older-than is named before a host is asked. Red with it taken for 0."""
    with pytest.raises(DeployError, match="--older-than"):
        collect_host.collect("127.0.0.1:1", **{**LIST, "older_than": text})  # type: ignore[arg-type]
