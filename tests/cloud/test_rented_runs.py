"""`deploy CONFIG` on machines that are rented from the stand-ins: real sshds, that die when they are terminated."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cloud.fakes.server import KEY, FakeMachine
from tests.cloud.renting import RENTS, Clouds, ends_in, holders_of_keys, job, kill_all, leases
from tests.remote.hosts import ROOT, Laptop, wait_for, write_config

pytestmark = pytest.mark.timeout(900)  # as long as all else waits for the machine


def test_a_whole_run(renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: the machine is rented, guarded, used by the usual path, and ended after the last verified pull; no file
    holds a provider's key, here or there; a verb that needs the machine says that it is gone, and what is here. Other
    providers' whole runs are below, each with a fault on the way. Red with the connection that is refused, as told."""
    name = "runpod"
    done = renter.deploy(job(renter, providers=[name]), "--yes", "--run-id", "rented")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rented and not ended" not in done.stderr, "it is this run's machine"
    assert clouds[name].bill() == {} and len(clouds[name].machines) == 1
    (lease,) = leases(renter)
    assert (lease.step, lease.run_id, lease.provider) == ("ended", "rented", name)
    assert f"{lease.name} is ended; it cost at most $" in done.stdout
    assert list((renter.project / "runs").glob("*/rented/metrics.jsonl"))
    assert holders_of_keys(tmp_path) == [] and KEY not in done.stdout + done.stderr
    assert renter.deploy("ls").stderr == ""
    gone = renter.deploy("pull", "rented")
    assert gone.returncode == 2 and f"{lease.name} is gone: the machine that was" in gone.stderr
    assert "all of the run is here" in gone.stderr and "the port" not in gone.stderr, gone.stderr


def test_the_plan_rents_nothing(renter: Laptop, clouds: Clouds) -> None:
    """Goal: --plan names machine, price and the most it can cost, and changes nothing; without --yes nothing is rented
    where nobody can be asked."""
    done = renter.deploy(job(renter, spend_max=4.0), "--plan")
    assert done.returncode == 0 and "at most $4.00: after 1.48 h a guard ends it" in done.stdout, (
        done.stdout
    )
    assert renter.json(job(renter), "--plan")["price_per_hour"] == pytest.approx(2.697, abs=1e-3)
    refused = renter.deploy(job(renter), stdin=-3)  # subprocess.DEVNULL
    assert refused.returncode == 2 and "--yes rents without asking" in refused.stderr
    taken = renter.deploy(job(renter), "--yes", "--run-id", "last")
    assert taken.returncode == 2 and "means the newest run" in taken.stderr
    assert clouds["runpod"].machines == {} and leases(renter) == []
    none = renter.deploy(job(renter, price_per_hour_max=0.5), "--yes")
    assert none.returncode == 2 and "over $0.5 an hour" in none.stderr


@pytest.mark.parametrize("fault", ["capacity", "broken", "dearer"])
def test_the_next_offer(fault: str, renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: without capacity, with a machine that never runs, or that costs more than offered, the next offer is taken,
    with the reason told; the first machine is ended."""
    clouds["vast"].fault("create", fault)
    done = renter.deploy(job(renter, providers=["vast"]), "--yes", "--run-id", "second")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [lease.step for lease in leases(renter)] == [
        "refused" if fault == "capacity" else "ended",
        "ended",
    ]
    said = {
        "capacity": "the offer is gone",
        "broken": "will not run",
        "dearer": "costs more than it was offered",
    }
    assert said[fault] in done.stderr and clouds["vast"].bill() == {}
    assert list((renter.project / "runs").glob("*/second*/metrics.jsonl"))
    assert holders_of_keys(tmp_path) == [] and KEY not in done.stdout + done.stderr


@pytest.mark.parametrize("lines", [0, 3])
def test_a_reader_that_leaves(lines: int, renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: after `deploy CONFIG | head`, before the run has started or later, the run is followed to its end in
    silence and its machine ended, which stderr says. Red with the command ended by the broken pipe."""
    go = tmp_path / "go"
    config = job(renter, env={"STAND_IN_WAIT": str(go)})
    process = renter.start(config, "--yes", "--run-id", "unread")
    assert process.stdout is not None and process.stderr is not None
    for _ in range(lines):
        assert process.stdout.readline()
    process.stdout.close()
    go.touch()  # only now: what is written from here on finds no reader
    err = process.stderr.read()
    assert process.wait(timeout=250) == 0, err
    assert "nobody reads the output any more: unread is followed all the same" in err
    assert clouds["runpod"].bill() == {} and [lease.step for lease in leases(renter)] == ["ended"]
    assert list((renter.project / "runs").glob("*/unread/metrics.jsonl"))


def test_an_answer_that_was_lost(renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: a machine whose create call had no answer is found and used; one machine is made."""
    clouds["prime"].fault("create", "lost")
    done = renter.deploy(job(renter, providers=["prime"]), "--yes", "--run-id", "found")
    assert done.returncode == 0 and len(clouds["prime"].machines) == 1, done.stderr
    assert clouds["prime"].bill() == {} and [lease.step for lease in leases(renter)] == ["ended"]
    assert list((renter.project / "runs").glob("*/found/metrics.jsonl"))
    assert holders_of_keys(tmp_path) == [] and KEY not in done.stdout + done.stderr


def test_a_run_that_cannot_start_ends_its_machines(renter: Laptop, clouds: Clouds) -> None:
    """Goal: where the host does not do for the run, its machine is ended and the reasons of all are told; nothing is
    left to attach to."""
    config = write_config(
        renter.project,
        output__mode="sft",
        host__disk_free_gib_min=10**6,
        provision=replace(RENTS, retries_max=0),
    )
    done = renter.deploy(str(config), "--yes", "--run-id", "none")
    assert done.returncode == 2 and "none of 1 offer(s)" in done.stderr, done.stderr
    assert [lease.step for lease in leases(renter)] == ["ended"]
    assert renter.deploy("ls").stdout == "no runs\n"


def test_the_whole_life_for_whoever_has_a_key(renter: Laptop, clouds: Clouds) -> None:
    """Goal: scripts/cloud_check goes through a machine's life and ends it."""
    command = [sys.executable, "-m", "scripts.cloud_check", "runpod", "--max-price", "3"]
    environment = renter._environment({})
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "the watchdog on the machine is armed" in done.stdout
        and "gone; it cost at most $" in done.stdout
    )
    assert KEY not in done.stdout + done.stderr and len(clouds["runpod"].machines) == 1


def rented_and_killed(renter: Laptop, **changes: Any) -> None:
    """Kill deploy once its machine is made, which then has an hour left."""
    config = job(renter, hours_max=1.0, **changes)
    process = renter.start(config, "--yes", "--run-id", "killed", start_new_session=True)
    wait_for(lambda: [lease for lease in leases(renter) if lease.machine_id], "the machine")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_killed_deploy(renter: Laptop, clouds: Clouds) -> None:
    """Goal: after kill -9 of deploy, a machine without a run is told of in red, and its guard ends it at its time."""
    rented_and_killed(renter)
    assert "warning: rented and not ended: rollouts-" in renter.deploy("ls").stderr
    ends_in(renter.rollouts_home, 0)
    wait_for(lambda: clouds["runpod"].bill() == {}, "the guard")
    assert len(clouds["runpod"].machines) == 1


def test_the_watchdog_on_the_machine(renter: Laptop, clouds: Clouds) -> None:
    """Goal: with deploy and this computer's guard gone, the machine ends itself with its own key."""
    cloud = clouds["vast"]
    boot, killed = cloud.boot, list[int]()
    assert boot is not None

    def unguarded(machine: FakeMachine, public_key: str) -> tuple[str, int, str]:
        """Before deploy hears of its machine, end the guard, and let the time be up soon: the watchdog has it then."""
        killed.extend(kill_all(f"HOME={renter.home}", "guard_process"))
        address = boot(machine, public_key)
        ends_in(renter.rollouts_home, 15)
        return address

    cloud.boot = unguarded
    config = job(renter, hours_max=1.0, retries_max=0, providers=["vast"])
    process = renter.start(config, "--yes", "--run-id", "killed", start_new_session=True)
    known = renter.rollouts_home / "registry" / "killed.json"
    wait_for(
        lambda: known.exists() or (cloud.machines and not cloud.bill()),
        "the run, or, where all is slow, the end already",
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert killed, "the guard here"
    wait_for(lambda: cloud.bill() == {}, "the watchdog")
    assert cloud.ended_themselves == list(cloud.machines)
