"""The hosts of one job: one manifest, the same on each of them but for `rank`. Standard library only."""

from dataclasses import dataclass, field
from typing import Any

SILENT = "was not heard of"  # of a host that is gone, in the message of those that ended for it


@dataclass(frozen=True, kw_only=True)
class GroupHost:
    """One host of several."""

    target: str  # as the user named it
    name: str  # the machine's own name
    address: str  # its private address, where the other hosts reach it
    interface: str  # the network interface that has this address
    trains: bool = True  # ranks of the trainer run on it; else engines alone
    engine_port: int | None = None  # of its first engine; None: it has none that other hosts reach
    receiver_port: int | None = None  # of what takes weights for its engines; None: none is needed


@dataclass(frozen=True, kw_only=True)
class HostGroup:
    """Who is in a job of several hosts, and where host 0, which leads, is met."""

    rank: int  # of the host that has this plan
    hosts: list[GroupHost]  # in order; the first leads
    supervisor_port: int  # on host 0's private address: supervisors meet there
    trainer_port: int  # on host 0's private address: torchrun's store
    # with how many of them the job may go on where others die; []: a death ends it
    fewer: list[int] = field(default_factory=list)

    def going_on(self, alive: list[int]) -> list[int]:
        """Return which hosts go on with the job where these live, the first one among them; [] where it cannot."""
        return alive[: max((count for count in self.fewer if count <= len(alive)), default=0)]

    @property
    def leader(self) -> GroupHost:
        return self.hosts[0]

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "HostGroup":
        return cls(**{**data, "hosts": [GroupHost(**host) for host in data["hosts"]]})
