"""`deploy attach RUN | head`: a rented machine is not left to its guard, and nothing false is said."""

from pathlib import Path

import pytest

from rollouts.run_dir import RunDir
from tests.cloud.fakes.server import FakeCloud
from tests.cloud.renting import job, leases
from tests.remote.hosts import Laptop, wait_for, write_config

pytestmark = pytest.mark.timeout(900)  # as long as all else waits for the machine
Clouds = dict[str, FakeCloud]


def unread_attach(laptop: Laptop, run_id: str, go: Path) -> tuple[int, str]:
    """Attach, read one line and leave; the run goes on then. Returns attach's exit code and what it said on stderr."""
    process = laptop.start("attach", run_id)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    go.touch()
    err = process.stderr.read()
    return process.wait(timeout=250), err


def test_attach_to_a_rented_run(renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: a run whose machine bills is followed to its end in silence, and the machine is ended, which stderr says.
    Red with the command ended by the broken pipe: the machine was left to its guard."""
    go = tmp_path / "go"
    config = job(renter, env={"STAND_IN_WAIT": str(go)})
    done = renter.deploy(config, "--yes", "--detach", "--run-id", "unread")
    assert done.returncode == 0, done.stderr
    code, err = unread_attach(renter, "unread", go)
    assert code == 0 and "nobody reads the output any more: unread is followed all the same" in err
    assert clouds["runpod"].bill() == {} and [lease.step for lease in leases(renter)] == ["ended"]


def test_attach_to_a_run_on_a_machine_of_ones_own(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: a run that costs nothing more is detached from, with Ctrl-C's exit code, and its mirror is not said to be
    followed. Red with the broken pipe let through: exit code 1, not a word, and a note of a follower."""
    go = tmp_path / "go"
    config = write_config(laptop.project, output__mode="sft", env={"STAND_IN_WAIT": str(go)})
    done = laptop.deploy(str(config), "--detach", "--run-id", "unread")
    assert done.returncode == 0, done.stderr
    code, err = unread_attach(laptop, "unread", go)
    assert code == 130 and "nobody reads the output any more: detached. unread goes on" in err, err
    mirror = RunDir(laptop.project / "runs" / "example" / "unread")
    assert '"followed": false' in (mirror.path / "mirror.json").read_text()
    run = RunDir(laptop.rollouts_home / "runs" / "unread")
    wait_for(lambda: '"done"' in run.status.read_text(), "the run's end")


def test_a_launch_that_nobody_reads(laptop: Laptop) -> None:
    """Goal: a reader that leaves before the launch, as in `deploy CONFIG | true`, changes nothing of the run: it is
    launched and detached from, and stderr says so, and what is left of a sweep. Red with the broken pipe let through:
    exit code 1, and not a word."""
    config = write_config(laptop.project, output__mode="sft")
    process = laptop.start(str(config), "--set", "sft.matrix_lr=0.001,0.002")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=250) == 130 and "Nothing was started" not in err, err
    (row,) = laptop.json("ls")
    assert f"nobody reads the output any more: detached. {row['run_id']} goes on" in err, err
    assert "not started: 1 of 2 runs" in err and "--skip 1" in err, err
    run = RunDir(laptop.rollouts_home / "runs" / row["run_id"])
    wait_for(lambda: '"done"' in run.status.read_text(), "the run's end")
