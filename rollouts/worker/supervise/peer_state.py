"""What a supervisor knows of another host's, and why a stage ended there. Standard library only."""

import time
from dataclasses import dataclass, field
from typing import Any

from rollouts.worker.processes import SUPERVISOR_WINDOW
from rollouts.worker.supervise.failures import HostLost, PeerFailed, RunFailed
from rollouts.worker.supervise.peer_lines import PeerLine


@dataclass
class PeerState:
    """What is known of another host."""

    name: str
    heard_at: float  # monotonic; before its first word: when the waiting for it began
    joined: bool = False
    reached: int = 0
    go: int = 0
    attempt: int = 0
    failed: dict[str, Any] | None = None  # why its stage ended in this attempt
    end: dict[str, Any] | None = None
    told_end: bool = False  # this host's end went out to it
    channel: PeerLine | None = field(default=None, repr=False)

    def hear(self, row: dict[str, Any]) -> None:
        self.heard_at, self.joined = time.monotonic(), True
        self.reached = max(self.reached, int(row.get("reached", 0)))
        self.go = max(self.go, int(row.get("go", 0)))
        self.attempt, self.failed = int(row.get("attempt", 0)), row.get("failed")
        if isinstance(row.get("end"), dict):
            self.end = row["end"]

    def is_silent(self, after_s: float) -> bool:
        """Return whether it was not heard of for so long, and did not say that it ends."""
        return self.end is None and time.monotonic() - self.heard_at > after_s

    def is_gone(self, after_s: float) -> bool:
        """Return whether nothing more is to be expected from it."""
        return self.end is not None or self.is_silent(after_s)

    def failure(self, attempt: int) -> RunFailed | None:
        """Return why this host's stage ended in this attempt; None while it has not."""
        if self.failed is None or self.attempt != attempt:
            return None
        code = self.failed.get("code")
        return PeerFailed(
            f"{self.name}: {self.failed.get('message')}",
            window=SUPERVISOR_WINDOW,
            exit_code=code if isinstance(code, int) and 0 < code < 256 else 1,
            may_pass=bool(self.failed.get("may_pass")),
        )


def silence(why: str) -> PeerFailed:
    return HostLost(why, window=SUPERVISOR_WINDOW, may_pass=True)


def passing(error: RunFailed) -> RunFailed:
    return RunFailed(str(error), window=error.window, exit_code=error.exit_code, may_pass=True)


def final(error: RunFailed, *, also: RunFailed | None = None) -> RunFailed:
    kind = PeerFailed if isinstance(error, PeerFailed) else RunFailed
    said = str(error) if also is None or str(also) == str(error) else f"{error}. {also}"
    return kind(said, window=error.window, exit_code=error.exit_code, log_tail=error.log_tail)
