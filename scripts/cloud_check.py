"""Rent the cheapest machine of a provider, log in, and end it: what no test of this project can try.

    scripts/cloud_check PROVIDER [--max-price 0.5] [--gpu NAME] [--minutes 20]

It costs money: at most the price times the minutes, which a guard holds. Every step is printed with its time. Whatever
happens, the machine is ended at the end; if that cannot be confirmed, the last lines say what to do.
"""

import argparse
import contextlib
import sys
import time

import anyio

from rollouts.cloud.accounts import find_offers, keys_here, no_key, open_providers
from rollouts.cloud.ledger import Lease, Ledger, Limits, Terms
from rollouts.cloud.machine_types import PROVIDERS, MachineNeeds, Order
from rollouts.cloud.reaching import own_public_key, reach
from rollouts.cloud.renting import Patience, end, new_machine_name, rent
from rollouts.remote.errors import DeployError
from rollouts.remote.guards import WATCHDOGS, arm_watchdog, start_guard
from rollouts.remote.host.facts import gather_facts
from rollouts.remote.host.open import open_transport
from rollouts.remote.rent_machine import log_in

STARTED = time.monotonic()


def say(text: str) -> None:
    """Print a step with its time."""
    print(f"{time.monotonic() - STARTED:7.1f} s  {text}", flush=True)


def arm(lease: Lease) -> None:
    """Start the guard of this computer for the machine that is about to be made."""
    start_guard()
    say(f"a guard on this computer ends {lease.name} at its time")


async def check(provider_name: str, needs: MachineNeeds, minutes: float) -> None:
    """Go through the whole life of one machine. Raises DeployError."""
    name = next(known for known in PROVIDERS if known == provider_name)
    keys, asked = keys_here([name])
    if asked.without_key or asked.problems:
        raise next(iter(asked.problems.values()), no_key([name]))
    found = await find_offers(needs, [name])
    fitting = [offer for offer in found.offers if not offer.left_out]
    say(f"{len(found.offers)} offers, {len(fitting)} of them fit")
    if not fitting:
        raise DeployError(f"{name} offers nothing that fits.", fix="a higher --max-price")
    offer, ledger, patience = fitting[0], Ledger(), Patience()
    order = Order(
        name=new_machine_name(),
        offer=offer,
        public_key=own_public_key(),
        disk_gib=needs.disk_gib,
        ends_at=time.time() + 60 * minutes,
        image=None,
    )
    say(f"{offer.gpu_type}, {offer.region}, ${offer.price_per_hour:.2f} an hour, as {order.name}")
    async with open_providers(keys) as providers:
        provider = providers[name]
        limits = Limits(
            hours_max=minutes / 60, spend_max=(needs.price_per_hour_max or 1.0) * minutes / 60
        )
        terms = Terms(run_id="cloud_check", limits=limits, keep=False, arm=arm)
        machine = await rent(provider, order, ledger, patience, terms)
        lease = ledger.lease(order.name)
        try:
            say(f"made: {machine.machine_id}, {machine.status or 'no status yet'}")
            reached = await reach(
                provider,
                lease,
                lambda: log_in(order.name),
                timeout_s=minutes * 60,
                price_max=needs.price_per_hour_max or 0.0,
                say=say,
            )
            told = reached.price_per_hour
            price = "no price" if told is None else f"${told:.2f} an hour"
            say(f"logged in; its status tells {price}")
            if name in WATCHDOGS:
                await anyio.to_thread.run_sync(arm_watchdog, lease)
                say("the watchdog on the machine is armed")
            say(await anyio.to_thread.run_sync(what_it_has, order.name))
        finally:
            with anyio.CancelScope(shield=True):
                await end(
                    provider, ledger.lease(order.name), ledger, patience, reason="cloud_check"
                )
    say(
        f"gone; it cost at most ${ledger.lease(order.name).spent(time.time()):.3f}: compare with the provider's bill"
    )


def what_it_has(name: str) -> str:
    """Return the machine's Python, GPUs and room, as a run would find them."""
    with contextlib.closing(open_transport(name)) as transport:
        facts = gather_facts(transport, check_way=True)
    gpus = ", ".join(str(gpu.name) for gpu in facts.gpus) or "no GPU"
    return f"{gpus}; Python {facts.python or 'missing'}; tools {', '.join(sorted(facts.tools))}"


def main() -> int:
    """Read the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--max-price", type=float, default=0.5, help="US dollars an hour")
    parser.add_argument("--gpu", default="", help="a part of its name")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which a guard ends it")
    options = parser.parse_args()
    gpu_types = (options.gpu,) if options.gpu else ()
    needs = MachineNeeds(gpu_types=gpu_types, price_per_hour_max=options.max_price, disk_gib=20)
    try:
        anyio.run(check, options.provider, needs, options.minutes)
    except DeployError as error:
        print(error.text(launching=False), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
