"""The connection to a run's files, and how long a lost one is made again."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from rollouts.remote.errors import Gone, HostGoneError, TransportError, UnreachableError
from rollouts.remote.host.transport import Transport
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.wanted import EVERYTHING, ToBring
from rollouts.view.reporter import Say

T = TypeVar("T")
WhyGone = Callable[[str], Gone | None]  # of a target; None where it may answer again
TOLD_FAILURES = 10  # in a row, each of them; then every so many
TOLD_EVERY = 30


@dataclass(frozen=True)
class RetryPolicy:
    """How long a lost connection is tried again, with growing pauses.

    The clock is monotonic: setting the time of day changes nothing. Following has no bound (`while_it_lasts`): a laptop
    may sleep for days.
    """

    total_s: float = 900.0
    pause_max_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    # [0, 1): many watchers do not come back as one
    jitter: Callable[[], float] = field(default=random.random)

    # asked after each failure: why the host will not answer again
    why_gone: WhyGone = lambda target: None

    @classmethod
    def while_it_lasts(cls, why_gone: WhyGone) -> "RetryPolicy":
        """Return the policy for following a run: up to its end, its host's, or until its user says so."""
        return cls(total_s=math.inf, pause_max_s=60.0, why_gone=why_gone)

    def pause_s(self, failures: int) -> float:
        return float(min(self.pause_max_s, 0.5 * 2 ** min(failures, 20)) * (0.5 + self.jitter()))


@dataclass(frozen=True)
class RunConnection:
    """A run, and the way to its files."""

    entry: RunEntry
    python: str  # the host's
    transport: Transport
    wanted: ToBring = EVERYTHING


class Retries:
    """Count failures since the last success, and pause before the next try."""

    def __init__(self, connection: RunConnection, say: Say, policy: RetryPolicy) -> None:
        self._connection, self._say, self._policy = connection, say, policy
        self._failures, self._last_success = 0, policy.clock()

    def worked(self) -> None:
        if self._failures:
            self._say("reconnect", f"connected with {self._connection.entry.target} again")
        self._failures, self._last_success = 0, self._policy.clock()

    def wait_after(self, error: TransportError) -> None:
        """Pause before another try. Raises DeployError once failures have lasted for the policy's `total_s`."""
        if not error.lost:
            raise error
        entry = self._connection.entry
        if (gone := self._policy.why_gone(entry.target)) is not None:
            raise HostGoneError(entry.run_id, entry.target, gone) from None
        self._failures += 1
        silent_s = self._policy.clock() - self._last_success
        if silent_s > self._policy.total_s:
            raise UnreachableError(
                f"{entry.target} cannot be reached for {silent_s:.0f} s; the run goes on there.",
                found=str(error),
                fix=f"deploy attach {entry.run_id}",
                started=True,
            ) from None
        pause_s = self._policy.pause_s(self._failures)
        if self._failures <= TOLD_FAILURES or self._failures % TOLD_EVERY == 0:
            tried = f" ({self._failures} tries)" if self._failures > TOLD_FAILURES else ""
            self._say("reconnect", f"{str(error).rstrip('.')}{tried}. Next try in {pause_s:.1f} s")
        self._connection.transport.close()
        self._policy.sleep(pause_s)


def with_retries(
    action: Callable[[], T],
    connection: RunConnection,
    say: Say,
    policy: RetryPolicy,
    *,
    came: Callable[[], int] = lambda: 0,
) -> T:
    """Return what `action` returns, repeating it after each lost connection. Raises DeployError for the last one.

    `came`: how much of what it brings is here; a try that brought some counts as a success, however it ended.
    """
    retries = Retries(connection, say, policy)
    while True:
        before = came()
        try:
            return action()
        except TransportError as error:
            if came() > before:
                retries.worked()
            retries.wait_after(error)
