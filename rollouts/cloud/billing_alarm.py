"""One line about machines that cost money, from this machine's own ledger: nobody is asked."""

import time
from collections.abc import Callable

from rollouts.cloud.ledger import Ledger


def billing_alarm(is_live: Callable[[str], bool]) -> str:
    """Return a line about the machines that may bill now without a live run, or "". `is_live` is asked of run ids."""
    leases = [
        lease
        for lease in Ledger().open_leases()
        if lease.run_id is None or not is_live(lease.run_id)
    ]
    if not leases:
        return ""
    now = time.time()
    shown = ", ".join(
        f"{lease.name} ({lease.provider}, ${lease.price_per_hour:.2f}/h)" for lease in leases[:3]
    )
    more = f" and {len(leases) - 3} more" if len(leases) > 3 else ""
    spent = sum(lease.spent(now) for lease in leases)
    return f"rented and not ended: {shown}{more}; ${spent:.2f} so far. `deploy machines` asks the providers"
