"""Ends machines whose time is up, from this computer's ledger. A process of its own, that outlives the deploy.

One guard at a time works; others wait for its lock, and then look for themselves.
"""

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable

import anyio

from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.ledger import Lease, Ledger
from rollouts.cloud.our_machines import end_all, look
from rollouts.cloud.renting import Patience
from rollouts.run_dir import home_dir

POLL_S = 10.0


def start_guard() -> None:
    """Start a guard in the background; it ends when no lease has an end any more."""
    directory = home_dir() / "cloud"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "guard.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-P", "-m", "rollouts.cloud.lease_guard"],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def guard(say: Callable[[str], None]) -> None:
    """Wait for the end of each lease that has one, and end its machine. Returns when there is none left."""
    lock = home_dir() / "cloud" / "guard.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ledger = Ledger()
        while leases := [lease for lease in ledger.open_leases() if lease.until is not None]:
            now = time.time()
            if due := [lease for lease in leases if (lease.until or 0.0) <= now]:
                _end(due, ledger, say)
            nearest = min((lease.until or 0.0) for lease in leases)
            time.sleep(min(POLL_S, max(1.0, nearest - now)))


def _end(due: list[Lease], ledger: Ledger, say: Callable[[str], None]) -> None:
    """End what is due; what cannot be ended now is tried again at the next look."""
    names = {lease.name for lease in due}
    try:
        anyio.run(look, ledger)
        leases = [lease for lease in ledger.open_leases() if lease.name in names and lease.machine_id is not None]
        for name in anyio.run(end_all, leases, ledger, Patience(), "its time was up"):
            say(f"{name}: its time was up, and it is ended")
    except CloudError as error:
        say(error.text(launching=False))


def main() -> None:
    guard(lambda text: print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True))


if __name__ == "__main__":
    main()
