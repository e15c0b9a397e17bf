"""How a run ends other than by success."""

from collections.abc import Sequence


class StopRequested(Exception):
    """A signal asked the run to end, or its directory was removed."""


class RunFailed(Exception):
    """The run cannot go on. Carries the fields of the `error` event."""

    def __init__(
        self,
        message: str,
        *,
        window: str,
        exit_code: int = 1,
        log_tail: Sequence[str] | None = None,
        may_pass: bool = False,
    ) -> None:
        super().__init__(message)
        self.window, self.exit_code, self.log_tail = window, exit_code, log_tail
        self.may_pass = may_pass  # the same need not come again: another try may go better


class PeerFailed(RunFailed):
    """Another host of the run failed, or is gone."""


class HostLost(PeerFailed):
    """Another host is gone, and out of the job, which goes on where this `may_pass`."""
