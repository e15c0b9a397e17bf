"""`GPUClient`: search, create, get, list and terminate machines from Python; `AsyncGPUClient` is the same with await.

    client = GPUClient()  # every provider that this machine has a key for
    offers = client.search((client.vram_gb >= 80) & (client.price_per_hour <= 3) & client.gpu_type.contains("H100"))
    machine = client.create(offers[0], public_key=key)
    client.terminate(machine)  # returns once the provider says that it is gone

What it creates is in the ledger of `deploy machines`, and bills until it is ended.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from anyio.from_thread import start_blocking_portal

from rollouts.cloud import search_offers
from rollouts.cloud.accounts import ask_all, keys_here, no_key, open_providers
from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.ledger import Lease, Ledger
from rollouts.cloud.machine_types import (
    PROVIDERS,
    Machine,
    MachineNeeds,
    Offer,
    Order,
    ProviderName,
)
from rollouts.cloud.provider import Provider
from rollouts.cloud.renting import NAME_PREFIX, Patience, end, new_machine_name, rent
from rollouts.cloud.search_offers import Condition, judged, ordered

Found = TypeVar("Found")


class _Terms:
    """What a search may ask of an offer."""

    vram_gb = search_offers.vram_gb
    price_per_hour = search_offers.price_per_hour
    gpu_type = search_offers.gpu_type


class AsyncGPUClient(_Terms):
    """Machines of several providers. Raises CloudError; keys come from where the providers' own tools keep them."""

    def __init__(self, *providers: ProviderName, patience: Patience | None = None) -> None:
        names = providers or PROVIDERS
        self._keys, asked = keys_here(names)
        if unreadable := [*asked.problems.values()]:
            raise unreadable[0]
        if not self._keys or (providers and asked.without_key):
            raise no_key(asked.without_key)
        self._patience = patience or Patience()
        self._ledger = Ledger()

    async def search(
        self, where: Condition | None = None, wanted: MachineNeeds | None = None
    ) -> list[Offer]:
        """Return the offers that fit, the cheapest first. A provider that does not answer is an error."""
        wanted = wanted or MachineNeeds()
        async with open_providers(self._keys) as providers:
            answers, errors = await ask_all(providers, lambda provider: provider.offers(wanted))
        if errors:
            raise next(iter(errors.values()))
        offers = (judged(offer, wanted) for found in answers.values() for offer in found)
        return [
            offer
            for offer in ordered(offers)
            if not offer.left_out and (where is None or where.holds(offer))
        ]

    async def create(
        self,
        offer: Offer,
        *,
        public_key: str,
        name: str | None = None,
        disk_gib: int = 50,
        image: str | None = None,
    ) -> Machine:
        """Rent the machine of an offer: the provider is asked once. It bills until `terminate`."""
        name = name or new_machine_name()
        order = Order(name=name, offer=offer, public_key=public_key, disk_gib=disk_gib, image=image)
        if name in [lease.name for lease in self._ledger.leases()]:
            raise CloudError(
                f"the name {name} was used before: choose another, or leave it out.", kind="refused"
            )
        if not name.startswith(NAME_PREFIX) and name in [
            machine.name for machine in await self.list()
        ]:
            raise CloudError(
                f"a machine of the account is named {name}: choose another name.", kind="refused"
            )
        return await self._with(
            offer.provider, lambda provider: rent(provider, order, self._ledger, self._patience)
        )

    async def get(self, machine: Machine) -> Machine | None:
        """Return a machine as it is now; None where its provider no longer has it."""
        found = await self._with(
            machine.provider, lambda provider: provider.get(machine.machine_id)
        )
        return None if found is None else replace(found, name=found.name or machine.name)

    async def list(self) -> list[Machine]:
        """Return every machine of these accounts, ours or not."""
        async with open_providers(self._keys) as providers:
            answers, errors = await ask_all(providers, lambda provider: provider.machines())
        if errors:
            raise next(iter(errors.values()))
        return [machine for found in answers.values() for machine in found]

    async def terminate(self, machine: Machine) -> None:
        """End a machine; returns once its provider says that it is gone."""
        lease = self._lease(machine)
        await self._with(
            machine.provider,
            lambda provider: end(
                provider, lease, self._ledger, self._patience, reason="GPUClient.terminate"
            ),
        )

    def _lease(self, machine: Machine) -> Lease:
        for lease in self._ledger.leases():
            if (lease.provider, lease.machine_id) == (machine.provider, machine.machine_id):
                return lease
        return self._ledger.adopt(machine, now=time.time())

    async def _with(self, name: ProviderName, ask: Callable[[Provider], Awaitable[Found]]) -> Found:
        if name not in self._keys:
            raise no_key((name,))
        async with open_providers({name: self._keys[name]}) as providers:
            return await ask(providers[name])


class GPUClient(_Terms):
    """`AsyncGPUClient` without await; it works where an event loop runs too, as in a notebook."""

    def __init__(self, *providers: ProviderName, patience: Patience | None = None) -> None:
        self._client = AsyncGPUClient(*providers, patience=patience)

    def search(
        self, where: Condition | None = None, wanted: MachineNeeds | None = None
    ) -> list[Offer]:
        """Return the offers that fit, the cheapest first. A provider that does not answer is an error."""
        return _wait(lambda: self._client.search(where, wanted))

    def create(
        self,
        offer: Offer,
        *,
        public_key: str,
        name: str | None = None,
        disk_gib: int = 50,
        image: str | None = None,
    ) -> Machine:
        """Rent the machine of an offer: the provider is asked once. It bills until `terminate`."""
        return _wait(
            lambda: self._client.create(
                offer, public_key=public_key, name=name, disk_gib=disk_gib, image=image
            )
        )

    def get(self, machine: Machine) -> Machine | None:
        """Return a machine as it is now; None where its provider no longer has it."""
        return _wait(lambda: self._client.get(machine))

    def list(self) -> list[Machine]:
        """Return every machine of these accounts, ours or not."""
        return _wait(self._client.list)

    def terminate(self, machine: Machine) -> None:
        """End a machine; returns once its provider says that it is gone."""
        _wait(lambda: self._client.terminate(machine))


def _wait(ask: Callable[[], Awaitable[Found]]) -> Found:
    with start_blocking_portal() as portal:
        return portal.call(ask)
