"""A laptop that rents from the stand-ins: machines that are real sshds, which die when they are terminated."""

import contextlib
import getpass
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base_config import ProvisionConfig
from rollouts.cloud.ledger import Lease, Ledger
from rollouts.run_dir import read_jsonl, write_text_atomic
from tests.cloud.fakes.server import KEY, FakeCloud, FakeMachine
from tests.remote.conftest import share_environments
from tests.remote.hosts import Host, Laptop, host, write_config

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
    idle_minutes_max=None,
    allow_unguarded=False,
    guard_host=None,
    ready_timeout_s=600.0,
    retries_max=1,
    resumes_max=0,
    when_done="end",
)


def variables(clouds: Mapping[str, FakeCloud], home: Path) -> dict[str, str]:
    """The environment in which the stand-ins are the providers."""
    urls = {f"ROLLOUTS_{name.upper()}_URL": cloud.url for name, cloud in clouds.items()}
    keys = {f"{name.upper()}_API_KEY": KEY for name in clouds}
    return {**urls, **keys, "HOME": str(home), "ROLLOUTS_HOME": str(home / ".rollouts")}


class Machines:
    """The machines behind the stand-ins: an sshd each, with the key that its provider would give it."""

    def __init__(self, directory: Path, shared_files: Path, stack: contextlib.ExitStack) -> None:
        self.directory, self.shared, self.stack = directory, shared_files, stack
        self.hosts: dict[str, tuple[Host, contextlib.ExitStack]] = {}

    def boot(self, machine: FakeMachine, public_key: str) -> tuple[str, int, str]:
        place = self.directory / f"machine-{machine.name}"
        place.mkdir()
        (place / "user.pub").write_text(public_key + "\n")
        scoped = f"scoped-{machine.machine_id}" if machine.has_own_key else ""
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


def kill_all(mark: str, command: str = "", signum: int = signal.SIGKILL) -> list[int]:
    """End every process that has this variable, as a machine's end does."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and command.encode() in (entry / "cmdline").read_bytes():
                is_marked = mark.encode() in (entry / "environ").read_bytes().split(b"\0")
                if is_marked:
                    os.kill(int(entry.name), signum)
                    found.append(int(entry.name))
    return found


@pytest.fixture
def renter(clouds: Clouds, laptop: Laptop, shared: Path, tmp_path: Path) -> Iterator[Laptop]:
    """A laptop whose providers are the stand-ins."""
    with contextlib.ExitStack() as stack:
        machines = Machines(tmp_path, shared, stack)
        for cloud in clouds.values():
            cloud.boot, cloud.shut_down = machines.boot, machines.shut_down
        laptop.environment.update(variables(clouds, laptop.home))
        laptop.environment["ROLLOUTS_HOME"] = str(laptop.rollouts_home)
        yield laptop
        kill_all(f"HOME={laptop.home}", "guard_process")


def job(renter: Laptop, *, env: dict[str, str] | None = None, **changes: Any) -> str:
    provision = replace(RENTS, **changes)
    return str(write_config(renter.project, env=env, output__mode="sft", provision=provision))


def ledger_of(home: Path) -> Ledger:
    return Ledger(home / "cloud" / "ledger.jsonl")


def leases(renter: Laptop) -> list[Lease]:
    return ledger_of(renter.rollouts_home).leases()


def ends_in(home: Path, seconds: float) -> None:
    """Let the time of all machines in a home's ledger be up in so many seconds: guards read it at each look.

    So a test chooses the moment, and what comes before may take as long as it does.
    """
    path, now, rows = ledger_of(home).path, time.time(), list[dict[str, Any]]()
    for row in read_jsonl(path):
        hours = {"hours_max": max(0.0, now + seconds - row["time"]) / 3600}
        rows.append(row | hours if row["step"] == "intent" else row)
    write_text_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows), mode=0o600)


def holders_of_keys(*places: Path) -> list[Path]:
    files = (
        path
        for place in places
        for path in place.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    return [path for path in files if KEY.encode() in path.read_bytes()]
