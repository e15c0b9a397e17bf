"""Ends machines whose time or money is up, or that nobody uses: what a guard does, by the ledger of its computer.

One guard at a time ends machines; each looks for itself, since it may have keys that the others lack. Nothing that goes
wrong ends a guard: it looks again. A machine that it has seen once it holds to its limits, also while the ledger is
away, as on a disk that is not mounted.
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import anyio

from rollouts.cloud.accounts import keys_here, open_providers, rented_from
from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.guard_post import STAYS
from rollouts.cloud.ledger import Lease, Ledger
from rollouts.cloud.machine_types import ProviderName
from rollouts.cloud.our_machines import look
from rollouts.cloud.provider import Provider
from rollouts.cloud.provider_keys import ProviderKey
from rollouts.cloud.renting import Patience, end, find_by_name
from rollouts.run_dir import home_dir

POLL_S = 10.0
ASK_USE_S = 60.0  # between two looks at what a machine does
UseOf = Callable[[Lease], str | None]  # what it does; "" for nothing, None where it cannot be asked


class LeaseGuard:
    """What one guard knows: the machines that it has seen, and since when each is idle."""

    def __init__(self, say: Callable[[str], None], use_of: UseOf) -> None:
        self._say, self._use_of = say, use_of
        self._began = time.time() - _passed_s()
        self._ledger = Ledger()
        self.was_read = False
        self._seen: dict[str, Lease] = {}
        self._keys: dict[ProviderName, ProviderKey] = {}
        self._idle_since: dict[str, float] = {}
        self._asked_at: dict[str, float] = {}

    def run(self, *, stay: bool) -> None:
        """Hold every machine to its limits. Returns when none is left; never, to `stay`. Raises CloudError.

        A guard that stays takes machines that another computer hands to it: guard_post.py.
        """
        if stay:
            with self._staying():
                self._hold(stay=True)
        self._hold(stay=False)

    def _hold(self, *, stay: bool) -> None:
        while (leases := self.look()) or stay or not self.was_read:
            now = self.now()
            if due := {lease.name: why for lease in leases if (why := self._why(lease, now))}:
                with _alone():
                    self._end(due)
            for lease in leases:
                if lease.name not in due:
                    self._ask_use(lease)
            nearest = min((lease.until or now for lease in leases), default=now + POLL_S)
            asks = (pause_s(lease) for lease in leases if idle_s(lease))
            time.sleep(min(POLL_S, max(1.0, nearest - self.now()), *asks))

    def now(self) -> float:
        """Return the time of day, or, where that was set back, how much has passed: no machine lives longer by it."""
        return max(time.time(), self._began + _passed_s())

    def look(self) -> list[Lease]:
        """Return the machines that have an end and may bill; one whose lines are away, as it was last seen."""
        self.was_read = False
        with self._told():
            found = {lease.name: lease for lease in self._ledger.leases()}
            self.was_read = True
            self._seen = {name: found.get(name, lease) for name, lease in self._seen.items()}
            held = [lease for lease in found.values() if lease.may_bill]
            self._seen |= {lease.name: lease for lease in held if lease.limits is not None}
            self._keys |= keys_here(rented_from(self._seen.values()))[0]
        self._seen = {name: lease for name, lease in self._seen.items() if lease.may_bill}
        return list(self._seen.values())

    def _why(self, lease: Lease, now: float) -> str:
        """Return why a machine is to be ended now; "" where it may go on."""
        if why := lease.limit_reached(now):
            return why
        longest_s, since = idle_s(lease), self._idle_since.get(lease.name)
        if longest_s and since is not None and time.monotonic() - since >= longest_s:
            return f"it was idle for {longest_s / 60:g} minutes"
        return ""

    def _ask_use(self, lease: Lease) -> None:
        """Ask a machine with an idle limit what it does. What cannot be asked is not taken for idle."""
        now = time.monotonic()
        asked_at = self._asked_at.get(lease.name, 0.0)
        if not idle_s(lease) or now - asked_at < pause_s(lease):
            return
        self._asked_at[lease.name] = now
        doing = None
        with self._told():
            doing = self._use_of(lease)
        if doing == "":
            self._idle_since.setdefault(lease.name, now)
        else:
            self._idle_since.pop(lease.name, None)

    def _end(self, due: Mapping[str, str]) -> None:
        """End these machines, all at once; what cannot be ended now is tried again at the next look."""
        with self._told():
            anyio.run(look, self._ledger)  # also closes what was never made
        leases = [lease for lease in self.look() if lease.name in due]
        with self._told():
            anyio.run(self._end_all, leases, due)

    async def _end_all(self, leases: list[Lease], due: Mapping[str, str]) -> None:
        async with open_providers(self._keys) as providers, anyio.create_task_group() as group:
            for lease in leases:
                if lease.provider in providers:
                    group.start_soon(
                        self._end_one, providers[lease.provider], lease, due[lease.name]
                    )

    async def _end_one(self, provider: Provider, lease: Lease, why: str) -> None:
        with self._told():
            machine_id = lease.machine_id or await find_by_name(provider, lease.name)
            if machine_id is None:
                return  # it may show later; what was never made is closed by `look`
            known = replace(lease, machine_id=machine_id)
            try:
                await end(provider, known, self._ledger, Patience(), reason=why)
            except CloudError as error:
                if error.kind != "unrecorded":
                    raise
                self._try_to_say(error.text(launching=False))
            self._seen[lease.name] = replace(known, step="ended")
            self._try_to_say(f"{lease.name}: {why}, and it is ended")

    @contextlib.contextmanager
    def _staying(self) -> Iterator[None]:
        """Hold the file by which others know that a guard stays here, and of which accounts."""
        path = home_dir() / "cloud" / STAYS
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CloudError("another guard stays here already.", kind="refused") from None
            keys = keys_here()[0]
            file.truncate(0)
            file.write(json.dumps({name: key.account for name, key in keys.items()}))
            file.flush()
            self._try_to_say(
                f"guards the accounts of {', '.join(keys) or 'no provider: no key is here'}"
            )
            yield

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell what goes wrong, and go on: a guard that ends by a full disk leaves its machines to bill."""
        try:
            yield
        except CloudError as error:
            self._try_to_say(error.text(launching=False))
        except Exception as error:
            self._try_to_say(f"not done yet: {type(error).__name__}: {error}")

    def _try_to_say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._say(text)


def _passed_s() -> float:
    """Return the time that nobody sets, which goes on while the computer sleeps, where it has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def idle_s(lease: Lease) -> float:
    """Return how long a machine may be idle; 0: as long as it likes."""
    return 60 * ((lease.limits.idle_minutes_max if lease.limits else None) or 0.0)


def pause_s(lease: Lease) -> float:
    """Return the time between two looks at what a machine does."""
    return min(ASK_USE_S, idle_s(lease) / 4)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other guard of this computer ends machines; where its lock is away, go on without it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context((home_dir() / "cloud" / "guard.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
