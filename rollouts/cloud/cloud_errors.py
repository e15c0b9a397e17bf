"""What goes wrong at a provider, told apart by what is known of the machine afterwards."""

from collections.abc import Sequence
from typing import Literal

from rollouts.remote.errors import DeployError, Problem

# refused: nothing was made. unclear: something may have been. no capacity: nothing was made, another offer may be.
# unguarded: nothing was made, since no guard would end it. unrecorded: it is ended, and the ledger cannot say so.
Kind = Literal[
    "refused",
    "unclear",
    "no capacity",
    "key",
    "gone",
    "unavailable",
    "unreadable",
    "unguarded",
    "unrecorded",
]


class CloudError(DeployError):
    """A provider did not do what was asked. `machine_id`: a machine that was made all the same, and has to end."""

    def __init__(
        self,
        message: str,
        *,
        kind: Kind,
        found: str = "",
        needed: str = "",
        fix: str = "",
        machine_id: str | None = None,
        more: Sequence[Problem] = (),
    ) -> None:
        super().__init__(message, found=found, needed=needed, fix=fix, more=more)
        self.kind = kind
        self.machine_id = machine_id
