"""The providers that this machine has keys for, asked all at once."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import anyio

from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.lambda_labs import LambdaLabs
from rollouts.cloud.ledger import Lease
from rollouts.cloud.machine_types import PROVIDERS, MachineNeeds, Offer, ProviderName
from rollouts.cloud.prime_intellect import PrimeIntellect
from rollouts.cloud.provider import Provider
from rollouts.cloud.provider_keys import ProviderKey, read_key, where_keys_are
from rollouts.cloud.runpod import RunPod
from rollouts.cloud.search_offers import judged, ordered
from rollouts.cloud.sky_pilot import SkyPilot
from rollouts.cloud.vast import Vast

MAKERS: Mapping[ProviderName, Callable[[ProviderKey], Provider]] = {
    "runpod": RunPod,
    "vast": Vast,
    "lambda": LambdaLabs,
    "prime": PrimeIntellect,
    "sky": SkyPilot,
}
Found = TypeVar("Found")


@dataclass
class OfferSearch:
    """What providers answered, and of the others why they did not."""

    offers: list[Offer] = field(default_factory=list)
    problems: dict[ProviderName, CloudError] = field(default_factory=dict)
    without_key: list[ProviderName] = field(default_factory=list)


def rented_from(leases: Iterable[Lease]) -> tuple[ProviderName, ...]:
    """Return the providers to ask about these machines: all, and SkyPilot where one is its."""
    names = {lease.provider for lease in leases}
    return (*PROVIDERS, *(name for name in MAKERS if name in names and name not in PROVIDERS))


def keys_here(
    names: Iterable[ProviderName] = PROVIDERS,
) -> tuple[dict[ProviderName, ProviderKey], OfferSearch]:
    """Return the keys that there are, and which providers have none or an unreadable one."""
    keys, asked = {}, OfferSearch()
    for name in names:
        try:
            key = read_key(name)
        except CloudError as error:
            asked.problems[name] = error
            continue
        if key is None:
            asked.without_key.append(name)
        else:
            keys[name] = key
    return keys, asked


@contextlib.asynccontextmanager
async def open_providers(
    keys: Mapping[ProviderName, ProviderKey],
) -> AsyncIterator[dict[ProviderName, Provider]]:
    """Yield a provider for each key; their connections are closed at the end."""
    made: dict[ProviderName, Provider] = {}
    try:
        for name, key in keys.items():
            made[name] = MAKERS[name](key)
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            for provider in made.values():
                await provider.close()


async def ask_all(
    providers: Mapping[ProviderName, Provider], ask: Callable[[Provider], Awaitable[Found]]
) -> tuple[dict[ProviderName, Found], dict[ProviderName, CloudError]]:
    """Ask every provider at once. Returns their answers, and the errors of the others."""
    answers: dict[ProviderName, Found] = {}
    errors: dict[ProviderName, CloudError] = {}

    async def one(name: ProviderName, provider: Provider) -> None:
        try:
            answers[name] = await ask(provider)
        except CloudError as error:
            errors[name] = error

    async with anyio.create_task_group() as group:
        for name, provider in providers.items():
            group.start_soon(one, name, provider)
    return answers, errors


async def find_offers(
    wanted: MachineNeeds, names: Iterable[ProviderName] = PROVIDERS
) -> OfferSearch:
    """Return the offers of every provider that there is a key for, judged and in the order in which to take them."""
    names = tuple(names)
    keys, asked = keys_here(names)
    async with open_providers(keys) as providers:
        answers, errors = await ask_all(providers, lambda provider: provider.offers(wanted))
    asked.problems |= errors
    found = (judged(offer, wanted) for offers in answers.values() for offer in offers)
    asked.offers = ordered(found, names)
    return asked


def no_key(names: Iterable[ProviderName]) -> CloudError:
    """Return the error that there is no key at all."""
    places = "\n".join(f"{name}: {where_keys_are(name)}" for name in names)
    return CloudError(
        "no provider has a key here.", kind="key", needed=places, fix="set one of them"
    )
