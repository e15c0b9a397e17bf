"""Machines that are taken away in the middle of a run: it is interrupted, and goes on on the next offer."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollouts.run_dir import RunDir, read_jsonl, read_status
from tests.cloud.fakes.server import FakeCloud, FakeMachine
from tests.cloud.renting import RENTS, kill_all, leases
from tests.remote.hosts import Laptop, wait_for, write_config

pytestmark = pytest.mark.timeout(900)  # as long as all else waits for the machine
Clouds = dict[str, FakeCloud]


def here(renter: Laptop, run_id: str) -> RunDir:
    return RunDir(renter.project / "runs" / "example" / run_id)


def taken_away(
    renter: Laptop,
    cloud: FakeCloud,
    tmp_path: Path,
    ends: Callable[[FakeMachine], None] | None = None,
    **changes: Any,
) -> tuple[int, str, str]:
    """A run whose machine is taken away once its first checkpoint is here, or ends as `ends` does it. It waits until
    then, so that it cannot be done before. Returns deploy's exit code and output."""
    provision = replace(RENTS, providers=[cloud.provider], **changes)
    environment = {"STAND_IN_WAIT": str(tmp_path / "go")}
    config = str(write_config(renter.project, env=environment, provision=provision))
    process = renter.start(config, "--yes", "--run-id", "taken")
    manifest = here(renter, "taken").checkpoints / "sft" / "step_000001" / "manifest.json"
    wait_for(manifest.exists, "the first checkpoint, here")
    (machine,) = cloud.machines.values()
    (ends or cloud.take_away)(machine)
    next_one = renter.rollouts_home / "registry" / "taken-again1.json"
    wait_for(lambda: next_one.exists() or process.poll() is not None, "the end of the first")
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def one_curve(renter: Laptop, old: str, run_id: str) -> None:
    """The rows of the run that went on begin with those of the one before, up to its checkpoint."""
    before, after = (read_jsonl(here(renter, name).metrics) for name in (old, run_id))
    entry = json.loads((renter.rollouts_home / "registry" / f"{run_id}.json").read_text())
    came = entry["resumed_from"]
    kept = [row for row in before if row["step"] <= came["step"]]
    assert kept and after[: len(kept)] == kept and len(after) > len(kept)
    assert (came["run_id"], came["stage"]) == (old, "sft")


def test_a_run_goes_on_by_itself(renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: with resumes_max, a run whose machine was taken away goes on on the next offer from the last checkpoint
    that is here; the old machine, which bills for its disk, is ended."""
    code, out, err = taken_away(renter, clouds["vast"], tmp_path, resumes_max=1)
    assert code == 0, out + err
    assert "taken was interrupted" in err and "taken goes on from checkpoints/sft/step_" in err
    first, second = leases(renter)
    assert (first.step, second.step, second.run_id) == ("ended", "ended", "taken-again1")
    assert "took it away" in first.reason
    one_curve(renter, "taken", "taken-again1")
    rows = {row["run_id"]: row["state"] for row in renter.json("ls")}
    assert rows == {"taken": "interrupted", "taken-again1": "done"}


def test_a_run_goes_on_when_it_is_told_to(renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: a run whose machine its user ended rents no other by itself, with resumes_max too; the command ends with
    what goes on with it, which does. A stop of it asks no host; a run that is done rents nothing. Red with each machine
    that is lost taken for one that its provider took, with the stop asked of the host, and with the plan of a machine
    for the run that is done."""

    def by_name(machine: FakeMachine) -> None:
        assert renter.deploy("machines", "end", machine.name).returncode == 0

    code, out, err = taken_away(renter, clouds["prime"], tmp_path, by_name, resumes_max=1)
    assert code == 1 and "deploy resume taken goes on" in err, out + err
    assert "nothing is rented in its place" in err and len(leases(renter)) == 1
    assert [row["state"] for row in renter.json("ls")] == ["interrupted"]
    stopped = renter.deploy("stop", "taken")
    assert stopped.returncode == 0 and "it does not go on by itself" in stopped.stdout, stopped
    asked = renter.deploy("pull", "taken").stderr
    assert "why it ended: deploy machines end" in asked and "pulled: metrics.jsonl" in asked, asked
    plan = renter.json("resume", "taken", "--plan")
    assert plan["machine"]["provider"] == "prime" and len(leases(renter)) == 1
    refused = renter.deploy("resume", "taken", stdin=-3)  # subprocess.DEVNULL
    assert refused.returncode == 2 and "--yes rents without asking" in refused.stderr
    done = renter.deploy("resume", "taken", "--yes", "--run-id", "next")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [lease.step for lease in leases(renter)] == ["ended", "ended"]
    one_curve(renter, "taken", "next")
    over = renter.deploy("resume", "next", "--plan")
    assert over.returncode == 2 and "next is done: nothing is left" in over.stderr, over.stdout


def test_a_machine_that_ends_its_processes_in_order(
    renter: Laptop,
    clouds: Clouds,
    tmp_path: Path,
) -> None:
    """Goal: a machine that is taken away may end its processes in order first, so that the run says it was stopped: it
    goes on on another one all the same. Red with a stopped run taken at its word."""
    cloud = clouds["vast"]

    def in_order(machine: FakeMachine) -> None:
        machine.fate, machine.looks = "preempted", 9
        homes = tmp_path.glob(f"machine-{machine.name}/**/runs/taken/supervisor.lock")
        mark = f"ROLLOUTS_HOME={next(homes).parents[2]}"
        assert kill_all(mark, "supervise.supervisor", signal.SIGTERM)

    code, out, err = taken_away(renter, cloud, tmp_path, in_order, resumes_max=1)
    assert code == 0 and "taken goes on from checkpoints/sft/step_" in err, out + err
    status = read_status(here(renter, "taken"))
    assert status is not None and status.state == "stopped"
    assert ["took it away" in lease.reason for lease in leases(renter)] == [True, False]
