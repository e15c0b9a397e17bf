"""Whether the machine of a run is a rented one that is gone for good, and who ended it: its provider, or we did."""

import contextlib
import math
import time
from typing import TYPE_CHECKING

from rollouts.cloud.ledger import AT_LIMIT_S, Ledger
from rollouts.remote.errors import DeployError, Gone, TransportError, UnreachableError
from rollouts.remote.machine_end import ALL_HERE
from rollouts.remote.run import registry
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir.results import copies_in

if TYPE_CHECKING:
    from rollouts.cloud.ledger import Lease

PROVIDER_S = 10.0  # for its answer, behind the wait for SSH
ENDED_ELSEWHERE = "ended on its page, or from another computer?"
STREAMED = (
    "status.json",
    "events.jsonl",
    "metrics.jsonl",
)  # written here as words come from the run


def lease_of(target: str) -> "Lease | None":
    """Return the lease of the machine that is reached by this name; None for every other host."""
    return next((lease for lease in Ledger().leases() if lease.name == target), None)


def why_gone(target: str, *, timeout_s: float = math.inf) -> Gone | None:
    """Return why a rented machine will not answer again; None for one that may, and for a host that is not rented.

    The ledger is asked, then the provider, for `timeout_s` at most. What neither tells is not taken for gone. `taken`
    is a machine that nobody here ended, nor another one of its run, and that no guard may have ended by its limits; its
    provider says so, or it was a spot machine: another that is in no list any more was ended by somebody, as on the
    provider's page.
    """
    leases = Ledger().leases()
    lease = next((lease for lease in leases if lease.name == target), None)
    if lease is None or (gone := _as_told(lease, timeout_s)) is None:
        return None
    ours = [one for one in leases if one.ended_by == "us" and one.run_id == lease.run_id]
    if lease.ended_by == "us":
        return Gone(lease.reason or gone.why, taken=False)
    if ours and lease.run_id is not None:
        return Gone(f"{ours[0].name}: {ours[0].reason}", taken=False)
    if lease.ended_by == "provider":
        return Gone(gone.why, taken=True)
    return _by_its_limits(lease, gone)


def instead_of(error: DeployError) -> DeployError:
    """Return the error to show: of a host that does not answer since its rented machine has ended, that it has.

    The ledger is asked, and the provider where the machine bills as far as the ledger tells. Every other error is
    returned as it is.
    """
    if not isinstance(error, TransportError | UnreachableError):
        return error
    with contextlib.suppress(DeployError, OSError):
        entry, lease = registry.find(error.run_id), lease_of(error.target)
        if entry is None or lease is None:
            return error
        if not lease.may_bill:
            at = time.localtime(lease.ended_at or lease.since)
            when = time.strftime(" on %Y-%m-%d at %H:%M", at)
            return _ended(entry, lease, when, lease.reason, error)
        if (gone := why_gone(lease.name, timeout_s=PROVIDER_S)) is not None:
            return _ended(entry, lease, f", as {lease.provider} says", gone.why, error)
    return error


def _ended(entry: RunEntry, lease: "Lease", when: str, why: str, error: DeployError) -> DeployError:
    fixes = [f"deploy report {entry.run_id} shows what is here"]
    here = copies_in(entry.mirror)
    if lease.reason == ALL_HERE:
        pulled = f"all of the run is here: {entry.local_dir}"
    elif not here:
        pulled, fixes = "nothing of the run was pulled", []
    else:
        pulled = f"in {entry.local_dir}, as far as it was pulled: {', '.join(here)}"
        if any(name.startswith("checkpoints/") for name in here):
            fixes.append(f"deploy resume {entry.run_id} goes on from its last checkpoint here")
    fixes.append(f"deploy forget {entry.run_id} drops the entry")
    if lease.may_bill:  # one that was taken may bill until it is terminated
        fixes.append(f"deploy machines end {lease.name} sees to it that it does not bill")
    return DeployError(
        f"{lease.name} is gone: the machine that was rented for {entry.run_id} ended{when}.",
        found=f"why it ended: {why}\n{pulled}",
        fix="; ".join(fixes),
        started=error.started,
    )


def _by_its_limits(lease: "Lease", gone: Gone) -> Gone:
    """Return who ended a machine of which the ledger has no word."""
    limit = lease.limit_reached((lease.ended_at or time.time()) + AT_LIMIT_S)
    if limit or (not gone.taken and (limit := _idle(lease))):
        return Gone(f"{gone.why}: {limit}", taken=False)
    if not gone.taken and not lease.spot:
        return Gone(f"{gone.why}, and does not say that it took it: {ENDED_ELSEWHERE}", taken=False)
    return Gone(gone.why, taken=True)


def _as_told(lease: "Lease", timeout_s: float) -> Gone | None:
    """Return what the ledger says of an end, else the provider."""
    if not lease.may_bill:
        return Gone(lease.reason or "it was ended", taken=lease.ended_by == "provider")
    if lease.machine_id is None:
        return None
    try:
        return _asked(lease, timeout_s)
    except (DeployError, OSError):
        return None


def _idle(lease: "Lease") -> str:
    """Return that a machine's own guard may have ended it as idle; "" where its run was heard of since."""
    idle_s = 60 * ((lease.limits.idle_minutes_max if lease.limits else None) or 0.0)
    entry = registry.find(lease.run_id) if idle_s and lease.run_id else None
    if entry is None:
        return ""
    files = [entry.mirror.path / name for name in STREAMED]
    heard = max((file.stat().st_mtime for file in files if file.exists()), default=lease.since)
    silent_s = (lease.ended_at or time.time()) - heard
    if silent_s < idle_s - AT_LIMIT_S:
        return ""
    return f"its run was silent for {silent_s / 60:.0f} minutes, and a guard ends what is idle"


def _asked(lease: "Lease", timeout_s: float) -> Gone | None:
    from rollouts.remote.cloud_verbs import cloud_verb

    with cloud_verb():
        import anyio

        from rollouts.cloud.accounts import keys_here, open_providers
        from rollouts.cloud.renting import why_gone as provider_says

        async def ask() -> Gone | None:
            async with open_providers(keys_here([lease.provider])[0]) as providers:
                provider = providers.get(lease.provider)
                with anyio.move_on_after(timeout_s):
                    return None if provider is None else await provider_says(provider, lease)
            return None

        return anyio.run(ask)
