"""The hosts of one job: one manifest, the same on each of them but for `rank`. Standard library only."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GroupHost:
    """One host of several."""

    target: str  # as the user named it
    name: str  # the machine's own name
    address: str  # its private address, where the other hosts reach it
    interface: str  # the network interface that has this address


@dataclass(frozen=True, kw_only=True)
class HostGroup:
    """Who is in a job of several hosts, and where host 0, which leads, is met."""

    rank: int  # of the host that has this plan
    hosts: list[GroupHost]  # in order; the first leads
    supervisor_port: int  # on host 0's private address: supervisors meet there
    trainer_port: int  # on host 0's private address: torchrun's store

    @property
    def leader(self) -> GroupHost:
        return self.hosts[0]

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "HostGroup":
        return cls(**{**data, "hosts": [GroupHost(**host) for host in data["hosts"]]})
