"""`GPUClient` against stand-ins of the four providers: contracts, faults at every call, and secrets."""

import json
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.cloud import AsyncGPUClient, CloudError, GPUClient, MachineNeeds, Offer
from rollouts.cloud.accounts import MAKERS, find_offers
from rollouts.cloud.ledger import Ledger
from rollouts.cloud.machine_types import PROVIDERS, ProviderName
from rollouts.cloud.provider_keys import read_key
from tests.cloud.conftest import QUICK
from tests.cloud.fakes.server import KEY, Answer, FakeCloud

Clouds = dict[str, FakeCloud]
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey"
every_provider = pytest.mark.parametrize("name", PROVIDERS)


def client_of(name: ProviderName) -> GPUClient:
    return GPUClient(name, patience=QUICK)


def first_offer(client: GPUClient) -> Offer:
    return client.search(client.gpu_type.contains("H100"))[0]


def steps(name: str) -> list[str]:
    return [
        row["step"]
        for row in map(json.loads, Ledger().path.read_text().splitlines())
        if row["name"] == name
    ]


@every_provider
def test_the_life_of_a_machine(name: ProviderName, clouds: Clouds) -> None:
    """Goal: search, create, get, list, terminate at each provider; the states in their order, the address, the price.
    Red with `ssh.direct` alone read at RunPod, with an ACTIVE pod of Prime taken for ready, with one page of a list."""
    client = client_of(name)
    offer = first_offer(client)
    made = [
        client.create(offer if name != "vast" else first_offer(client), public_key=PUBLIC_KEY)
        for _ in range(2)
    ]
    machine = made[0]
    states = []
    for _ in range(6):
        found = client.get(machine)
        assert found is not None
        states.append((found.state, len(found.addresses) > 0))
    assert states[0] == ("starting", False) and states[-1] == ("ready", True)
    assert [state for state, _ in states] == sorted(
        (state for state, _ in states), key=["starting", "ready"].index
    )
    assert name != "runpod" or states[2] == ("ready", True), (
        "its address is in `runtime` before it is in `ssh`"
    )
    assert name != "prime" or states[2] == ("starting", True), "ACTIVE, and its image is on its way"
    assert found.addresses[0].host == "127.0.0.1" and found.addresses[0].port == (
        22 if name == "lambda" else 9
    )
    while len(made) < 3 and name != "vast":  # more than a page
        made.append(client.create(offer, public_key=PUBLIC_KEY))
    listed = {one.name: one for one in client.list()}
    assert listed.keys() == {one.name for one in made}
    assert listed[machine.name].price_per_hour == pytest.approx(offer.price_per_hour, abs=0.01)
    for one in made:
        client.terminate(one)
        assert steps(one.name) == ["intent", "created", "ending", "ended"]
    assert client.list() == []


def test_conditions_of_a_search(clouds: Clouds) -> None:
    """Goal: the terms that scripts use pick offers, over all providers, cheapest first. Red with terms of one machine
    compared with the price of one GPU, and with an unknown memory taken for enough."""
    client = GPUClient(patience=QUICK)
    small = client.search(
        (client.vram_gb >= 20)
        & (client.price_per_hour < 0.45)
        & client.gpu_type.contains("rtx 4090")
    )
    assert [offer.provider for offer in small][:2] == ["vast", "runpod"] and small[
        0
    ].price_per_hour < 0.35
    assert {offer.provider for offer in client.search(client.vram_gb > 79)} == {
        "runpod",
        "lambda",
        "prime",
        "vast",
    }
    eight = client.search(client.price_per_hour <= 24, MachineNeeds(gpus=8, gpu_types=("h100",)))
    assert [offer.provider for offer in eight] == ["runpod", "lambda", "runpod"]
    with pytest.raises(TypeError, match="join conditions with &"):
        client.search(client.vram_gb >= 20 and client.price_per_hour < 1)


def test_the_price_of_a_vast_offer_is_with_its_disk(clouds: Clouds) -> None:
    """Goal: an offer is compared by what it will cost. Red with dph_total, which is for another disk."""
    client = GPUClient("vast", patience=QUICK)
    (cheap,) = client.search(client.gpu_type.contains("4090"), MachineNeeds(disk_gib=720))
    assert cheap.price_per_hour == pytest.approx(0.30 + 0.15)


def test_async_works_in_a_running_loop(clouds: Clouds) -> None:
    """Goal: both faces work inside an event loop, as in a notebook. Red with `anyio.run` in the sync one."""

    async def both() -> tuple[int, int]:
        return len(await AsyncGPUClient("runpod").search()), len(GPUClient("runpod").search())

    assert anyio.run(both) == (4, 4)


PASSING = ("500 after", "lost", "500", "lost before", "429 plain", "429 json", "429 retry-after")
MADE = ("500 after", "lost", "page after", "408 after")
AMBIGUOUS = tuple(dict.fromkeys((*MADE, *PASSING)))


LOST = [
    (name, kind)
    for name in PROVIDERS
    for kind in AMBIGUOUS
    if name == "vast" or not kind.startswith("429 ")
]


@pytest.mark.parametrize(("name", "kind"), [*LOST, ("prime", "429 json")])
def test_a_create_without_an_answer(name: ProviderName, kind: str, clouds: Clouds) -> None:
    """Goal: what a lost answer made is found by its name and used; else it is an error, and nothing is made twice.
    Red with the create call made again, with the first page of the list alone read, and with an answer of success that
    is no JSON, as of a proxy, taken for a refusal."""
    cloud, client = clouds[name], client_of(name)
    others = [client.create(first_offer(client), public_key=PUBLIC_KEY) for _ in range(2)]
    cloud.fault("create", kind)
    if kind in MADE:
        machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
        assert (
            steps(machine.name) == ["intent", "unclear", "created"] and machine.name in cloud.bill()
        )
        others.append(machine)
    else:
        with pytest.raises(CloudError, match="no clear answer") as caught:
            client.create(first_offer(client), public_key=PUBLIC_KEY, name="rollouts-lost")
        assert caught.value.kind == "unclear" and "deploy machines" in caught.value.text()
        assert "rollouts-lost" in caught.value.text() and "an hour" in caught.value.text()
    assert [len(cloud.named(machine.name)) for machine in others] == [1] * len(others)
    for machine in others:
        client.terminate(machine)


@every_provider
def test_no_capacity(name: ProviderName, clouds: Clouds) -> None:
    """Goal: each provider's word for "none free" is told from a lost answer: nothing was made, another offer may do.
    Red with every 400 taken for a mistake of ours."""
    clouds[name].fault("create", "capacity")
    client = client_of(name)
    with pytest.raises(CloudError) as caught:
        client.create(first_offer(client), public_key=PUBLIC_KEY, name="rollouts-full")
    assert caught.value.kind == "no capacity" and steps("rollouts-full") == ["intent", "refused"]


@every_provider
@pytest.mark.parametrize("operation", ["offers", "get", "list", "terminate"])
def test_faults_that_pass(name: ProviderName, operation: str, clouds: Clouds) -> None:
    """Goal: reads and ends are tried again through every passing fault, one after another. Red with Retry-After
    needed, and with a 429 that is not JSON."""
    cloud, client = clouds[name], client_of(name)
    if operation == "offers":
        every_fault(cloud, "offers")
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    if operation != "offers":
        every_fault(cloud, operation)
    assert client.get(machine) is not None and [one.name for one in client.list()] == [machine.name]
    client.terminate(machine)
    assert not any(fault.times for fault in cloud.faults), "the faults came up"


def every_fault(cloud: FakeCloud, operation: str) -> None:
    for kind in PASSING:
        cloud.fault(operation, kind)


@every_provider
def test_an_end_that_does_nothing(name: ProviderName, clouds: Clouds) -> None:
    """Goal: "ended" is what the provider's reads say: an end that was answered well and did nothing is asked again.
    Red with the answer to DELETE believed."""
    cloud, client = clouds[name], client_of(name)
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    cloud.fault("terminate", "does nothing", times=2)
    client.terminate(machine)
    assert cloud.bill() == {} and steps(machine.name)[-1] == "ended"


@every_provider
def test_an_end_right_after_the_create(name: ProviderName, clouds: Clouds) -> None:
    """Goal: a machine that does not show yet is not taken for gone. Red with a 404 to DELETE taken for its end."""
    cloud, client = clouds[name], client_of(name)
    cloud.fault("create", "lag")
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    client.terminate(machine)
    assert cloud.bill() == {} and not cloud.machines[machine.machine_id].bills


def test_an_end_right_after_a_slow_create(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a machine whose create took longer than one takes to show has that time all the same. Red with the time
    counted from before the call: its end was noted, and it billed on."""
    cloud, client = clouds["lambda"], client_of("lambda")
    create = cloud.on_create  # type: ignore[attr-defined]

    def slowly(*asked: Any) -> Any:
        time.sleep(1.2 * QUICK.settle_s)
        return create(*asked)

    monkeypatch.setattr(cloud, "on_create", slowly)
    cloud.fault("create", "lag")
    client.terminate(client.create(first_offer(client), public_key=PUBLIC_KEY))
    assert cloud.bill() == {}


def test_a_machine_that_came_with_an_error(clouds: Clouds) -> None:
    """Goal: Vast's `new_contract` beside an error is a machine that bills, and is ended. Red with the error alone
    read."""
    client = client_of("vast")
    clouds["vast"].fault("create", "error with a machine")
    with pytest.raises(CloudError) as caught:
        client.create(first_offer(client), public_key=PUBLIC_KEY, name="rollouts-odd")
    assert caught.value.kind == "no capacity" and steps("rollouts-odd") == [
        "intent",
        "created",
        "ending",
        "ended",
    ]
    assert len(clouds["vast"].machines) == 1


def test_a_key_that_cannot_be_let_in(clouds: Clouds) -> None:
    """Goal: a machine nobody can log in to is not kept. Red without the machine's id in the error."""
    clouds["vast"].fault("keys", "capacity")
    with pytest.raises(CloudError):
        client_of("vast").create(first_offer(client_of("vast")), public_key=PUBLIC_KEY)
    assert len(clouds["vast"].machines) == 1 and clouds["vast"].bill() == {}


@pytest.mark.parametrize("form", ["direct", "proxy", "jupyter"])
def test_both_addresses_of_vast(form: str, clouds: Clouds) -> None:
    """Goal: a mapped port, a proxy, and a proxy beside jupyter lead to the machine. Red without the stripped address,
    and without the port after jupyter's."""
    clouds["vast"].address_form = form  # type: ignore[attr-defined]
    client = client_of("vast")
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    found = [client.get(machine) for _ in range(4)][-1]
    assert found is not None and [(a.host, a.port, a.user) for a in found.addresses] == [
        ("127.0.0.1", 9, "root")
    ]
    client.terminate(machine)


def test_a_list_for_an_address(clouds: Clouds) -> None:
    """Goal: Prime's sshConnection as a list, or [null], is read. Red with a string alone expected."""
    clouds["prime"].connection_form = "list"  # type: ignore[attr-defined]
    client = client_of("prime")
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    found = [client.get(machine) for _ in range(5)]
    assert [len(one.addresses) for one in found if one] == [0, 0, 1, 1, 1]
    client.terminate(machine)


@pytest.mark.parametrize(
    ("name", "fate"), [*((name, "broken") for name in PROVIDERS), ("vast", "preempted")]
)
def test_machines_that_will_never_run(name: ProviderName, fate: str, clouds: Clouds) -> None:
    """Goal: a machine that failed for good, or was outbid, is told from one that starts, and bills until it is ended.
    Red with "OCI runtime create failed" passed over."""
    clouds[name].fault("create", fate)
    client = client_of(name)
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    found = [client.get(machine) for _ in range(6)][-1]
    assert found is not None and found.state == fate and found.bills
    client.terminate(machine)


@every_provider
def test_a_revoked_key(name: ProviderName, clouds: Clouds) -> None:
    """Goal: a key that stops working in the middle is named by where it lies, at once, with the machine that bills.
    Red with 401 tried again until the deadline; and with the key in the error."""
    cloud, client = clouds[name], client_of(name)
    machine = client.create(first_offer(client), public_key=PUBLIC_KEY)
    cloud.key_works = False
    started = time.monotonic()
    with pytest.raises(CloudError) as caught:
        client.terminate(machine)
    assert time.monotonic() - started < QUICK.end_s
    text = caught.value.text() + json.dumps(caught.value.to_json()) + repr(caught.value)
    assert (
        machine.name in text
        and "_API_KEY" in text
        and "an hour" in text
        and "deploy machines end" in text
    )
    assert (
        KEY not in text and KEY not in Ledger().path.read_text() and KEY not in repr(vars(client))
    )
    with pytest.raises(CloudError) as listed:
        client.list()
    assert "[key]" in listed.value.text() and KEY not in listed.value.text(), (
        "the stand-in repeats it"
    )
    cloud.key_works = True
    client.terminate(machine)


FILES: dict[ProviderName, tuple[str, str]] = {
    "runpod": (".runpod/config.toml", '[default]\napi_key = "{}"\n'),
    "vast": (".config/vastai/vast_api_key", "{}\n"),
    "lambda": (".lambda_cloud/lambda_keys", "api_key = {}\n"),
    "prime": (".prime/config.json", '{{"api_key": "{}", "team_id": "t1"}}'),
}


@every_provider
def test_keys_from_the_providers_own_files(
    name: ProviderName, clouds: Clouds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a key is found where the provider's own tool keeps it; a damaged file is named, without a word of it.
    Red with the parser's message in the error, which quotes the line."""
    monkeypatch.delenv(f"{name.upper()}_API_KEY")
    assert read_key(name) is None
    path, text = FILES[name]
    file = tmp_path / "home" / path
    file.parent.mkdir(parents=True)
    file.write_text(text.format(KEY))
    key = read_key(name)
    assert (
        key is not None and key.secret == KEY and str(file) in key.source and KEY not in repr(key)
    )
    assert key.team == ("t1" if name == "prime" else None)
    file.write_text(f"{KEY} {{ two words\x00")
    if name == "lambda":
        assert read_key(name) is None
        return
    with pytest.raises(CloudError) as caught:
        read_key(name)
    assert KEY not in caught.value.text()


def test_a_key_is_not_sent_in_the_clear(clouds: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: no address but https, or this machine, gets a key. Red without the check."""
    monkeypatch.setenv("ROLLOUTS_VAST_URL", "http://vast.example")
    with pytest.raises(CloudError, match="ROLLOUTS_VAST_URL"):
        GPUClient("vast").search()


def test_one_provider_that_fails_leaves_the_others(
    clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: offers of the others come all the same, with why one's are missing. Red with the first error raised."""
    clouds["vast"].key_works = False
    monkeypatch.delenv("LAMBDA_API_KEY")
    asked = anyio.run(find_offers, MachineNeeds(gpu_types=("H100",)))
    fitting = [offer.provider for offer in asked.offers if not offer.left_out]
    assert fitting == ["prime", "runpod", "runpod"]
    assert list(asked.problems) == ["vast"] and asked.without_key == ["lambda"]


def test_reasons_for_leaving_an_offer_out(clouds: Clouds) -> None:
    """Goal: each offer that is not for this search says why. Red with such offers dropped."""
    wanted = MachineNeeds(
        gpu_types=("H100", "GH200"), price_per_hour_max=2.5, regions=("us", "Sweden", "any")
    )
    reasons = {(offer.provider, offer.left_out) for offer in anyio.run(find_offers, wanted).offers}
    assert {
        ("runpod", "over $2.5 an hour"),
        ("vast", "reliability under 0.9"),
        ("vast", "its driver is too old for CUDA 12.6"),
        ("vast", "rented by somebody else"),
        ("lambda", "an ARM machine"),
        ("lambda", "8 GPU(s)"),
        ("prime", "a spot machine"),
        ("prime", "none free"),
        ("prime", "another GPU"),
        ("vast", ""),
        ("lambda", ""),
        ("prime", ""),
    } <= reasons


def test_answers_that_are_something_else(clouds: Clouds) -> None:
    """Goal: whatever a provider answers is an error of ours or an empty list, never a crash. Red with `answer["data"]`
    taken for granted."""
    for odd in (
        [],
        {},
        None,
        {"gpus": 3, "data": [1], "offers": {"a": 1}, "items": None},
        "text",
        {"data": {"x": 1}},
    ):
        for name, cloud in clouds.items():
            answer = odd

            def do(*_: Any, answer: Any = answer) -> Any:
                return Answer(200, answer)

            cloud.do = do  # type: ignore[method-assign]
            assert name in MAKERS
        asked = anyio.run(find_offers, MachineNeeds())
        assert [offer for offer in asked.offers if not offer.left_out] == []


def test_a_list_that_fails_after_a_lost_answer(
    clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: where the list cannot be read either, the machine stays unclear, so that none is made in its place. Red
    with the list's own error raised, which reads as a refusal."""
    client, offer = client_of("runpod"), first_offer(client_of("runpod"))
    clouds["runpod"].fault("create", "lost")
    monkeypatch.setattr(
        clouds["runpod"], "on_list", lambda *_: Answer(404, {"detail": "no such path"})
    )
    with pytest.raises(CloudError, match="no clear answer") as caught:
        client.create(offer, public_key=PUBLIC_KEY)
    assert caught.value.kind == "unclear" and "its list cannot be read" in caught.value.text()
    for machine in clouds["runpod"].machines.values():
        clouds["runpod"].end(machine)
