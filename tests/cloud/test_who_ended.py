"""Who ended a machine that is gone, its provider or we; and what the machines of one run cost together."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from base_config import changed, load_config
from rollouts.api import find
from rollouts.cloud import lease_guard
from rollouts.cloud.ledger import Lease, Ledger, Limits
from rollouts.cloud.our_machines import end_all
from rollouts.remote import rented, rented_host
from rollouts.remote.errors import DeployError, Gone, HostGoneError
from rollouts.remote.machine_end import after_interruption
from rollouts.remote.rent_machine import find_machines
from rollouts.remote.rented_host import why_gone
from rollouts.remote.run import registry
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.wanted import EVERYTHING
from rollouts.run_dir import RunDir
from rollouts.view.screen import Screen
from tests.cloud.conftest import QUICK
from tests.cloud.fakes.server import FakeCloud
from tests.cloud.renting import RENTS
from tests.cloud.test_gpu_client import client_of, first_offer
from tests.cloud.test_guards import rent_with
from tests.cloud.test_machines import looked

Clouds = dict[str, FakeCloud]
LONG = Limits(hours_max=2.0, spend_max=20.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's patience, for whoever ends a machine."""
    monkeypatch.setattr("rollouts.cloud.renting.Patience", lambda: QUICK)
    monkeypatch.setattr(lease_guard, "Patience", lambda: QUICK)


def gone(lease: Lease) -> Gone:
    found = why_gone(lease.name)
    assert found is not None, "it is gone"
    return found


def end_here(*leases: Lease, why: str = "deploy machines end") -> None:
    anyio.run(end_all, leases, Ledger(), QUICK, why)


@pytest.mark.parametrize("name", ["runpod", "vast", "lambda", "prime"])
def test_a_machine_that_its_provider_took(name: Any, clouds: Clouds) -> None:
    """Goal: a machine that was taken away, with time and money left, is told as taken; also after another follower of
    the run has ended what was left. One that is in no list any more was ended by somebody, as on the provider's page,
    unless it was a spot machine; also once this computer's ledger was brought to what the provider says. Red with each
    that its provider has no more taken: what a user had ended on the page was rented anew."""
    one, other = rent_with(LONG, name), rent_with(LONG, name)
    assert why_gone(one.name) is None and why_gone("some-host") is None
    cloud = clouds[name]
    cloud.take_away(cloud.named(one.name)[0])
    found = gone(one)
    assert found.taken and one.provider in found.why, found
    after_interruption(HostGoneError("run", one.name, found))
    assert cloud.bill() == {}, "the other machine of the run is ended too"
    assert gone(one).taken and gone(other).taken, "by the same cause"
    closed = rent_with(LONG, name)
    cloud.end(cloud.named(closed.name)[0])
    for _ in "ab":
        assert not gone(closed).taken and "ended on its page" in gone(closed).why
        looked()
    assert not Ledger().lease(closed.name).may_bill
    spot = rent_with(LONG, name, replace(first_offer(client_of(name)), spot=True))
    cloud.end(cloud.named(spot.name)[0])
    assert gone(spot).taken


def test_a_machine_that_was_ended_from_here(clouds: Clouds) -> None:
    """Goal: what a command ended was not taken, nor was any other machine of its run; also where the command was
    killed before it heard of the end."""
    one, other = rent_with(LONG), rent_with(LONG)
    end_here(one)
    assert gone(one) == Gone("deploy machines end", taken=False)
    cloud = clouds["lambda"]
    cloud.take_away(cloud.named(other.name)[0])
    assert gone(other) == Gone(f"{one.name}: deploy machines end", taken=False)
    killed = rent_with(LONG, "vast")
    Ledger().note(killed.name, "ending", reason="deploy machines end")
    assert why_gone(killed.name) is None, "it is still there"
    clouds["vast"].end(clouds["vast"].named(killed.name)[0])
    assert gone(killed) == Gone("deploy machines end", taken=False)


def test_a_run_is_asked_for_whose_machine_has_ended(clouds: Clouds, tmp_path: Path) -> None:
    """Goal: from Python too the message names the machine, when and why it ended, and what is here. Red with the name
    that does not resolve."""
    lease = rented_for("over", tmp_path)
    end_here(lease)
    said = status_error("over")
    assert f"{lease.name} is gone: the machine that" in said, said
    assert "why it ended: deploy machines end" in said and "nothing of the run was pulled" in said


def rented_for(run_id: str, tmp_path: Path) -> Lease:
    """A machine of Vast and the registry's entry of its run. Its name leads nowhere: SSH finds no such host."""
    lease = rent_with(LONG, "vast")
    places = {"home": "/h", "run_path": f"/h/runs/{run_id}", "local_dir": str(tmp_path / run_id)}
    told = {"target": lease.name, "repository": "/", "created_at": 0.0, **places}
    registry.save(RunEntry(run_id=run_id, experiment_name="e", **told))
    return lease


def status_error(run_id: str) -> str:
    with pytest.raises(DeployError) as caught:
        find(run_id).status()
    return caught.value.text(launching=False)


def test_an_end_that_only_the_provider_knows(
    clouds: Clouds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: where a machine does not answer that bills by the ledger, its provider is asked, and a machine that has
    ended there is told as gone. A provider that does not answer in time, or has the machine, changes nothing in what
    is told. Red with the ledger alone asked, and without the limit of time."""
    lease, cloud = rented_for("gone", tmp_path), clouds["vast"]
    there = status_error("gone")
    assert "is gone" not in there
    cloud.end(cloud.named(lease.name)[0])
    cloud.fault("get", "slow")
    with monkeypatch.context() as patched:
        patched.setattr(rented_host, "PROVIDER_S", 1.0)
        assert status_error("gone") == there
    said = status_error("gone")
    assert f"{lease.name} is gone" in said and "for gone ended, as vast says.", said
    assert f"deploy machines end {lease.name}" in said
    assert "vast no longer has it" in said and Ledger().lease(lease.name).may_bill
    end_here(lease)


@pytest.mark.parametrize("limit", ["time", "money"])
@pytest.mark.parametrize("by", ["guard", "machine"])
def test_a_machine_at_its_limit(by: str, limit: str, clouds: Clouds) -> None:
    """Goal: a machine whose time or money was up was not taken, whether the guard here ended it, or the one on the
    machine, of whose end the ledger has no word. Red with every machine that its provider has no more taken."""
    limits = Limits(hours_max=1 / 3600, spend_max=20.0)
    if limit == "money":
        limits = Limits(hours_max=2.0, spend_max=0.0005)
    lease = rent_with(limits, "vast")
    if by == "guard":
        lease_guard.LeaseGuard(lambda text: None, lambda lease: None).run(stay=False)
    else:
        clouds["vast"].end(clouds["vast"].named(lease.name)[0])
    found = gone(lease)
    assert ("its time was up" if limit == "time" else "it had cost $") in found.why, found
    assert not found.taken
    clouds["vast"].end_what_is_due()


@pytest.mark.parametrize(("silent_min", "taken"), [(5, True), (31, False)])
def test_a_machine_that_was_idle(
    *, silent_min: int, taken: bool, clouds: Clouds, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: one that vanished after its run was silent for its idle minutes may have ended itself, and is not told as
    taken, unless its provider says that it took it. Red with the idle limit left out."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "events.jsonl").write_text("{}\n")
    os.utime(mirror / "events.jsonl", (time.time() - 60 * silent_min,) * 2)

    entry = SimpleNamespace(mirror=RunDir(mirror))
    monkeypatch.setattr(rented_host.registry, "find", lambda run_id: entry)
    limits = replace(LONG, idle_minutes_max=30.0)
    offers = [replace(first_offer(client_of("vast")), spot=True) for _ in "a"]
    vanished, outbid = rent_with(limits, "vast", *offers), rent_with(limits, "vast")
    cloud = clouds["vast"]
    cloud.end(cloud.named(vanished.name)[0])
    cloud.take_away(cloud.named(outbid.name)[0])
    assert gone(vanished).taken == taken and gone(outbid).taken
    end_here(outbid)


def run_to_its_end(
    monkeypatch: pytest.MonkeyPatch, lost: Any, going_on: Any = lambda *_: None, **changes: Any
) -> list[Lease]:
    """The leases of a run whose machines are lost as `lost(name of the machine)` does it. `going_on` is called then."""
    monkeypatch.setattr("rollouts.remote.rent_machine.start_guard", lambda: None)
    monkeypatch.setattr("rollouts.remote.rent_machine.arm_watchdog", lambda lease: None)
    monkeypatch.setattr("rollouts.remote.rent_machine.log_in", lambda name: "")
    monkeypatch.setattr(rented, "_going_on", going_on)
    provision = replace(RENTS, providers=["vast"], **changes)
    config = changed(load_config("configs/00_cpu_sft_rl.py"), {"provision": provision})

    def start(config: Any, screen: Any, *, remote: str, run_id: str, **_: Any) -> int:
        lost(remote)
        error = HostGoneError(run_id, remote, gone(Ledger().lease(remote)))
        error.standing = after_interruption(error)
        raise error

    monkeypatch.setattr(rented.commands, "start", start)
    options = rented.RentOptions(
        plan_only=False, detach=False, run_id="run", busy_ok=False, yes=True, wanted=EVERYTHING
    )
    screen = Screen(as_json=False)
    offers = find_machines(provision, screen)
    with pytest.raises(DeployError) as caught:
        rented._to_its_end(config, provision, offers, screen, options)
    told.append(caught.value.text())
    return Ledger().leases()


told: list[str] = []


def spends(monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, hours: Sequence[float]) -> Any:
    """What takes a machine away after so many hours of the ledger's clock."""
    now, left = [time.time()], list(hours)
    monkeypatch.setattr(time, "time", lambda: now[0])  # it stands still otherwise

    def lost(name: str) -> None:
        now[0] += 3600 * left.pop(0)
        cloud.take_away(cloud.named(name)[0])

    return lost


def test_the_money_of_a_run(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: spend_max holds over all machines of a run: each has what those before left, and none is rented once the
    rest would not pay for a login. hours_max is each machine's own. Red with spend_max for each machine anew."""
    lost = spends(monkeypatch, clouds["vast"], [1.0, 1.0, 0.35])
    leases = run_to_its_end(monkeypatch, lost, spend_max=5.4, resumes_max=9, ready_timeout_s=600.0)
    limits = [lease.limits for lease in leases if lease.limits]
    assert [round(one.spend_max, 1) for one in limits] == [5.4, 3.3, 1.1], limits
    assert {one.hours_max for one in limits} == {2.0} and len(leases) == 3
    assert "spend_max of the run is spent" in told[-1] and "deploy resume" in told[-1], told[-1]
    assert sum(lease.spent(0.0) for lease in leases) <= 5.4 and clouds["vast"].bill() == {}


@pytest.mark.parametrize("when", ["before", "while the next is rented"])
def test_a_stop_is_final(
    when: str, clouds: Clouds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goal: a run that was asked to stop, before its machine was taken or while the next one is rented, starts on no
    other, and none is left. Red with the machine's loss alone looked at."""
    take_away = spends(monkeypatch, clouds["vast"], [0.1])
    entry = SimpleNamespace(stop_asked=False, mirror=RunDir(Path("none")))
    monkeypatch.setattr(rented_host.registry, "find", lambda run_id: entry)
    monkeypatch.setattr("rollouts.remote.machine_end.registry.note_interrupted", lambda *_: None)
    monkeypatch.setattr("rollouts.remote.rented.registry.forget", lambda entry: None)

    def lost(name: str) -> None:
        take_away(name)
        entry.stop_asked = when == "before"

    def rents(*_: Any) -> None:
        entry.stop_asked = True

    leases = run_to_its_end(monkeypatch, lost, resumes_max=9, going_on=rents)
    assert len(leases) == (1 if when == "before" else 2) and clouds["vast"].bill() == {}
    said = capsys.readouterr().err + told[-1]
    assert "the run was asked to stop" in said or "was asked to stop, and run-again1 is not" in said


def test_what_we_end_is_not_replaced(
    clouds: Clouds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goal: with resumes_max, a run whose machine was ended at its limit or by a command rents no other."""
    lost = spends(monkeypatch, clouds["vast"], [1.99])
    assert len(run_to_its_end(monkeypatch, lost, resumes_max=9)) == 1
    assert "its time was up" in told[-1]
    ended = run_to_its_end(monkeypatch, lambda name: end_here(Ledger().lease(name)), resumes_max=9)
    assert len(ended) == 2 and "deploy machines end" in told[-1]
    assert "nothing is rented in its place" in capsys.readouterr().err
