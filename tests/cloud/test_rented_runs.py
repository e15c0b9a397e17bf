"""`deploy CONFIG` on machines that are rented from the stand-ins: real sshds, that die when they are terminated."""

import contextlib
import getpass
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base_config import ProvisionConfig
from rollouts.cloud.ledger import Lease, Ledger
from tests.cloud.conftest import variables
from tests.cloud.fakes.server import KEY, FakeCloud, FakeMachine
from tests.remote.conftest import laptop, project, share_environments, shared  # noqa: F401  (fixtures)
from tests.remote.hosts import ROOT, Host, Laptop, host, wait_for, write_config

Clouds = dict[str, FakeCloud]
RENTS = ProvisionConfig(
    providers=["runpod"],
    gpu_types=["H100"],
    gpu_memory_gb_min=80.0,
    gpus=1,
    regions=[],
    spot=False,
    disk_gib=50,
    image=None,
    price_per_hour_max=3.0,
    hours_max=2.0,
    spend_max=20.0,
    ready_timeout_s=120.0,
    retries_max=1,
    when_done="end",
)


class Machines:
    """The machines behind the stand-ins: an sshd each, with the key that its provider would give it."""

    def __init__(self, directory: Path, shared_files: Path, stack: contextlib.ExitStack) -> None:
        self.directory, self.shared, self.stack = directory, shared_files, stack
        self.hosts: dict[str, tuple[Host, contextlib.ExitStack]] = {}

    def boot(self, machine: FakeMachine, public_key: str) -> tuple[str, int, str]:
        place = self.directory / f"machine-{machine.name}"
        place.mkdir()
        (place / "user.pub").write_text(public_key + "\n")
        scoped = f"scoped-{machine.machine_id}"
        own = contextlib.ExitStack()
        made = own.enter_context(
            host(
                place / "host",
                place / "user",
                path=self.shared / "bin",
                environment={"RUNPOD_API_KEY": scoped, "CONTAINER_API_KEY": scoped},
            )
        )
        share_environments(made.home, self.shared)
        self.hosts[machine.name] = made, own
        self.stack.callback(self.shut_down, machine)
        return "127.0.0.1", made.port, getpass.getuser()

    def shut_down(self, machine: FakeMachine) -> None:
        made, own = self.hosts.pop(machine.name, (None, None))
        if made is not None and own is not None:
            own.close()
            kill_all(f"ROLLOUTS_HOME={made.home}")


def kill_all(mark: str, command: str = "") -> list[int]:
    """End every process that has this variable, as a machine's end does."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and command.encode() in (entry / "cmdline").read_bytes():
                is_marked = mark.encode() in (entry / "environ").read_bytes().split(b"\0")
                if is_marked:
                    os.kill(int(entry.name), signal.SIGKILL)
                    found.append(int(entry.name))
    return found


@pytest.fixture
def renter(clouds: Clouds, laptop: Laptop, shared: Path, tmp_path: Path) -> Iterator[Laptop]:  # noqa: F811
    """A laptop whose providers are the stand-ins."""
    with contextlib.ExitStack() as stack:
        machines = Machines(tmp_path, shared, stack)
        for cloud in clouds.values():
            cloud.boot, cloud.shut_down = machines.boot, machines.shut_down
        laptop.environment.update(variables(clouds, laptop.home))
        laptop.environment["ROLLOUTS_HOME"] = str(laptop.rollouts_home)
        yield laptop
        kill_all(f"HOME={laptop.home}", "lease_guard")


def job(renter: Laptop, **changes: Any) -> str:
    return str(write_config(renter.project, output__mode="sft", provision=replace(RENTS, **changes)))


def leases(renter: Laptop) -> list[Lease]:
    return Ledger(renter.rollouts_home / "cloud" / "ledger.jsonl").leases()


def holders_of_keys(*places: Path) -> list[Path]:
    files = (path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("name", ["runpod", "vast", "prime"])
def test_a_whole_run(name: str, renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: the machine is rented, guarded, used by the usual path, and ended after the last verified pull; no file
    holds a provider's key, here or there."""
    done = renter.deploy(job(renter, providers=[name]), "--yes", "--run-id", "rented")
    assert done.returncode == 0, done.stdout + done.stderr
    assert clouds[name].bill() == {} and len(clouds[name].machines) == 1
    (lease,) = leases(renter)
    assert (lease.step, lease.run_id, lease.provider) == ("ended", "rented", name)
    assert f"{lease.name} is ended; it cost at most $" in done.stdout
    assert list((renter.project / "runs").glob("*/rented/metrics.jsonl"))
    assert holders_of_keys(tmp_path) == [] and KEY not in done.stdout + done.stderr
    assert renter.deploy("ls").stderr == ""


def test_the_plan_rents_nothing(renter: Laptop, clouds: Clouds) -> None:
    """Goal: --plan names machine, price and the most it can cost, and changes nothing; without --yes nothing is rented
    where nobody can be asked."""
    done = renter.deploy(job(renter, spend_max=4.0), "--plan")
    assert done.returncode == 0 and "at most $4.00: after 1.49 h a guard ends it" in done.stdout, done.stdout
    assert renter.json(job(renter), "--plan")["price_per_hour"] == 2.69
    refused = renter.deploy(job(renter), stdin=-3)  # subprocess.DEVNULL
    assert refused.returncode == 2 and "--yes rents without asking" in refused.stderr
    assert clouds["runpod"].machines == {} and leases(renter) == []
    none = renter.deploy(job(renter, price_per_hour_max=0.5), "--yes")
    assert none.returncode == 2 and "over $0.5 an hour" in none.stderr


@pytest.mark.parametrize("fault", ["capacity", "broken", "dearer"])
def test_the_next_offer(fault: str, renter: Laptop, clouds: Clouds) -> None:
    """Goal: without capacity, with a machine that never runs, or that costs more than offered, the next offer is taken,
    with the reason told; the first machine is ended."""
    clouds["vast"].fault("create", fault)
    done = renter.deploy(job(renter, providers=["vast"]), "--yes", "--run-id", "second")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [lease.step for lease in leases(renter)] == ["refused" if fault == "capacity" else "ended", "ended"]
    said = {"capacity": "the offer is gone", "broken": "will not run", "dearer": "costs more than it was offered"}
    assert said[fault] in done.stderr and clouds["vast"].bill() == {}


def test_an_answer_that_was_lost(renter: Laptop, clouds: Clouds) -> None:
    """Goal: a machine whose create call had no answer is found and used; one machine is made."""
    clouds["prime"].fault("create", "lost")
    done = renter.deploy(job(renter, providers=["prime"]), "--yes", "--run-id", "found")
    assert done.returncode == 0 and len(clouds["prime"].machines) == 1, done.stderr


def test_a_run_that_cannot_start_ends_its_machines(renter: Laptop, clouds: Clouds) -> None:
    """Goal: where the host does not do for the run, its machine is ended and the reasons of all are told; nothing is
    left to attach to."""
    config = write_config(
        renter.project, output__mode="sft", host__disk_free_gib_min=10**6, provision=replace(RENTS, retries_max=0)
    )
    done = renter.deploy(str(config), "--yes", "--run-id", "none")
    assert done.returncode == 2 and "none of 1 machine(s)" in done.stderr, done.stderr
    assert [lease.step for lease in leases(renter)] == ["ended"]
    assert renter.deploy("ls").stdout == "no runs\n"


def test_the_whole_life_for_whoever_has_a_key(renter: Laptop, clouds: Clouds) -> None:
    """Goal: scripts/cloud_check goes through a machine's life and ends it."""
    command = [sys.executable, "-m", "scripts.cloud_check", "runpod", "--max-price", "3"]
    environment = renter._environment({})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the watchdog on the machine is armed" in done.stdout and "gone; it cost at most $" in done.stdout
    assert KEY not in done.stdout + done.stderr and len(clouds["runpod"].machines) == 1


def rented_and_killed(renter: Laptop, when: str, hours: float) -> None:
    process = renter.start(job(renter, hours_max=hours), "--yes", "--run-id", "killed", start_new_session=True)
    ledger = Ledger(renter.rollouts_home / "cloud" / "ledger.jsonl")
    if when == "created":
        wait_for(lambda: [lease for lease in ledger.leases() if lease.machine_id], "the machine")
    else:
        wait_for((renter.rollouts_home / "registry" / "killed.json").exists, "the run")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_killed_deploy(renter: Laptop, clouds: Clouds) -> None:
    """Goal: after kill -9 of deploy, a machine without a run is told of in red, and its guard ends it at its time."""
    rented_and_killed(renter, "created", hours=0.004)
    assert "warning: rented and not ended: rollouts-" in renter.deploy("ls").stderr
    wait_for(lambda: clouds["runpod"].bill() == {}, "the guard")
    assert len(clouds["runpod"].machines) == 1


def test_the_watchdog_on_the_machine(renter: Laptop, clouds: Clouds) -> None:
    """Goal: with deploy and this computer's guard gone, the machine ends itself with its own key."""
    rented_and_killed(renter, "registered", hours=0.012)
    assert wait_for(lambda: kill_all(f"HOME={renter.home}", "lease_guard"), "the guard here")
    wait_for(lambda: clouds["runpod"].bill() == {}, "the watchdog")
    assert clouds["runpod"].ended_themselves == list(clouds["runpod"].machines)
