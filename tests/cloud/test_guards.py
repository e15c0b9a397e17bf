"""Guards: by time, money and idleness, on this computer, on another, on the machine, and at the provider."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.cloud import CloudError, lease_guard, machine_use
from rollouts.cloud.accounts import keys_here, open_providers
from rollouts.cloud.ledger import Lease, Ledger, Limits, Terms, fold
from rollouts.cloud.machine_types import Machine, Offer, Order, ProviderName
from rollouts.cloud.reaching import own_public_key, reach
from rollouts.cloud.renting import rent
from rollouts.remote.guards import LET_IN, arm_watchdog, start_guard, use_of
from rollouts.remote.rent_machine import Guarding, log_in, rent_machines
from rollouts.run_dir import RunDir, hold_lock
from rollouts.view.screen import Screen
from tests.cloud.conftest import QUICK
from tests.cloud.fakes.server import Answer, FakeCloud
from tests.cloud.renting import RENTS, Machines, ends_in, job, kill_all, leases
from tests.cloud.test_gpu_client import PUBLIC_KEY, client_of, first_offer
from tests.cloud.test_machines import looked
from tests.cloud.test_rented_runs import rented_and_killed
from tests.remote.hosts import Laptop, host, tool_directory, wait_for

Clouds = dict[str, FakeCloud]
HOUR = 3600.0


def rent_with(
    limits: Limits,
    name: ProviderName = "lambda",
    offer: Offer | None = None,
    public_key: str = PUBLIC_KEY,
) -> Lease:
    """Rent a machine that guards hold to these limits; no guard is started."""
    terms = Terms(run_id="run", limits=limits, keep=False, arm=lambda lease: None)
    offer = offer or first_offer(client_of(name))
    ends_at = time.time() + HOUR * limits.hours(offer.price_per_hour)
    order = Order(
        name=f"rollouts-{time.monotonic_ns()}",
        offer=offer,
        public_key=public_key,
        disk_gib=50,
        image=None,
        ends_at=ends_at,
    )

    async def ask() -> Machine:
        async with open_providers(keys_here([name])[0]) as providers:
            return await rent(providers[name], order, Ledger(), QUICK, terms)

    anyio.run(ask)
    return Ledger().lease(order.name)


@pytest.fixture
def guard(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> Iterator[lease_guard.LeaseGuard]:
    """A guard in this process, with a test's patience. What it says is in `said`, what machines do in `does`."""
    monkeypatch.setattr(lease_guard, "Patience", lambda: QUICK)
    monkeypatch.setattr(lease_guard, "POLL_S", 0.2)
    made = lease_guard.LeaseGuard(said.append, lambda lease: does.get(lease.name))
    said.clear()
    does.clear()
    yield made


said: list[str] = []
does: dict[str, str | None] = {}


def test_limits_of_a_machine() -> None:
    """Goal: time and money both end a machine, at the price that is known by now; no price is no division by it. Red
    with the time of the intent's price alone, and with a machine of price 0."""
    limits = Limits(hours_max=10.0, spend_max=8.0)
    assert (limits.hours(4.0), limits.hours(0.5), limits.hours(0.0)) == (2.0, 10.0, 10.0)
    line = {"time": 0, "name": "a", "step": "intent", "provider": "vast", "price_per_hour": 2.0}
    line |= {"gpus": 1, "hours_max": 10.0, "spend_max": 8.0, "idle_minutes_max": None}
    assert fold([line])["a"].until == 4 * HOUR
    dearer = {"time": 5, "name": "a", "step": "created", "machine_id": "7", "price_per_hour": 4.0}
    assert fold([line, dearer])["a"].until == 2 * HOUR
    earlier = {"time": 0, "name": "a", "step": "intent", "provider": "vast", "until": 600}
    assert fold([{**earlier, "price_per_hour": 2.0}])["a"].until == pytest.approx(600)


def test_a_guard_whose_home_goes_away(guard: lease_guard.LeaseGuard, clouds: Clouds) -> None:
    """Goal: a machine that a guard has seen is ended at its time, also while the disk with the ledger is not mounted;
    the ledger follows when it is back. Red with a ledger that is missing taken for one without machines."""
    lease = rent_with(Limits(hours_max=1 / HOUR, spend_max=9.0))
    assert [one.name for one in guard.look()] == [lease.name]
    home = Path(os.environ["ROLLOUTS_HOME"])
    home.rename(home.with_name("elsewhere"))
    guard.run(stay=False)
    assert clouds["lambda"].bill() == {}
    assert not home.exists(), "nothing is written where the disk is missing"
    home.with_name("elsewhere").rename(home)
    looked()
    assert Ledger().open_leases() == []


@pytest.mark.parametrize(("wall_s", "passed_s"), [(-86400.0, 3700.0), (86400.0, 0.0)])
def test_a_clock_that_jumps(
    wall_s: float, passed_s: float, clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a guard's computer whose clock is set back by a day ends a machine when its hour has passed, and one that
    slept for a day ends it when it wakes. Red with the time of day alone: a day more to pay."""
    line = {"time": time.time(), "name": "a", "step": "intent", "provider": "vast", "gpus": 1}
    lease = fold([{**line, "price_per_hour": 2.0, "hours_max": 1.0, "spend_max": 9.0}])["a"]
    guard, wall, boot = lease_guard.LeaseGuard(said.append, use_of), time.time, time.clock_gettime
    assert guard._why(lease, guard.now()) == ""
    monkeypatch.setattr(time, "time", lambda: wall() + wall_s)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: boot(clock) + passed_s)
    assert guard._why(lease, guard.now()) == "its time was up"


def test_a_guard_ends_what_is_idle(guard: lease_guard.LeaseGuard, clouds: Clouds) -> None:
    """Goal: a machine without use for its minutes is ended, one in use or that cannot be asked is not. Red with what is
    not known taken for idle."""
    limits = Limits(hours_max=1.0, spend_max=9.0, idle_minutes_max=0.5 / 60)
    idle, busy, unknown = (rent_with(limits) for _ in range(3))
    does.update({idle.name: "", busy.name: "the run x", unknown.name: None})
    deadline = time.monotonic() + 200
    while idle.name in clouds["lambda"].bill() and time.monotonic() < deadline:
        due = {}
        for lease in guard.look():
            guard._ask_use(lease)
            if why := guard._why(lease, time.time()):
                due[lease.name] = why
        guard._end(due) if due else None
    assert clouds["lambda"].bill().keys() == {busy.name, unknown.name}, said
    assert f"{idle.name}: it was idle for 0.00833333 minutes, and it is ended" in said
    for lease in (busy, unknown):
        guard._end({lease.name: "test"})


SMI = """#!/bin/sh
case "$*" in
  *utilization*) printf '{use}\\n' ;;
  *compute-apps*) printf '{apps}' ;;
esac
exit {code}
"""


@pytest.mark.parametrize(
    ("use", "apps", "code", "doing"),
    [
        ("0\\n3", "", 0, ""),
        ("0\\n97", "", 0, "a GPU at 97 %"),
        ("[N/A]", "1234\\n", 0, "a process on a GPU"),
        ("[N/A]", "", 0, ""),
        ("97", "", 9, ""),
    ],
)
def test_what_a_machine_does(
    *, use: str, apps: str, code: int, doing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: GPU use is read from nvidia-smi; a card that tells none is in use while a process is on it. Red with the
    first card alone read, and with [N/A] taken for idle."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI.format(use=use, apps=apps, code=code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine_use.doing(str(tmp_path)) == doing


def test_a_live_run_and_a_copy_are_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a machine with a live supervisor, or from which results are copied, is not idle, whatever its GPUs do.
    Red without the runs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert machine_use.doing(str(tmp_path)) == ""
    lock = hold_lock(RunDir(tmp_path / "runs" / "one"))
    assert lock is not None and machine_use.doing(str(tmp_path)) == "the run one"
    lock.close()
    assert machine_use.doing(str(tmp_path)) == ""
    command = ["rsync", "--server", "-e.LsfxCIvu", ".", str(tmp_path / "copied")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as copying:
        wait_for(lambda: machine_use.doing(str(tmp_path)) == "rsync", "the copy is seen")
        copying.kill()


def test_runpod_ends_it_by_itself(clouds: Clouds) -> None:
    """Goal: with every guard of ours gone, RunPod ends a pod at the time that its create call named. Red with the call
    of the other interface, which has no such field."""
    began, cloud = time.time(), clouds["runpod"]
    lease = rent_with(Limits(hours_max=2 / HOUR, spend_max=9.0), "runpod")
    # two seconds from its order on, which was made between these two; told in whole seconds
    assert lease.until is not None
    ends_at = cloud.machines[lease.machine_id or ""].ends_at
    assert began + 2 - 1 <= ends_at <= lease.until + 1
    wait_for(lambda: cloud.bill() == {}, "the end by the provider", timeout_s=60)
    assert cloud.ended_by_provider == [lease.machine_id]


GRAPHQL: list[tuple[Any, str]] = [
    (
        {"message": "Variable has unknown field", "extensions": {"code": "BAD_USER_INPUT"}},
        "refused",
    ),
    (
        {"message": "Something went wrong", "extensions": {"code": "INTERNAL_SERVER_ERROR"}},
        "unclear",
    ),
    ({"message": "There are no instances currently available", "extensions": {}}, "no capacity"),
    ({"message": "the service is unavailable"}, "unclear"),
]


@pytest.mark.parametrize(("error", "kind"), GRAPHQL)
def test_errors_with_http_200(
    error: dict[str, Any], kind: str, clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: errors of RunPod's other interface, which come with HTTP 200, are told apart by whether a machine may have
    been made. Red with any error taken for a refusal."""
    body = {"errors": [error], "data": None}
    offer = first_offer(client_of("runpod"))
    monkeypatch.setattr(clouds["runpod"], "on_create", lambda *_: Answer(200, body))
    with pytest.raises(CloudError) as caught:
        rent_with(Limits(hours_max=1.0, spend_max=9.0), "runpod", offer)
    assert caught.value.kind == kind


def test_a_guard_that_cannot_be_armed(
    clouds: Clouds, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Goal: nothing is rented where no guard would end it, unless the config allows that."""
    log = Path(os.environ["ROLLOUTS_HOME"]) / "cloud" / "guard.log"
    log.mkdir(parents=True)
    screen = Screen(as_json=False)
    strict = replace(RENTS, providers=["prime"])
    offer = first_offer(client_of("prime"))
    with pytest.raises(CloudError, match="guard on this computer cannot be armed") as caught:
        rent_machines(offer, strict, "run", screen, 1)
    assert "allow_unguarded=True" in caught.value.text() and clouds["prime"].machines == {}
    assert [lease.step for lease in Ledger().leases()] == ["refused"]
    Guarding(replace(strict, allow_unguarded=True), screen).before_create(Ledger().leases()[0])
    assert "it is rented all the same" in capsys.readouterr().out


def test_a_guard_that_does_not_look(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a guard that dies before it has read the ledger is not taken for one. Red with its start taken for it."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(CloudError, match="cannot be armed"):
        start_guard()


def test_a_machine_without_its_own_key(renter: Laptop, clouds: Clouds) -> None:
    """Goal: a machine whose watchdog cannot be armed is ended."""
    clouds["vast"].gives_own_key = False
    done = renter.deploy(job(renter, providers=["vast"], retries_max=0), "--yes")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the watchdog on the machine cannot be armed" in done.stderr, done.stderr
    assert "CONTAINER_API_KEY" in done.stderr and clouds["vast"].bill() == {}


@contextlib.contextmanager
def booted(
    name: ProviderName, clouds: Clouds, shared_files: Path, tmp_path: Path
) -> Iterator[tuple[Lease, Path]]:
    """A rented machine with an sshd that was reached, and its rollouts home."""
    with contextlib.ExitStack() as stack:
        machines = Machines(tmp_path, shared_files, stack)
        clouds[name].boot, clouds[name].shut_down = machines.boot, machines.shut_down
        limits = Limits(hours_max=1.0, spend_max=9.0, idle_minutes_max=1 / 60)
        lease = rent_with(limits, name, public_key=own_public_key())

        async def reached() -> None:
            async with open_providers(keys_here([name])[0]) as providers:
                options = {"timeout_s": 200.0, "price_max": 9.0, "say": print}
                await reach(providers[name], lease, lambda: log_in(lease.name), **options)

        anyio.run(reached)
        yield lease, machines.hosts[lease.name][0].home


def test_an_idle_machine_ends_itself(clouds: Clouds, shared: Path, tmp_path: Path) -> None:
    """Goal: a machine on which a run lives stays, and ends itself once nothing does, with this computer off."""
    with booted("runpod", clouds, shared, tmp_path) as (lease, home):
        lock = hold_lock(RunDir(home / "runs" / "one"))
        arm_watchdog(lease)
        looks = clouds["runpod"].calls("GET", "/pods")
        ended_by = time.monotonic() + 3  # it looks each quarter of a second
        wait_for(lambda: time.monotonic() > ended_by, "three times its limit")
        assert lock is not None and clouds["runpod"].bill() and looks
        lock.close()
        wait_for(lambda: clouds["runpod"].bill() == {}, "the watchdog")
        assert clouds["runpod"].ended_themselves == [lease.machine_id]


def test_an_idle_machine_is_ended_from_here(
    guard: lease_guard.LeaseGuard,
    clouds: Clouds,
    shared: Path,
    tmp_path: Path,
) -> None:
    """Goal: where the key may not go to the machine, the guard asks it over SSH what it does, and ends an idle one."""
    with booted("prime", clouds, shared, tmp_path) as (lease, home):
        lock = hold_lock(RunDir(home / "runs" / "one"))
        assert lock is not None and use_of(lease) == "the run one"
        lock.close()
        assert use_of(lease) == "" and use_of(replace(lease, name="unknown")) is None
        guard._use_of = use_of
        guard.run(stay=False)
        assert clouds["prime"].bill() == {}
    assert Ledger().lease(lease.name).reason == "it was idle for 0.0166667 minutes"


@contextlib.contextmanager
def guard_host(renter: Laptop, tmp_path: Path) -> Iterator[Any]:
    """Another computer, with the providers' keys, where `deploy guard --stay` runs as a service."""
    tools = tool_directory(tmp_path / "second-tools")
    with host(tmp_path / "second", renter.key, path=tools) as second:
        renter.know(second)
        environment = {**renter._environment({}), "ROLLOUTS_HOME": str(second.home)}
        command = [*renter.command, "guard", "--stay"]
        log = (tmp_path / "second.log").open("w")
        process = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
        try:
            stays = second.home / "cloud" / "guard.stay"
            wait_for(lambda: stays.exists() and stays.read_text(), "the guard on the second host")
            yield second
        finally:
            process.kill()
            process.wait()
            log.close()


def test_a_guard_on_a_second_host(renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: with this computer off, a guard that stays on another one ends the machine of a cloud whose key may not go
    to the machine."""
    with guard_host(renter, tmp_path) as second:
        changes = {"providers": ["prime"], "guard_host": second.target}
        rented_and_killed(renter, **changes)
        assert kill_all(f"HOME={renter.home}", "guard_process")
        assert clouds["prime"].bill(), "it was rented"
        ends_in(second.home, 0)
        wait_for(lambda: clouds["prime"].bill() == {}, "the guard of the second host")
        ledger = Ledger(second.home / "cloud" / "ledger.jsonl")
        wait_for(lambda: [lease.step for lease in ledger.leases()] == ["ended"], "its ledger")


def test_idleness_by_a_second_host(renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: the guard of another computer asks the machine what it does, by a key of its own that the machine lets in,
    and ends an idle one with this computer off; the laptop's key stays here. Red with a guard that has no way there."""
    with guard_host(renter, tmp_path) as second:
        changes = {"providers": ["prime"], "guard_host": second.target, "idle_minutes_max": 0.1}
        config = job(renter, **changes)
        process = renter.start(config, "--yes", "--run-id", "idle", start_new_session=True)
        wait_for(lambda: [lease for lease in leases(renter) if lease.machine_id], "the machine")
        kill_all(f"HOME={renter.home}", "guard_process")
        wait_for(lambda: list(second.home.glob("cloud/machines/*/ssh_config")), "its way there")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        wait_for(lambda: clouds["prime"].bill() == {}, "the guard of the second host")
        ledger = Ledger(second.home / "cloud" / "ledger.jsonl")
        wait_for(lambda: [lease.step for lease in ledger.leases()] == ["ended"], "its ledger")
        assert ledger.leases()[0].reason == "it was idle for 0.1 minutes"
        keys = [home / "cloud/id_ed25519.pub" for home in (renter.rollouts_home, second.home)]
        assert keys[0].read_text() != keys[1].read_text()


@pytest.mark.parametrize("before", [None, "", "ssh-ed25519 AAAA one", "ssh-ed25519 AAAA one\n"])
def test_the_key_of_a_guard_has_a_line_of_its_own(before: str | None, tmp_path: Path) -> None:
    """Goal: a machine lets the guard's key in beside those that it has, also below a last line without an end. Red
    with nothing printed before the key: both were one line, and neither key was let in."""
    file = tmp_path / ".ssh" / "authorized_keys"
    if before is not None:
        file.parent.mkdir()
        file.write_text(before)
    added = "restrict ssh-ed25519 BBBB"
    command = ["sh", "-c", LET_IN, "sh", added]
    subprocess.run(command, check=True, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    lines = [line for line in file.read_text().splitlines() if line]
    assert lines == [*(before or "").splitlines(), added]


def test_a_second_host_without_a_guard(renter: Laptop, clouds: Clouds, tmp_path: Path) -> None:
    """Goal: nothing is rented where the host that is to guard does not."""
    tools = tool_directory(tmp_path / "second-tools")
    with host(tmp_path / "second", renter.key, path=tools) as second:
        renter.know(second)
        done = renter.deploy(job(renter, providers=["prime"], guard_host=second.target), "--yes")
    assert done.returncode == 2 and "no `deploy guard --stay` runs there" in done.stderr, (
        done.stderr
    )
    assert clouds["prime"].machines == {}
