"""The end of a rented machine, once all of its run is here and verified."""

from rollouts.cloud.billing_alarm import billing_alarm
from rollouts.cloud.ledger import Ledger
from rollouts.remote.errors import DeployError
from rollouts.remote.run import registry
from rollouts.remote.run.last_seen import last_seen
from rollouts.run_dir import FINAL_STATES


def end_machine(name: str, *, reason: str) -> None:
    """End a machine of the ledger; returns when its provider says that it is gone. Raises DeployError."""
    from rollouts.remote.cloud_verbs import cloud_verb

    with cloud_verb():
        import anyio

        from rollouts.cloud.our_machines import end_all
        from rollouts.cloud.renting import Patience

        ledger = Ledger()
        anyio.run(end_all, [ledger.lease(name)], ledger, Patience(), reason)


def after_run(run_id: str, *, complete: bool) -> str:
    """End the machine that was rented for a run, and return a sentence on what became of it; "" if none was.

    It is kept where something of the run is not here yet, or its config says so: then until the guard's time.
    """
    found = [lease for lease in Ledger().open_leases() if lease.run_id == run_id]
    if not found:
        return ""
    lease = found[0]
    price = f"${lease.price_per_hour:.2f} an hour, until its guard ends it; `deploy machines end {lease.name}`"
    if not complete:
        return f"{lease.name} is kept, since not all of the run is here: {price}"
    if lease.keep:
        return f"{lease.name} is kept: {price}"
    try:
        end_machine(lease.name, reason="its run is done, and all of it is here")
    except DeployError as error:
        return error.text(launching=False)
    ended = Ledger().lease(lease.name)
    return f"{lease.name} is ended; it cost at most ${ended.spent(0.0):.2f}"


def alarm() -> str:
    """Return a line about machines that may bill without a live run, by what was last seen here; else ""."""

    def is_live(run_id: str) -> bool:
        entry = registry.find(run_id)
        return entry is not None and last_seen(entry)["state"] not in (*FINAL_STATES, "not launched", "died")

    return billing_alarm(is_live)
