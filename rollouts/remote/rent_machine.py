"""From the provision section of a config to a machine that answers SSH, with its guards armed."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from rollouts.remote.errors import DeployError
from rollouts.remote.guards import (
    ANSWER_TIMEOUT_S,
    WATCHDOGS,
    arm_watchdog,
    let_in,
    post_to,
    start_guard,
)
from rollouts.remote.host.open import open_transport
from rollouts.view.screen import Screen

if TYPE_CHECKING:
    from rollouts.cloud.ledger import Lease, Ledger, Limits
    from rollouts.cloud.machine_types import MachineNeeds, Offer, Order
    from rollouts.cloud.provider import Provider
    from rollouts.cloud.renting import Patience
    from rollouts.config import ProvisionConfig


def needs_of(provision: "ProvisionConfig", hosts: int) -> "MachineNeeds":
    """Return what each of so many machines has to be like, as offers are searched by it."""
    from rollouts.cloud.machine_types import MachineNeeds

    return MachineNeeds(
        gpu_types=tuple(provision.gpu_types),
        gpus=provision.gpus,
        vram_gb_min=provision.gpu_memory_gb_min or None,
        price_per_hour_max=provision.price_per_hour_max,
        regions=tuple(provision.regions),
        spot=provision.spot,
        disk_gib=provision.disk_gib,
        image=provision.image,
        hosts=hosts,
    )


def limits_of(provision: "ProvisionConfig", hosts: int = 1) -> "Limits":
    """Return what guards hold each of so many machines to."""
    from rollouts.cloud.ledger import Limits

    return Limits(
        hours_max=provision.hours_max,
        spend_max=provision.spend_max / hosts,
        idle_minutes_max=provision.idle_minutes_max,
    )


def find_machines(provision: "ProvisionConfig", screen: Screen, hosts: int = 1) -> "list[Offer]":
    """Return the offers that fit, in the order in which they are tried. Raises DeployError where there are none."""
    import anyio

    from rollouts.cloud.accounts import find_offers, no_key

    asked = anyio.run(find_offers, needs_of(provision, hosts), tuple(provision.providers))
    for error in asked.problems.values():
        screen.remark(f"error: {error.problems[0].text()}")
    fitting = [offer for offer in asked.offers if not offer.left_out]
    if not asked.offers and not asked.problems:
        raise no_key(asked.without_key)
    if not fitting:
        nearest = [
            f"{o.provider} {o.gpu_type} ${o.price_per_hour:.2f}: {o.left_out}"
            for o in asked.offers[:5]
        ]
        raise DeployError(
            "no provider offers a machine that fits provision.",
            found="\n".join(nearest) or "nothing at all",
            fix="`deploy offers CONFIG` shows what there is, and why it is left out;"
            " raise price_per_hour_max, or name other GPUs",
        )
    return fitting


class Guarding:
    """Arms the guards that a config asks for. Where one cannot be armed, that is an error, or a warning if allowed."""

    def __init__(self, provision: "ProvisionConfig", screen: Screen) -> None:
        self._provision, self._screen = provision, screen
        self._guard_key = ""  # of the guard on the other host

    def before_create(self, lease: "Lease") -> None:
        """Arm those that need no machine: this computer's, and another host's. Raises CloudError."""
        with self._allowed():
            start_guard()
        if self._provision.guard_host is not None:
            with self._allowed():
                self._guard_key = post_to(self._provision.guard_host, lease)

    def on_machine(self, lease: "Lease") -> None:
        """Arm the one on the machine, where it has a key for it; let another host's ask there. Raises CloudError."""
        if lease.provider in WATCHDOGS:
            with self._allowed():
                arm_watchdog(lease)
        host, limits = self._provision.guard_host, lease.limits
        if host is not None and limits is not None and limits.idle_minutes_max is not None:
            with self._allowed():
                let_in(host, lease, self._guard_key)

    @contextlib.contextmanager
    def _allowed(self) -> Iterator[None]:
        from rollouts.cloud.cloud_errors import CloudError

        try:
            yield
        except CloudError as error:
            if not self._provision.allow_unguarded:
                raise
            self._screen.warn(
                f"{error.problems[0].message} allow_unguarded: it is rented all the same"
            )


def rent_machines(
    offer: "Offer", provision: "ProvisionConfig", run_id: str, screen: Screen, count: int
) -> "list[Lease]":
    """Rent so many machines of an offer, with their guards armed and an SSH login: all or none.

    Raises CloudError; then those that were made are ended.
    """
    import anyio

    from rollouts.cloud.accounts import keys_here, open_providers
    from rollouts.cloud.ledger import Ledger, Terms
    from rollouts.cloud.reaching import reach
    from rollouts.cloud.renting import Patience, rent

    ledger, patience, guarding = Ledger(), Patience(), Guarding(provision, screen)
    orders = [_order(offer, provision, count) for _ in range(count)]
    terms = Terms(
        run_id=run_id,
        limits=limits_of(provision, count),
        keep=provision.when_done == "keep",
        arm=guarding.before_create,
    )

    async def make() -> None:
        made: list[str] = []
        async with open_providers(keys_here([offer.provider])[0]) as providers:
            provider = providers[offer.provider]
            try:
                for order in orders:
                    price = f"${offer.price_per_hour:.2f} an hour"
                    screen.say("rent", f"{order.name} at {offer.provider}, {price}")
                    await rent(provider, order, ledger, patience, terms)
                    made.append(order.name)
                for name in made:
                    await reach(
                        provider,
                        ledger.lease(name),
                        partial(log_in, name),
                        timeout_s=provision.ready_timeout_s,
                        price_max=provision.price_per_hour_max,
                        say=lambda text: screen.say("wait", text),
                    )
                    await anyio.to_thread.run_sync(guarding.on_machine, ledger.lease(name))
            except BaseException as error:
                with anyio.CancelScope(shield=True):
                    why = str(error)[:300]
                    await _end_all(provider, made, ledger, patience, why)
                raise

    anyio.run(make)
    return [ledger.lease(order.name) for order in orders]


async def _end_all(
    provider: "Provider", names: list[str], ledger: "Ledger", patience: "Patience", why: str
) -> None:
    """End them all, each whatever becomes of the others. Raises CloudError with those that did not end."""
    from rollouts.cloud.renting import end

    errors = []
    for name in names:
        try:
            await end(provider, ledger.lease(name), ledger, patience, reason=why)
        except DeployError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _order(offer: "Offer", provision: "ProvisionConfig", count: int) -> "Order":
    from rollouts.cloud.machine_types import Order
    from rollouts.cloud.reaching import own_public_key
    from rollouts.cloud.renting import new_machine_name

    return Order(
        name=new_machine_name(),
        offer=offer,
        public_key=own_public_key(),
        disk_gib=provision.disk_gib,
        image=provision.image,
        ends_at=time.time() + 3600 * limits_of(provision, count).hours(offer.price_per_hour),
    )


def log_in(name: str) -> str:
    """Log in to a machine by its name, and pin its host key at the first time. Returns what is wrong, or ""."""
    try:
        with contextlib.closing(open_transport(name, accept_new_host_key=True)) as transport:
            transport.run(["true"], timeout_s=ANSWER_TIMEOUT_S)
    except DeployError as error:
        return error.problems[0].message
    return ""
