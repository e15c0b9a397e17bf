"""The verbs about rented machines: `deploy offers`, `deploy machines`, `deploy guard`.

What they need of rollouts.cloud is imported when they run.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rollouts.remote.errors import DeployError
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.view.answer import Answer

if TYPE_CHECKING:
    from rollouts.cloud.machine_types import MachineNeeds


@contextlib.contextmanager
def cloud_verb() -> Iterator[None]:
    """Run a verb that talks to providers. Raises DeployError where what it needs is not installed."""
    with as_deploy_errors():
        try:
            import httpx  # noqa: F401
        except ImportError:
            raise DeployError(
                "rented machines need the package httpx, which is not installed here.",
                fix="pip install 'rollouts[cloud]'",
            ) from None
        yield


def offers(wanted: "MachineNeeds") -> Answer:
    """List what every provider with a key here would rent out (`deploy offers`). Exit code 2: nothing fits."""
    with cloud_verb():
        import anyio

        from rollouts.cloud.accounts import find_offers, no_key
        from rollouts.cloud.offer_table import offer_json, offers_text

        asked = anyio.run(functools.partial(find_offers, wanted))
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
        return Answer(document, offers_text(asked.offers), exit_code=0 if fits else 2, remarks=tuple(notes))


def machines() -> Answer:
    """List the machines that were rented, as their providers tell (`deploy machines`). Exit code 1: one did not."""
    with cloud_verb():
        import anyio

        from rollouts.cloud.ledger import Ledger
        from rollouts.cloud.our_machines import look, machines_json, machines_text

        found = anyio.run(look, Ledger())
        notes = [f"error: {error.problems[0].text()}" for error in found.problems.values()]
        return Answer(
            machines_json(found), machines_text(found), exit_code=1 if found.problems else 0, remarks=tuple(notes)
        )


def guard(say: Callable[[str], None]) -> Answer:
    """Wait for the time of every rented machine, and end it then (`deploy guard`). Returns when none is left."""
    with cloud_verb():
        from rollouts.cloud import lease_guard

        lease_guard.guard(say)
        return Answer({"guarded": 0}, "no machine is left to guard")


def end_machines(name: str | None, *, orphans: bool, yes: bool) -> Answer:
    """End one machine, or all of the ledger that bill (`deploy machines end`). Returns when they are gone."""
    if (name is None) != orphans:
        raise DeployError("which machine?", needed="`deploy machines end MACHINE`, or `deploy machines end --orphans`")
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
            end_all, [lease for lease in leases if lease.machine_id], ledger, Patience(), "deploy machines end"
        )
        notes = [f"note: no provider shows {name} yet; it is looked for again" for name in nowhere]
        notes += [f"error: {error.problems[0].text()}" for error in found.problems.values()]
        code = 1 if found.problems or nowhere else 0
        text = "\n".join(f"ended  {name}" for name in ended) or "nothing to end"
        return Answer({"ended": ended, "not_seen": nowhere}, text, exit_code=code, remarks=tuple(notes))
