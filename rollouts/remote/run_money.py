"""What all rented machines of a run may cost together: those before leave less to the next."""

import dataclasses
import time
from typing import TYPE_CHECKING

from rollouts.cloud.ledger import Ledger
from rollouts.remote.errors import DeployError

if TYPE_CHECKING:
    from rollouts.config import ProvisionConfig


class RunMoney:
    """The `spend_max` of a run, over its machines from now on, whatever the names that it goes on under."""

    def __init__(self, provision: "ProvisionConfig", hosts: int) -> None:
        self._provision, self._hosts = provision, hosts
        # of an earlier command, perhaps with the same run ID: names, since clocks may be set
        self._earlier = {lease.name for lease in Ledger().leases()}
        self._names = set[str]()

    def spent(self) -> float:
        """Return what its machines cost at most, in dollars: one that may bill counts up to its guard's time."""
        now = time.time()
        leases = [lease for lease in Ledger().leases() if lease.run_id in self._names]
        ours = [lease for lease in leases if lease.name not in self._earlier]
        return sum(lease.spent(lease.until or now) for lease in ours)

    def for_next(self, run_id: str, price_per_hour: float) -> "ProvisionConfig":
        """Return the limits of the next machines, of this price each. Raises DeployError where the money is spent."""
        self._names.add(run_id)
        provision, spent = self._provision, self.spent()
        if spent == 0:
            return provision
        left = provision.spend_max - spent
        login = self._hosts * price_per_hour * provision.ready_timeout_s / 3600
        if left <= login:
            raise DeployError(
                f"spend_max of the run is spent: its machines cost at most ${spent:.2f}.",
                found=f"${left:.2f} left of ${provision.spend_max:.2f}",
                needed=f"${login:.2f}: the next one may take ready_timeout_s until one can log in",
                fix="deploy resume RUN goes on from its last checkpoint here, with a spend_max of its own",
                started=True,
            )
        return dataclasses.replace(provision, spend_max=left)
