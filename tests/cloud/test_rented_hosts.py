"""Several rented machines for one run: all or none, on one private network."""

import contextlib
import getpass
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base_config import ProvisionConfig
from rollouts.cloud import CloudError
from rollouts.cloud.ledger import Ledger
from rollouts.remote import rented
from rollouts.remote.rent_machine import find_machines, rent_machines
from rollouts.remote.run.wanted import EVERYTHING
from rollouts.view.screen import Screen
from scripts import cloud_check
from tests.cloud.fakes.server import FakeCloud, FakeMachine
from tests.cloud.renting import RENTS, kill_all
from tests.cloud.test_cloud_verbs import config_that_rents, deploy
from tests.cloud.test_interrupted import one_curve
from tests.remote.conftest import share_environments
from tests.remote.hosts import Laptop, wait_for, write_config
from tests.several.networks import network, networked_host

pytestmark = pytest.mark.timeout(900)  # as long as all else waits for the machine
Clouds = dict[str, FakeCloud]
TWO = replace(RENTS, providers=["lambda"], retries_max=0)


def test_one_that_fails_ends_the_others(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: where the second of two machines cannot be had, the first is ended. Red with it left for the next offer."""
    monkeypatch.setattr("rollouts.remote.rent_machine.start_guard", lambda: None)
    cloud, screen = clouds["lambda"], Screen(as_json=False)
    offer = find_machines(TWO, screen, hosts=2)[0]
    create = cloud.on_create  # type: ignore[attr-defined]

    def second_fails(path: str, query: dict[str, str], body: Any) -> Any:
        return cloud.no_capacity() if cloud.machines else create(path, query, body)

    monkeypatch.setattr(cloud, "on_create", second_fails)
    with pytest.raises(CloudError) as caught:
        rent_machines(offer, TWO, "run", screen, 2)
    assert caught.value.kind == "no capacity" and len(cloud.machines) == 1 and cloud.bill() == {}
    assert [lease.step for lease in Ledger().leases()] == ["ended", "refused"]
    assert [lease.limits.spend_max for lease in Ledger().leases() if lease.limits] == [10.0, 10.0]


def test_clouds_without_a_network_between_machines(clouds: Clouds, tmp_path: Path) -> None:
    """Goal: machines of a cloud that gives them no private network are not rented for one run, and it is said why. Red
    with any two machines taken, and with a plan without its network's line."""
    two = config_that_rents(tmp_path, hosts=2, providers=["runpod", "lambda"])
    out = deploy("offers", two).stdout
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["lambda", "lambda"]
    assert "no private network between its single machines" in out
    plan = deploy(two, "--plan").stdout
    assert "the private one of lambda's region; left out, having none: runpod" in plan, plan
    none = deploy("offers", config_that_rents(tmp_path, hosts=2, providers=["vast"]), code=2)
    assert "whose single machines share a network" in none.stderr, none.stderr


@contextlib.contextmanager
def machines_on_a_network(
    cloud: FakeCloud,
    shared: Path,
    tmp_path: Path,
) -> Iterator[None]:
    """Let the provider's machines be hosts of one private network, that die when they are ended."""
    with contextlib.ExitStack() as stack:
        lan = stack.enter_context(network())
        own: dict[str, contextlib.ExitStack] = {}

        def boot(machine: FakeMachine, public_key: str) -> tuple[str, int, str]:
            place = tmp_path / machine.name
            place.mkdir()
            (place / "user.pub").write_text(public_key + "\n")
            own[machine.name] = stack.enter_context(contextlib.ExitStack())
            made = own[machine.name].enter_context(
                networked_host(lan, place / "host", place / "user", path=shared / "bin", port=22)
            )
            share_environments(made.home, shared)
            return made.address, 22, "root"

        cloud.boot, cloud.shut_down = boot, lambda machine: own[machine.name].close()
        yield


def in_this_process(
    renter: Laptop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Make this process the laptop's: the provider's user is another one here."""
    for name, value in renter._environment({}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(renter.project)
    monkeypatch.setattr("rollouts.cloud.lambda_labs.USER", getpass.getuser())


def rent_two(
    renter: Laptop,
    provision: ProvisionConfig,
    **fields: Any,
) -> int:
    config = str(write_config(renter.project, target__hosts=2, provision=provision, **fields))
    options = rented.RentOptions(
        plan_only=False,
        detach=False,
        run_id="both",
        busy_ok=False,
        yes=True,
        wanted=EVERYTHING,
    )
    screen = Screen(as_json=False)
    try:
        return rented.deploy(config, screen, (), options, remote=None, accept_new_host_key=False)
    finally:
        kill_all(f"HOME={renter.home}", "guard_process")


def test_a_run_on_two_rented_machines(
    renter: Laptop,
    clouds: Clouds,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: two machines are rented for one run, it takes place on both, and both are ended."""
    in_this_process(renter, monkeypatch)
    cloud = clouds["lambda"]
    with machines_on_a_network(cloud, shared, tmp_path):
        code = rent_two(renter, TWO)
    assert code == 0 and len(cloud.machines) == 2 and cloud.bill() == {}
    ledger = Ledger(renter.rollouts_home / "cloud" / "ledger.jsonl")
    assert [lease.step for lease in ledger.leases()] == ["ended", "ended"]


def test_the_whole_life_at_lambda(
    *,
    renter: Laptop,
    clouds: Clouds,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Goal: scripts/cloud_check goes through a machine's life and ends it, also where SSH has one port and one user for
    all. RunPod's is in test_rented_runs."""
    in_this_process(renter, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["cloud_check", "lambda", "--max-price", "3"])
    with machines_on_a_network(clouds["lambda"], shared, tmp_path):
        try:
            code = cloud_check.main()
        finally:
            kill_all(f"HOME={renter.home}", "guard_process")
    out = capsys.readouterr().out
    assert code == 0 and "logged in; its status tells $2.49 an hour" in out, out
    assert "gone; it cost at most $" in out and len(clouds["lambda"].machines) == 1


@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_that_loses_one_of_two_machines(
    *,
    lost: int,
    renter: Laptop,
    clouds: Clouds,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: with resumes_max, a run on several machines goes on on new ones from the last checkpoint that is here,
    whichever machine was taken away; all are ended, and the curve is one. Red for the second one with a run that was
    stopped by its machine's end taken for one that a user stopped."""
    in_this_process(renter, monkeypatch)
    cloud, go = clouds["lambda"], tmp_path / "go"
    runs = renter.project / "runs" / "example"
    manifest = runs / "both/checkpoints/sft/step_000001/manifest.json"

    def take_away() -> None:
        wait_for(manifest.exists, "the first checkpoint, here")
        cloud.take_away([*cloud.machines.values()][lost])
        next_one = renter.rollouts_home / "registry" / "both-again1.json"
        wait_for(next_one.exists, "the run that goes on", timeout_s=600)
        go.touch()  # only now: what is left of the first run could take all its steps

    thread = threading.Thread(target=take_away)
    with machines_on_a_network(cloud, shared, tmp_path):
        thread.start()
        waits = {"STAND_IN_WAIT": str(go)}
        code = rent_two(renter, replace(TWO, resumes_max=1), output__mode="sft", env=waits)
        thread.join()
    assert code == 0 and len(cloud.machines) == 4 and cloud.bill() == {}
    ledger = Ledger(renter.rollouts_home / "cloud" / "ledger.jsonl")
    assert [lease.step for lease in ledger.leases()] == ["ended"] * 4
    one_curve(renter, "both", "both-again1")
