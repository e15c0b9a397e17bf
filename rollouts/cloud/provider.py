"""What every provider can do. One module a cloud implements it; nothing else knows a cloud's words."""

from typing import Protocol

from rollouts.cloud.machine_types import Machine, MachineNeeds, Offer, Order, ProviderName


class Provider(Protocol):
    """One cloud and one account. Every method raises CloudError."""

    name: ProviderName
    account: str  # ProviderKey.account

    async def offers(self, wanted: MachineNeeds) -> list[Offer]:
        """Return what could be rented, those that are left out with their reason."""
        ...

    async def create(self, order: Order) -> Machine:
        """Ask once for a machine. CloudError.kind says whether one may have been made."""
        ...

    async def get(self, machine_id: str) -> Machine | None:
        """Return a machine; None where the provider knows none of this id."""
        ...

    async def machines(self) -> list[Machine]:
        """Return every machine of the account: all pages."""
        ...

    async def terminate(self, machine_id: str) -> bool:
        """Ask the provider to end a machine; return False where it knows none of this id.

        That it ended is known from `get` and `machines` alone.
        """
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...
