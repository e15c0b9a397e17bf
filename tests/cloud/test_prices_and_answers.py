"""What providers' answers may hold: prices that are none, disks that cost, and keys that they repeat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from rollouts.cloud import CloudError, MachineNeeds
from rollouts.cloud.accounts import find_offers
from rollouts.cloud.machine_types import PROVIDERS, Offer, ProviderName
from rollouts.remote.rent_machine import log_in
from rollouts.run_dir import machine_dir
from tests.cloud.fakes import lambda_labs, prime, runpod, vast
from tests.cloud.fakes.server import KEY, Answer, FakeCloud
from tests.cloud.test_gpu_client import PUBLIC_KEY, client_of, first_offer
from tests.cloud.test_guards import booted
from tests.remote.hosts import keygen

Clouds = dict[str, FakeCloud]
OTHER_KEY = "hf_another-secret-of-this-user"


def offers_of(name: ProviderName, **needs: Any) -> list[Offer]:
    async def ask() -> list[Offer]:
        return (await find_offers(MachineNeeds(**needs), [name])).offers

    return anyio.run(ask)


def price_everything(cloud: Any, price: float) -> None:
    """Let the provider ask this price for all that it has."""
    cloud.gpus = [{**gpu, "price": {"secure": price, "community": price}} for gpu in runpod.GPUS]
    cloud.offers = [{**offer, "dph_base": price, "dph_total": price} for offer in vast.OFFERS]
    asked = {"onDemand": price, "communityPrice": price}
    cloud.items = [{**item, "prices": asked} for item in prime.ITEMS]
    kinds = lambda_labs.TYPES.items()
    cents = {"price_cents_per_hour": 100 * price}
    cloud.types = {n: {**k, "instance_type": {**k["instance_type"], **cents}} for n, k in kinds}


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("price", [0, -1])
def test_a_price_that_is_none(name: ProviderName, price: float, clouds: Clouds) -> None:
    """Goal: what is offered for nothing, or less, is not rented: no limit could be held. Red with a price of 0 taken
    for the cheapest one, by which its hours were divided."""
    fitting = {o.offer_id for o in offers_of(name, gpu_types=("H100",)) if not o.left_out}
    price_everything(clouds[name], price)
    after = offers_of(name, gpu_types=("H100",))
    assert fitting and fitting <= {o.offer_id for o in after if o.left_out == "no price"}
    assert all(offer.left_out for offer in after)


def test_the_price_of_a_runpod_offer_is_with_its_disk(clouds: Clouds) -> None:
    """Goal: a RunPod offer is compared by what it will cost with its disk. Red with the GPU's price alone."""
    by_size = {
        gib: min(o.price_per_hour for o in offers_of("runpod", gpu_types=("H100",), disk_gib=gib))
        for gib in (1, 721)
    }
    assert by_size[721] - by_size[1] == pytest.approx(0.10)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("status", [200, 400, 418])
def test_an_answer_that_repeats_keys(
    name: ProviderName, status: int, clouds: Clouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: whatever a provider repeats of this user's keys, and in which field, no error holds one. Red with the
    answer of a create call without an id quoted as it came."""
    monkeypatch.setenv("HF_TOKEN", OTHER_KEY)
    offer = first_offer(client_of(name))
    said = {"message": f"your keys {KEY} and {OTHER_KEY}", "data": {"token": OTHER_KEY}}
    monkeypatch.setattr(clouds[name], "on_create", lambda *_: Answer(status, said))
    with pytest.raises(CloudError) as caught:
        client_of(name).create(offer, public_key=PUBLIC_KEY, name="rollouts-told")
    text = caught.value.text()
    assert "[key]" in text and KEY not in text and OTHER_KEY not in text


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_key_that_is_revoked_in_the_middle(name: ProviderName, clouds: Clouds) -> None:
    """Goal: with a key that works no more, each error says whose it is; of a machine that bills also its name, its
    price and the command that ends it; a new key ends it."""
    client, cloud = client_of(name), clouds[name]
    offer = first_offer(client)
    machine = client.create(offer, public_key=PUBLIC_KEY)
    cloud.key_works = False
    asks: tuple[Callable[[], object], ...] = (
        client.search,
        lambda: client.create(offer, public_key=PUBLIC_KEY, name="rollouts-without-key"),
        lambda: client.get(machine),
        client.list,
        lambda: client.terminate(machine),
    )
    for ask in asks:
        with pytest.raises(CloudError) as caught:
            ask()
        assert f"{name}" in caught.value.text() and KEY not in caught.value.text()
    said = caught.value.text()
    assert f"deploy machines end {machine.name}" in said and "an hour" in said
    assert cloud.bill().keys() == {machine.name} and len(cloud.machines) == 1
    cloud.key_works = True
    client.terminate(machine)


def test_a_host_key_that_changes(clouds: Clouds, shared: Path, tmp_path: Path) -> None:
    """Goal: a machine that answers with another host key than at its first login is not logged in to."""
    with booted("runpod", clouds, shared, tmp_path) as (lease, _):
        assert log_in(lease.name) == ""
        known = (machine_dir(lease.name) / "known_hosts").read_text()
        other = keygen(tmp_path / "other")
        kind, key, *_ = Path(f"{other}.pub").read_text().split()
        pinned = known.split()
        (machine_dir(lease.name) / "known_hosts").write_text(f"{pinned[0]} {kind} {key}\n")
        assert log_in(lease.name) != "", "it is not logged in to"
        client_of("runpod").terminate(client_of("runpod").list()[0])
