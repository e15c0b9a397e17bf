"""Every machine of ours: the ledger of this machine beside what the providers say, and which of them to end."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollouts.cloud.accounts import ask_all, keys_here, no_key, open_providers, rented_from
from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.ledger import Lease, Ledger
from rollouts.cloud.machine_types import Machine, ProviderName
from rollouts.cloud.provider import Provider
from rollouts.cloud.renting import NAME_PREFIX, OTHER_KEY, Patience, end, may_know, settle
from rollouts.view.tables import columns

YOUNG_S = 600.0  # so long after its intent, a machine that no list shows may still turn up
HEADER = ["machine", "provider", "gpu", "state", "age", "$/hour", "$ so far"]


@dataclass(frozen=True, kw_only=True)
class MachineRow:
    """A machine that costs money, or may."""

    name: str
    provider: ProviderName
    machine_id: str | None
    gpu_type: str
    state: str  # in the provider's word, else in ours
    price_per_hour: float | None
    age_s: float | None  # None: rented from elsewhere
    spent: float | None
    recorded: bool  # in the ledger here


@dataclass
class OurMachines:
    """What was found, and which providers could not be asked."""

    rows: list[MachineRow] = field(default_factory=list)
    # of a name like ours, and in no ledger here
    unknown: list[Machine] = field(default_factory=list)
    problems: dict[ProviderName, CloudError] = field(default_factory=dict)


async def look(ledger: Ledger, *, young_s: float = YOUNG_S) -> OurMachines:
    """Ask every provider with a key here, and bring the ledger to what they say."""
    leases = ledger.leases()
    keys, asked = keys_here(rented_from(leases))
    async with open_providers(keys) as providers:

        async def one(provider: Provider) -> list[Machine]:
            own = [lease for lease in leases if lease.provider == provider.name]
            return await settle(provider, own, ledger, young_s=young_s)

        listed, errors = await ask_all(providers, one)
    problems = {**asked.problems, **errors}
    seen = {
        (name, machine.machine_id): machine
        for name, machines in listed.items()
        for machine in machines
    }
    open_leases = ledger.open_leases()
    for lease in open_leases:
        if lease.provider not in listed and lease.provider not in problems:
            problems[lease.provider] = no_key((lease.provider,))
        elif lease.provider in listed and (lease.provider, lease.machine_id) not in seen:
            if may_know(providers[lease.provider], lease):
                continue
            message = (
                f"{lease.provider}: {lease.name} was rented with another key than the one here."
            )
            problems[lease.provider] = CloudError(message, kind="key", fix=OTHER_KEY)
    known = {(lease.provider, lease.machine_id) for lease in ledger.leases()}
    unknown = [
        m for place, m in seen.items() if m.name.startswith(NAME_PREFIX) and place not in known
    ]
    rows = [
        _row(lease, seen.get((lease.provider, lease.machine_id or ""))) for lease in open_leases
    ]
    return OurMachines([*rows, *map(_unknown_row, unknown)], unknown, problems)


def _row(lease: Lease, machine: Machine | None) -> MachineRow:
    now = time.time()
    state = machine.status if machine else f"not seen ({lease.step})"
    price = (
        machine.price_per_hour
        if machine and machine.price_per_hour is not None
        else lease.price_per_hour
    )
    return MachineRow(
        name=lease.name,
        provider=lease.provider,
        machine_id=lease.machine_id,
        gpu_type=lease.gpu_type,
        state=state,
        price_per_hour=price,
        age_s=now - lease.since,
        spent=lease.spent(now),
        recorded=True,
    )


def _unknown_row(machine: Machine) -> MachineRow:
    return MachineRow(
        name=machine.name,
        provider=machine.provider,
        machine_id=machine.machine_id,
        gpu_type=machine.gpu_type,
        state=machine.status,
        price_per_hour=machine.price_per_hour,
        age_s=None,
        spent=None,
        recorded=False,
    )


async def end_all(
    leases: Sequence[Lease], ledger: Ledger, patience: Patience, reason: str
) -> list[str]:
    """End these machines, one after another. Returns their names; raises CloudError with all that did not end."""
    ended, errors = [], []
    keys, _ = keys_here(rented_from(leases))
    async with open_providers(keys) as providers:
        for lease in leases:
            try:
                if lease.provider not in providers:
                    raise no_key((lease.provider,))
                await end(providers[lease.provider], lease, ledger, patience, reason=reason)
                ended.append(lease.name)
            except CloudError as error:
                errors.append(error)
    if errors:
        first, *more = (problem for error in errors for problem in error.problems)
        raise CloudError(
            first.message,
            kind=errors[0].kind,
            found=first.found,
            needed=first.needed,
            fix=first.fix,
            more=more,
        )
    return ended


def machines_text(found: OurMachines) -> str:
    """Return the table of machines."""
    if not found.rows:
        return "no machine of ours bills"
    cells = [
        [
            row.name,
            row.provider,
            row.gpu_type or "-",
            row.state if row.recorded else f"{row.state}, not in the ledger here",
            "-" if row.age_s is None else f"{row.age_s / 3600:.1f} h",
            "-" if row.price_per_hour is None else f"{row.price_per_hour:.2f}",
            "-" if row.spent is None else f"{row.spent:.2f}",
        ]
        for row in found.rows
    ]
    return "\n".join([columns([HEADER, *cells]), "end one  deploy machines end MACHINE"])


def machines_json(found: OurMachines) -> dict[str, Any]:
    """Return the machines as a JSON object."""
    problems = {name: error.to_json()["problems"][0] for name, error in found.problems.items()}
    return {"machines": [dataclasses.asdict(row) for row in found.rows], "problems": problems}
