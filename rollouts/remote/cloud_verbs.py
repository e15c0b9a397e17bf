"""The verbs about rented machines: `deploy offers`, `deploy machines`, `deploy guard`.

What they need of rollouts.cloud is imported when they run.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rollouts.cloud.quick_httpx import import_httpx
from rollouts.remote.errors import DeployError
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.view.answer import Answer

if TYPE_CHECKING:
    from rollouts.cloud.machine_types import MachineNeeds, ProviderName

NEAREST = 10  # offers that do not fit, listed one by one


@contextlib.contextmanager
def cloud_verb() -> Iterator[None]:
    """Run a verb that talks to providers. Raises DeployError where what it needs is not installed."""
    with as_deploy_errors():
        try:
            import_httpx()
        except ImportError:
            raise DeployError(
                "rented machines need the package httpx, which is not installed here.",
                fix="pip install 'rollouts[cloud]'",
            ) from None
        yield


def offers_for(config_path: str, settings: Sequence[str]) -> Answer:
    """List the offers for a config's provision section (`deploy offers CONFIG`), and the nearest that do not fit."""
    from rollouts.config.overrides import combinations
    from rollouts.remote.read_config import read_variants
    from rollouts.remote.rent_machine import needs_of

    with as_deploy_errors():
        if combinations(settings) > 1:
            raise DeployError("offers are for one config, and --set asks for several.")
        config = read_variants(config_path, settings)[0].config
        provision = config.provision
        if provision is None:
            raise DeployError(
                f"{config_path} rents no machine.",
                found="provision=None",
                fix="provision=ProvisionConfig(...); or `deploy offers --gpu NAME`",
            )
    return offers(
        needs_of(provision, config.job_hosts), tuple(provision.providers), nearest=NEAREST
    )


def offers(
    wanted: "MachineNeeds", providers: "Sequence[ProviderName]" = (), *, nearest: int = 0
) -> Answer:
    """List what providers with a key here would rent out (`deploy offers`). Exit code 2: nothing fits.

    `providers`: these alone, the first preferred. `nearest`: how many of those left out are listed, with their reasons.
    """
    with cloud_verb():
        import anyio

        from rollouts.cloud.accounts import find_offers, no_key
        from rollouts.cloud.machine_types import PROVIDERS
        from rollouts.cloud.offer_table import offer_json, offers_text

        asked = anyio.run(find_offers, wanted, tuple(providers or PROVIDERS))
        if not asked.offers and not asked.problems:
            raise no_key(asked.without_key)
        problems = {name: error.to_json()["problems"][0] for name, error in asked.problems.items()}
        document = {
            "offers": [offer_json(offer) for offer in asked.offers],
            "problems": problems,
            "without_key": asked.without_key,
        }
        notes = [f"error: {error.problems[0].text()}" for error in asked.problems.values()]
        notes += [f"note: no key of {name} here" for name in asked.without_key]
        fits = any(not offer.left_out for offer in asked.offers)
        return Answer(
            document,
            offers_text(asked.offers, nearest=nearest),
            exit_code=0 if fits else 2,
            remarks=tuple(notes),
        )


def machines() -> Answer:
    """List the machines that were rented, as their providers tell (`deploy machines`). Exit code 1: one did not."""
    with cloud_verb():
        import anyio

        from rollouts.cloud.ledger import Ledger
        from rollouts.cloud.our_machines import look, machines_json, machines_text

        found = anyio.run(look, Ledger())
        notes = [f"error: {error.problems[0].text()}" for error in found.problems.values()]
        return Answer(
            machines_json(found),
            machines_text(found),
            exit_code=1 if found.problems else 0,
            remarks=tuple(notes),
        )


def guard(say: Callable[[str], None], *, stay: bool) -> Answer:
    """Hold every rented machine to its limits (`deploy guard`). Returns when none is left; never, to `stay`."""
    with cloud_verb():
        from rollouts.cloud.lease_guard import LeaseGuard
        from rollouts.remote.guards import use_of

        LeaseGuard(say, use_of).run(stay=stay)
        return Answer({"guarded": 0}, "no machine is left to guard")


def end_machines(name: str | None, *, orphans: bool, yes: bool) -> Answer:
    """End one machine, or all of the ledger that bill (`deploy machines end`). Returns when they are gone."""
    if (name is None) != orphans:
        raise DeployError(
            "which machine?",
            needed="`deploy machines end MACHINE`, or `deploy machines end --orphans`",
        )
    with cloud_verb():
        import anyio

        from rollouts.cloud.ledger import Ledger
        from rollouts.cloud.our_machines import end_all, look
        from rollouts.cloud.renting import Patience

        ledger = Ledger()
        found = anyio.run(look, ledger)
        leases = [lease for lease in ledger.open_leases() if orphans or lease.name == name]
        if yes and name is not None:  # the user knows that this key's account is that machine's
            leases = [dataclasses.replace(lease, account="") for lease in leases]
        strangers = [machine for machine in found.unknown if machine.name == name]
        if strangers and not yes:
            raise DeployError(
                f"{name} was not rented from this machine: somebody else may be using it.",
                found=f"at {strangers[0].provider}, {strangers[0].status}",
                fix=f"deploy machines end {name} --yes",
            )
        leases += [ledger.adopt(machine, now=time.time()) for machine in strangers]
        if not leases and name is not None:
            known = ", ".join(row.name for row in found.rows) or "none"
            raise DeployError(f"no machine {name} bills.", found=f"those that do: {known}")
        nowhere = [lease.name for lease in leases if lease.machine_id is None]
        ended = anyio.run(
            end_all,
            [lease for lease in leases if lease.machine_id],
            ledger,
            Patience(),
            "deploy machines end",
        )
        notes = [f"note: no provider shows {name} yet; it is looked for again" for name in nowhere]
        notes += [f"error: {error.problems[0].text()}" for error in found.problems.values()]
        code = 1 if found.problems or nowhere else 0
        text = "\n".join(f"ended  {name}" for name in ended) or "nothing to end"
        return Answer(
            {"ended": ended, "not_seen": nowhere}, text, exit_code=code, remarks=tuple(notes)
        )
