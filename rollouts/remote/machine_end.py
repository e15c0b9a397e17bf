"""The end of a rented machine, once all of its run is here and verified."""

import contextlib
import time
from collections.abc import Callable, Sequence

from rollouts.cloud.billing_alarm import billing_alarm
from rollouts.cloud.ledger import Lease, Ledger
from rollouts.remote.errors import DeployError, HostGoneError
from rollouts.remote.run import registry
from rollouts.remote.run.last_seen import last_seen
from rollouts.run_dir import FINAL_STATES

ALL_HERE = "its run is done, and all of it is here"  # why a machine is ended that nobody lost


def end_machine(name: str, *, reason: str) -> None:
    """End a machine of the ledger; returns when its provider says that it is gone. Raises DeployError."""
    end_machines([name], reason=reason)


def end_machines(names: Sequence[str], *, reason: str) -> None:
    """End machines of the ledger; returns when their providers say that they are gone. Raises DeployError."""
    from rollouts.remote.cloud_verbs import cloud_verb

    with cloud_verb():
        import anyio

        from rollouts.cloud.our_machines import end_all
        from rollouts.cloud.renting import Patience

        ledger = Ledger()
        leases = [ledger.lease(name) for name in names]
        anyio.run(end_all, leases, ledger, Patience(), reason)


def after_run(run_id: str, *, complete: bool) -> str:
    """End the machines that were rented for a run, and say what became of each; "" if none was.

    One is kept where something of the run is not here yet, or its config says so: then until the guard's time.
    """
    found = [lease for lease in Ledger().open_leases() if lease.run_id == run_id]
    return "\n".join(_after_run(lease, complete=complete) for lease in found)


def _after_run(lease: Lease, *, complete: bool) -> str:
    price = f"${lease.price_per_hour:.2f} an hour, until its guard ends it; `deploy machines end {lease.name}`"
    if not complete:
        return f"{lease.name} is kept, since not all of the run is here: {price}"
    if lease.keep:
        return f"{lease.name} is kept: {price}"
    try:
        end_machine(lease.name, reason=ALL_HERE)
    except DeployError as error:
        return error.text(launching=False)
    ended = Ledger().lease(lease.name)
    return f"{lease.name} is ended; it cost at most ${ended.spent(0.0):.2f}"


def is_rented(run_id: str) -> bool:
    """Return whether a machine may bill that was rented for a run."""
    return any(lease.run_id == run_id for lease in Ledger().open_leases())


def bills_on(run_id: str) -> tuple[str, ...]:
    """Return a note for each machine that was rented for a run and may bill, with what ends it."""
    return tuple(
        f"note: {lease.name} bills ${lease.price_per_hour:.2f} an hour: `deploy attach {run_id}` brings all of"
        f" the run here and ends it; `deploy machines end {lease.name}` ends it at once"
        for lease in Ledger().open_leases()
        if lease.run_id == run_id
    )


def cost_so_far(run_id: str) -> Callable[[], str]:
    """Return what tells, at any moment, what all machines that were rented for a run have cost at most; "" for none."""
    if not any(lease.run_id == run_id for lease in Ledger().open_leases()):
        return str

    def told() -> str:
        leases = [lease for lease in Ledger().leases() if lease.run_id == run_id]
        spent = sum(lease.spent(time.time()) for lease in leases)
        rate = sum(lease.price_per_hour for lease in leases if lease.may_bill)
        return f"cost ${spent:.2f} so far, ${rate:.2f} an hour"

    return told


def after_interruption(error: HostGoneError) -> str:
    """Note that a run's machine is gone, and end it where it bills all the same. Returns what became of it."""
    entry = registry.find(error.run_id)
    if entry is not None:
        registry.note_interrupted(entry, error.gone.why)
    told, ledger = [], Ledger()
    for lease in ledger.open_leases():
        if lease.run_id == error.run_id and lease.machine_id is not None:
            # others who follow the run are to know it; a full disk must not keep a machine billing
            with contextlib.suppress(OSError):
                if error.gone.taken:
                    ledger.note(lease.name, "taken", reason=error.gone.why[:300])
            try:
                end_machine(lease.name, reason=error.gone.why[:300])
                told.append(f"{lease.name} is ended")
            except DeployError as problem:
                told.append(problem.text(launching=False))
    return "\n".join(told)


def is_live(run_id: str) -> bool:
    """Return whether a run goes on, by what was last seen here of it."""
    entry = registry.find(run_id)
    ends = (*FINAL_STATES, "not launched", "died", "interrupted")
    return entry is not None and last_seen(entry)["state"] not in ends


def alarm(starting: str = "") -> str:
    """Return a line about machines that may bill without a live run, by what was last seen here; else "".

    `starting`: a run that is about to start on its machine.
    """
    return billing_alarm(lambda run_id: run_id == starting or is_live(run_id))
