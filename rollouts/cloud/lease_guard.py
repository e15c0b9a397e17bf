"""Ends machines whose time is up, from this computer's ledger. A process of its own, that outlives the deploy.

One guard at a time ends machines; each looks for itself, since it may have keys that the others lack. Nothing that goes
wrong ends a guard: it looks again.
"""

import contextlib
import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

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
    ledger = Ledger()
    while True:
        try:
            leases = [lease for lease in ledger.open_leases() if lease.until is not None]
        except OSError as error:  # it may be there again at the next look
            _try_to_say(say, f"the ledger cannot be read: {error}")
            time.sleep(POLL_S)
            continue
        if not leases:
            return
        now = time.time()
        if due := [lease for lease in leases if (lease.until or 0.0) <= now]:
            with _alone():
                _end(due, ledger, say)
        nearest = min((lease.until or 0.0) for lease in leases)
        time.sleep(min(POLL_S, max(1.0, nearest - now)))


def _end(due: list[Lease], ledger: Ledger, say: Callable[[str], None]) -> None:
    """End what is due; what cannot be ended now is tried again at the next look."""
    names = {lease.name for lease in due}
    with _told(say):
        anyio.run(look, ledger)
    with _told(say):
        leases = [lease for lease in ledger.open_leases() if lease.name in names and lease.machine_id is not None]
        for name in anyio.run(end_all, leases, ledger, Patience(), "its time was up"):
            _try_to_say(say, f"{name}: its time was up, and it is ended")


@contextlib.contextmanager
def _told(say: Callable[[str], None]) -> Iterator[None]:
    """Tell what goes wrong, and go on: a guard that ends by a full disk leaves its machines to bill."""
    try:
        yield
    except CloudError as error:
        _try_to_say(say, error.text(launching=False))
    except Exception as error:
        _try_to_say(say, f"not ended yet: {type(error).__name__}: {error}")


def _try_to_say(say: Callable[[str], None], text: str) -> None:
    with contextlib.suppress(OSError):
        say(text)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    lock = home_dir() / "cloud" / "guard.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    guard(lambda text: print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True))


if __name__ == "__main__":
    main()
