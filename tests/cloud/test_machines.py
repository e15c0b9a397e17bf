"""The ledger beside the providers: `deploy machines`, ends, crashes at every step, and two laptops with one account."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import anyio
import pytest

from rollouts.cloud import CloudError, GPUClient, lease_guard, provider_keys
from rollouts.cloud.accounts import keys_here, open_providers
from rollouts.cloud.ledger import Ledger, fold
from rollouts.cloud.machine_types import PROVIDERS, Order, ProviderName
from rollouts.cloud.our_machines import OurMachines, look
from rollouts.cloud.reaching import reach
from rollouts.cloud.renting import end, rent
from rollouts.remote.collect_machines import reconcile
from tests.cloud.conftest import QUICK
from tests.cloud.fakes.server import KEY, FakeCloud
from tests.cloud.test_cloud_verbs import deploy
from tests.cloud.test_gpu_client import PUBLIC_KEY, client_of, first_offer
from tests.remote.hosts import ROOT, wait_for

Clouds = dict[str, FakeCloud]


def looked(young_s: float = 0.0) -> OurMachines:
    async def ask() -> OurMachines:
        return await look(Ledger(), young_s=young_s)

    return anyio.run(ask)


def end_open() -> None:
    """End all that the ledger holds open, as `deploy machines end --orphans` does, with a test's patience."""

    async def ends() -> None:
        async with open_providers(keys_here()[0]) as providers:
            for lease in Ledger().open_leases():
                if lease.machine_id is not None:
                    await end(providers[lease.provider], lease, Ledger(), QUICK, reason="test")

    anyio.run(ends)


def test_machines_are_listed_and_ended(clouds: Clouds) -> None:
    """Goal: what bills is shown with its price and age, ended by name or all, and an error says who could not be asked.
    Red with machines of two providers told apart by their ids alone, and with the key's error left out."""
    assert deploy("machines").stdout == "no machine of ours bills\n"
    machines = [
        client_of(name).create(first_offer(client_of(name)), public_key=PUBLIC_KEY)
        for name in PROVIDERS
    ]
    out = deploy("machines").stdout
    for machine in machines:
        (line,) = [line for line in out.splitlines() if line.startswith(machine.name)]
        assert machine.provider in line and f"{machine.price_per_hour:.2f}" in line
    ls = deploy("ls")
    assert ls.stdout == "no runs\n" and ls.stderr.startswith(
        "warning: rented and not ended: rollouts-"
    )
    first = machines[0].name
    assert deploy("machines", "end", first).stdout == f"ended  {first}\n"
    assert "no machine" in deploy("machines", "end", first, code=2).stderr
    assert "which machine?" in deploy("machines", "end", code=2).stderr
    clouds["vast"].key_works = False
    done = deploy("machines", "--json", code=1)
    found = json.loads(done.stdout)
    assert len(found["machines"]) == 3 and list(found["problems"]) == ["vast"]
    assert f"not seen ({'created'})" in [row["state"] for row in found["machines"]]
    clouds["vast"].key_works = True
    assert len(deploy("machines", "end", "--orphans").stdout.splitlines()) == 3
    assert deploy("ls").stderr == ""


def test_a_machine_of_another_laptop(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a machine with a name like ours that is not in this ledger is shown, and ended only when that is said. Red
    with --orphans taking all of the account."""
    monkeypatch.setenv("ROLLOUTS_HOME", os.environ["HOME"] + "/other")
    client = client_of("runpod")
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    monkeypatch.setenv("ROLLOUTS_HOME", os.environ["HOME"] + "/.rollouts")
    assert "not in the ledger here" in deploy("machines").stdout
    deploy("machines", "end", "--orphans")
    assert machine.name in clouds["runpod"].bill()
    done = deploy("machines", "end", machine.name, code=2)
    assert "somebody else may be using it" in done.stderr
    deploy("machines", "end", machine.name, "--yes")


CRASH = """
import os, sys
from rollouts.cloud import GPUClient, ledger
from rollouts.cloud.renting import Patience

real, left = ledger.Ledger._append, [int(sys.argv[2])]

def append(self, *a, **k):
    real(self, *a, **k)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), 9)

ledger.Ledger._append = append
client = GPUClient(sys.argv[1], patience=Patience(settle_s=1.0, poll_s=0.02, ask_again_s=0.2))
machine = client.create(client.search(client.gpu_type.contains("H100"))[0], public_key="ssh-ed25519 AAAA")
client.terminate(machine)
"""


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("lines", [1, 2, 3])
def test_killed_between_two_steps(name: ProviderName, lines: int, clouds: Clouds) -> None:
    """Goal: after kill -9 at each line of the ledger, what was made is found and ended, and nothing is made twice. Red
    with the intent written after the create call."""
    command = [sys.executable, "-c", textwrap.dedent(CRASH), name, str(lines)]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=200)
    assert done.returncode == -signal.SIGKILL
    assert len(Ledger().open_leases()) == 1
    looked()
    assert len(clouds[name].machines) == (0 if lines == 1 else 1)
    assert [lease.machine_id is not None for lease in Ledger().open_leases()] == (
        [] if lines == 1 else [True]
    )
    end_open()
    assert Ledger().open_leases() == []


@pytest.mark.parametrize("name", PROVIDERS)
def test_killed_while_the_provider_makes_it(name: ProviderName, clouds: Clouds) -> None:
    """Goal: killed after the provider made the machine and before it answered, it is found by the name of the intent.
    Red with leases without an id passed over."""
    clouds[name].fault("create", "slow")
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(CRASH), name, "9"], cwd=ROOT)
    wait_for(lambda: clouds[name].machines, "the machine")
    process.kill()
    process.wait()
    (lease,) = Ledger().open_leases()
    assert lease.step == "intent" and lease.machine_id is None
    looked()
    (lease,) = Ledger().open_leases()
    assert lease.step == "created" and lease.machine_id in clouds[name].machines
    end_open()


def test_what_was_taken_for_ended_and_bills(clouds: Clouds) -> None:
    """Goal: the ledger follows the provider: what still bills is open again. Red with closed leases skipped."""
    client = client_of("lambda")
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    Ledger().note(machine.name, "ended", reason="a wrong line")
    assert Ledger().open_leases() == []
    assert [row.name for row in looked().rows] == [machine.name]
    end_open()


def test_a_machine_ended_elsewhere(clouds: Clouds) -> None:
    """Goal: a machine that was ended on the provider's page is closed here too, but not while it may be too young to
    show. Red without the age."""
    client = client_of("prime")
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    clouds["prime"].end(clouds["prime"].machines[machine.machine_id])
    assert len(looked(young_s=600.0).rows) == 1
    assert looked().rows == [] and Ledger().leases()[0].reason == "the provider no longer has it"


def test_a_torn_ledger(clouds: Clouds) -> None:
    """Goal: a line that a crash tore, and lines of nonsense, hide no lease. Red with the first bad line raised."""
    client = client_of("runpod")
    Ledger().path.parent.mkdir(parents=True)
    Ledger().path.write_text(
        '{"time": 1, "name": "x", "step": "created"}\n[1]\n{"name": 3}\n{"time": 17, "na'
    )
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    assert [lease.name for lease in Ledger().open_leases()] == [machine.name]
    assert fold([{"name": "a", "step": "intent", "provider": "nobody"}]) == {}
    client.terminate(machine)


def test_a_machine_that_is_stuck(clouds: Clouds) -> None:
    """Goal: a machine that is never ready, and one that lets nobody log in, are given up after their time, with what
    was last seen. Red without the deadline."""

    async def reached(name: ProviderName) -> None:
        lease = Ledger().lease(machine.name)
        async with open_providers(keys_here([name])[0]) as providers:
            options = {"timeout_s": 1.0, "price_max": 9.0, "say": print}
            await reach(providers[name], lease, lambda: "it refuses the key", **options)

    for fault, last in (
        ("stuck", "last: PROVISIONING"),
        ("closed", "root@127.0.0.1:9: it refuses the key"),
    ):
        clouds["runpod"].fault("create", fault)
        machine = client_of("runpod").create(
            first_offer(client_of("runpod")), public_key=PUBLIC_KEY
        )
        for _ in range(4):
            client_of("runpod").get(machine)
        with pytest.raises(CloudError) as caught:
            anyio.run(reached, "runpod")
        assert (
            last in caught.value.text()
            and machine.name in caught.value.text()
            and "an hour" in caught.value.text()
        )
    end_open()


def test_what_a_lease_cost() -> None:
    """Goal: what is shown as spent is price times time, up to the end. Red with the time after the end counted."""
    lines = [
        {
            "time": 0,
            "name": "a",
            "step": "intent",
            "provider": "vast",
            "price_per_hour": 2.0,
            "gpus": 1,
        }
    ]
    lines += [{"time": 5, "name": "a", "step": "created", "machine_id": "7", "price_per_hour": 3.0}]
    assert fold(lines)["a"].spent(3600) == 3.0
    ended = [*lines, {"time": 1800, "name": "a", "step": "ended"}]
    assert fold(ended)["a"].spent(9e9) == 1.5 and not fold(ended)["a"].may_bill
    assert fold([lines[0], {"time": 9, "name": "a", "step": "refused"}])["a"].spent(3600) == 0.0


def test_no_file_holds_a_key(clouds: Clouds) -> None:
    """Goal: after a life with errors at each provider, no file under HOME holds a key. Red with the provider's answer,
    which repeats it, written as the reason."""
    for name in PROVIDERS:
        client = GPUClient(name, patience=QUICK)
        offer = first_offer(client)
        machine = client.create(offer, public_key=PUBLIC_KEY)
        clouds[name].fault("create", "capacity")
        with pytest.raises(Exception, match=r"free now|gone"):
            client.create(offer if name != "vast" else first_offer(client), public_key=PUBLIC_KEY)
        client.terminate(machine)
    files = [path for path in Ledger().path.parent.rglob("*") if path.is_file()]
    assert files and [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert time.time() - Ledger().leases()[0].since < 300


def test_a_create_that_is_cut_off(clouds: Clouds) -> None:
    """Goal: Ctrl-C while the provider makes the machine, and a disk that is full when it is made, leave none billing.
    Red with the error alone passed on."""
    offer = first_offer(client_of("lambda"))
    order = Order(
        name="rollouts-cut-off", offer=offer, public_key=PUBLIC_KEY, disk_gib=50, image=None
    )

    async def cut_off() -> None:
        async with (
            open_providers(keys_here(["lambda"])[0]) as providers,
            anyio.create_task_group() as group,
        ):

            async def cut() -> None:
                while not clouds["lambda"].machines:
                    await anyio.sleep(0.02)
                group.cancel_scope.cancel()

            group.start_soon(cut)
            await rent(providers["lambda"], order, Ledger(), QUICK)

    clouds["lambda"].fault("create", "slow")
    anyio.run(cut_off)
    assert (
        clouds["lambda"].machines and clouds["lambda"].bill() == {} and Ledger().open_leases() == []
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Ledger, "note", full)
        client_of("lambda").create(offer, public_key=PUBLIC_KEY)
    assert len(clouds["lambda"].machines) == 2 and clouds["lambda"].bill() == {}
    looked()


def full(self: Ledger, name: str, step: str, **fields: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_guard_on_a_full_disk(clouds: Clouds) -> None:
    """Goal: machines whose time is up are ended where no line can be written, all of them, and the guard looks again.
    Red with the line written before the provider is asked, and with the first error ending the guard."""
    for name in ("rollouts-a", "rollouts-b"):
        client_of("lambda").create(
            first_offer(client_of("lambda")), public_key=PUBLIC_KEY, name=name
        )
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "note", full)
        patch.setattr(lease_guard, "Patience", lambda: QUICK)
        guard = lease_guard.LeaseGuard(said.append, lambda lease: None)
        guard._keys = keys_here()[0]
        guard._seen = {lease.name: lease for lease in Ledger().open_leases()}
        guard._end(dict.fromkeys(guard._seen, "its time was up"))
    assert clouds["lambda"].bill() == {}
    assert sum("is ended, but" in text for text in said) == 2, said
    looked()
    assert Ledger().open_leases() == []


def test_a_key_of_another_account(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a machine of one account is not taken for gone by the list of another; it stays open, said with the way
    out. Red with every list believed, and with the other account's 404 taken for the end."""
    client = client_of("vast")
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    made = clouds["vast"].machines
    monkeypatch.setattr(provider_keys.ProviderKey, "account", "another")
    clouds["vast"].machines = {}
    found = looked()
    assert [row.name for row in found.rows] == [machine.name] and "another key" in found.problems[
        "vast"
    ].text()
    with pytest.raises(CloudError, match="not confirmed") as caught:
        end_open()
    assert "--yes" in caught.value.text() and len(Ledger().open_leases()) == 1
    clouds["vast"].machines = made
    assert looked().problems == {}, "a new key of the same account"
    end_open()


def test_a_name_that_somebody_else_gives_too(clouds: Clouds) -> None:
    """Goal: a colleague's machine with the name of one of ours that has ended is theirs, and a name that the account
    has is not taken twice. Red with names alone compared."""
    client, theirs = client_of("runpod"), clouds["runpod"].make
    client.terminate(client.create(first_offer(client), public_key=PUBLIC_KEY, name="train"))
    colleague = theirs("train", 1.0, {"gpu": {"id": "H100"}}, "")
    other = theirs("busy", 1.0, {"gpu": {"id": "H100"}}, "")
    assert looked().rows == [] and Ledger().open_leases() == []
    with pytest.raises(CloudError, match="is named busy"):
        client.create(first_offer(client), public_key=PUBLIC_KEY, name="busy")
    for machine in (colleague, other):
        clouds["runpod"].end(machine)


def test_gc_brings_the_ledger_to_what_the_providers_say(
    clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: gc opens again what the ledger took for ended, shows what bills without a live run, and ends nothing
    without a yes to that machine: not another computer's, with --yes neither. Red with nobody there taken for a
    yes."""
    client = client_of("runpod")
    ours = client.create(first_offer(client), public_key=PUBLIC_KEY)
    Ledger().note(ours.name, "ended", reason="a wrong line")
    monkeypatch.setenv("ROLLOUTS_HOME", os.environ["HOME"] + "/other")
    theirs = client_of("prime").create(first_offer(client_of("prime")), public_key=PUBLIC_KEY)
    monkeypatch.setenv("ROLLOUTS_HOME", os.environ["HOME"] + "/.rollouts")
    out = deploy("gc", "--yes").stdout
    assert f"ledger    {ours.name}: ended, now created" in out
    assert f"bills     {ours.name} (runpod" in out and f"bills     {theirs.name} (prime" in out
    assert "not in the ledger here" in out and clouds["prime"].bill() and clouds["runpod"].bill()
    asked: list[str] = []

    def only_theirs(text: str) -> bool:
        asked.append(text)
        return theirs.name in text

    assert reconcile(only_theirs).document["ended"] == [theirs.name] and len(asked) == 2
    assert clouds["prime"].bill() == {} and ours.name in clouds["runpod"].bill()
    assert json.loads(deploy("gc", "--json").stdout)["machines"]["machines"][0]["name"] == ours.name
    assert reconcile(lambda text: True).document["ended"] == [ours.name]
