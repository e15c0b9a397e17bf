"""From an offer to a machine and to its end, with every step in the ledger before it is taken.

A create call is made once. What a lost answer may have made is looked for by its name; what is known to exist is ended
until the provider says that it is gone.
"""

import contextlib
import secrets
import time
from dataclasses import dataclass, replace

import anyio

from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.ledger import Lease, Ledger, Terms
from rollouts.cloud.machine_types import Machine, Order
from rollouts.cloud.provider import Provider
from rollouts.remote.errors import Gone

NAME_PREFIX = "rollouts-"
OTHER_KEY = "set that one again; where its account is the same, `deploy machines end MACHINE --yes` takes its word"


@dataclass(frozen=True)
class Patience:
    """How long a provider is given, in seconds."""

    settle_s: float = (
        60.0  # a machine that a lost answer made shows in the provider's list within this time
    )
    end_s: float = 180.0  # until a machine that was told to end is gone
    poll_s: float = 3.0
    ask_again_s: float = 20.0  # a request to end that changed nothing is made again after this time


def new_machine_name() -> str:
    """Return a name that no other machine has: lists are searched for it."""
    return f"{NAME_PREFIX}{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


async def rent(
    provider: Provider, order: Order, ledger: Ledger, patience: Patience, terms: Terms | None = None
) -> Machine:
    """Create one machine. Raises CloudError; what was made in spite of it is ended, or stays in the ledger as unclear.

    Raises CloudError, kind "unclear", where it is not known: then nothing else may be created in its place. What cuts
    it off, such as Ctrl-C or a full disk, is raised once the machine is looked for and ended.
    """
    ledger.intend(order, now=time.time(), account=provider.account, terms=terms)
    if terms is not None:
        _arm(order, ledger, terms)
    try:
        machine = await _made(provider, order, ledger, patience)
        # the dearer of two prices: a provider may tell one without the disk
        price = max(order.offer.price_per_hour, machine.price_per_hour or 0.0)
        ledger.note(order.name, "created", machine_id=machine.machine_id, price_per_hour=price)
    except CloudError:
        raise
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await _end_by_name(
                provider, order, ledger, patience, reason=f"cut off: {type(error).__name__}"
            )
        raise
    return machine


def _arm(order: Order, ledger: Ledger, terms: Terms) -> None:
    """Start the guards of a machine that is about to be made. Raises CloudError: then none is made."""
    try:
        terms.arm(ledger.lease(order.name))
    except CloudError as error:
        ledger.note(order.name, "refused", reason=str(error))
        raise


async def _made(provider: Provider, order: Order, ledger: Ledger, patience: Patience) -> Machine:
    """Ask once for the machine. Raises CloudError as `rent` does."""
    try:
        return await provider.create(order)
    except CloudError as error:
        if error.machine_id is not None:
            ledger.note(order.name, "created", machine_id=error.machine_id)
            await end(provider, ledger.lease(order.name), ledger, patience, reason=str(error))
            raise
        if error.kind != "unclear":
            ledger.note(order.name, "refused", reason=str(error))
            raise
        ledger.note(order.name, "unclear", reason=str(error))
        return await _settled(provider, order, error, patience)


async def _end_by_name(
    provider: Provider, order: Order, ledger: Ledger, patience: Patience, *, reason: str
) -> None:
    """End what a create that was cut off has made. What cannot be found or ended stays open in the ledger."""
    unclear = CloudError(f"{order.name} may have been made.", kind="unclear")
    with contextlib.suppress(CloudError, OSError):
        machine = await _settled(provider, order, unclear, patience)
        lease = replace(ledger.lease(order.name), machine_id=machine.machine_id)
        await end(provider, lease, ledger, patience, reason=reason)


async def _settled(
    provider: Provider, order: Order, error: CloudError, patience: Patience
) -> Machine:
    """Return the machine that a lost answer made. Raises CloudError where none shows in time."""
    deadline = time.monotonic() + patience.settle_s
    while True:
        seen = f"no machine {order.name} in its list for {patience.settle_s:.0f} s"
        try:
            found = await _of_name(provider, order.name)
        except CloudError as problem:  # whatever its kind: of the machine nothing is known
            found, seen = [], f"its list cannot be read: {problem}"
        if found:
            return found[0]
        if time.monotonic() > deadline:
            raise CloudError(
                str(error),
                kind="unclear",
                found=f"{error.problems[0].found}\n{seen}",
                needed=f"certainty, since {order.name} would cost ${order.offer.price_per_hour:.2f} an hour",
                fix="`deploy machines` shows what the provider has; it looks for that name from now on",
            )
        await anyio.sleep(patience.poll_s)


async def _of_name(provider: Provider, name: str) -> list[Machine]:
    return [one for one in await provider.machines() if one.name == name and one.bills]


async def find_by_name(provider: Provider, name: str) -> str | None:
    """Return the id of the machine of this name; None where no list shows it. Raises CloudError."""
    found = await _of_name(provider, name)
    return found[0].machine_id if found else None


async def end(
    provider: Provider, lease: Lease, ledger: Ledger, patience: Patience, *, reason: str
) -> None:
    """End a machine, and return once the provider says that it is gone. Raises CloudError where it does not in time."""
    assert lease.machine_id is not None, "a machine has an id before it can end"
    # a full disk must not keep a machine billing: the lease is open as it is
    with contextlib.suppress(OSError):
        ledger.note(lease.name, "ending", machine_id=lease.machine_id, reason=reason)
    deadline, asked_at, known, last = time.monotonic() + patience.end_s, None, False, ""
    while True:
        try:
            now = time.monotonic()
            if asked_at is None or not known or now - asked_at >= patience.ask_again_s:
                known = await provider.terminate(lease.machine_id) or known
                asked_at = now
            if not known and not may_know(provider, lease):
                raise CloudError(
                    f"the key here is another than the one that rented it: {OTHER_KEY}", kind="key"
                )
            # a young machine may not show yet, however long the call took that made it
            settled = known or time.time() - (lease.made_at or lease.since) > patience.settle_s
            if settled and await _is_gone(provider, lease.machine_id):
                break
            last = "it is still there" if known else "the provider does not know it yet"
        except CloudError as error:
            if error.kind == "key":
                raise _not_ended(lease, str(error)) from None
            last = f"{error} {error.problems[0].found}"
        if time.monotonic() > deadline:
            raise _not_ended(lease, last)
        await anyio.sleep(patience.poll_s)
    try:
        ledger.note(lease.name, "ended", reason=reason)
    except OSError as error:
        message = f"{lease.name} is ended, but the ledger here cannot say so: {error}"
        raise CloudError(
            message, kind="unrecorded", fix="free some space; `deploy machines` closes it then"
        ) from None


async def _is_gone(provider: Provider, machine_id: str) -> bool:
    """Return whether both ways to ask the provider say so: one of them may lag behind."""
    machine = await provider.get(machine_id)
    if machine is not None and machine.bills:
        return False
    return not any(
        other.machine_id == machine_id and other.bills for other in await provider.machines()
    )


async def why_gone(provider: Provider, lease: Lease) -> Gone | None:
    """Return why a machine that ran will not run again, as its provider says; None where it may. Raises CloudError.

    Of one that is in no list any more it does not say who ended it: that is not `taken`.
    """
    assert lease.machine_id is not None, "a machine that ran has an id"
    if not may_know(provider, lease):
        return None
    machine = await provider.get(lease.machine_id)
    if machine is not None and "preempted" in (machine.state, machine.status.lower()):
        return Gone(f"{lease.provider} took it away ({machine.status})", taken=True)
    if machine is not None and machine.state == "broken":
        said = f"{machine.status} {machine.message}".strip()
        return Gone(f"{lease.provider} took it away ({said})", taken=True)
    if await _is_gone(provider, lease.machine_id):
        return Gone(f"{lease.provider} no longer has it", taken=False)
    return None


def _not_ended(lease: Lease, found: str) -> CloudError:
    machine, price = f"{lease.name} ({lease.machine_id})", f"${lease.price_per_hour:.2f} an hour"
    return CloudError(
        f"{lease.provider}: machine {machine} may still bill {price}: its end is not confirmed.",
        kind="unavailable",
        found=found,
        fix=f"deploy machines end {lease.name}; or end it on the provider's web page",
    )


def may_know(provider: Provider, lease: Lease) -> bool:
    """Return whether this account is the one that a lease is of. Of a machine of another it knows nothing."""
    return lease.account in ("", provider.account)


async def settle(
    provider: Provider, leases: list[Lease], ledger: Ledger, *, young_s: float
) -> list[Machine]:
    """Bring the ledger to what the provider says of these leases. Returns the provider's machines that bill.

    What is in no list is closed only when it is older than `young_s`: a list may lag behind a create; and never by the
    list of another account. A name alone, which others may give too, finds no machine but one without an id. What the
    ledger took for ended, and bills all the same, is open again.
    """
    billing = [machine for machine in await provider.machines() if machine.bills]
    by_name = {machine.name: machine for machine in billing}
    by_id = {machine.machine_id: machine for machine in billing}
    for lease in leases:
        named = (
            by_name.get(lease.name)
            if lease.may_bill or lease.name.startswith(NAME_PREFIX)
            else None
        )
        machine = by_id.get(lease.machine_id) if lease.machine_id else named
        if machine is not None:
            if not lease.may_bill or lease.machine_id != machine.machine_id:
                ledger.note(lease.name, "created", machine_id=machine.machine_id)
        elif lease.may_bill and may_know(provider, lease) and time.time() - lease.since > young_s:
            await _close(provider, lease, ledger)
    return billing


async def _close(provider: Provider, lease: Lease, ledger: Ledger) -> None:
    """Note the end of a lease whose machine is in no list, unless the provider still knows it by its id."""
    if lease.machine_id is None:
        ledger.note(lease.name, "refused", reason="the provider has no machine of this name")
        return
    found = await provider.get(lease.machine_id)
    if found is None or not found.bills:
        ledger.note(lease.name, "ended", reason="the provider no longer has it")
