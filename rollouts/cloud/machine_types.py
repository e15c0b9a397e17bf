"""What is offered, ordered and rented, in the words of no provider. Values alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

ProviderName = Literal["runpod", "vast", "lambda", "prime", "sky"]
# Those that are asked when none is named. SkyPilot, which asks its clouds in turn, is asked when it is named.
PROVIDERS: tuple[ProviderName, ...] = ("runpod", "vast", "lambda", "prime")
# Whose single machines of one region reach each other at private addresses. The others have clusters as an offer of its
# own, which is not rented here.
PRIVATE_NETWORKS: tuple[ProviderName, ...] = ("lambda",)
# starting: on its way. ready: the provider says that it runs. broken: it will never run, and may bill all the same.
# preempted: a spot machine was taken away. ended: it bills no more.
MachineState = Literal["starting", "ready", "broken", "preempted", "ended"]


@dataclass(frozen=True, kw_only=True)
class MachineNeeds:
    """What a machine has to be like. None and empty mean that all will do."""

    gpu_types: tuple[str, ...] = ()  # parts of names, in any case: "h100"
    gpus: int = 1
    vram_gb_min: float | None = None  # of one GPU
    price_per_hour_max: float | None = None  # of the whole machine, with its disk
    regions: tuple[str, ...] = ()  # parts of names, in any case
    spot: bool = False  # spot machines too
    disk_gib: int = 50
    image: str | None = None  # None: the provider's own
    hosts: int = 1  # machines, all of one offer, in one private network


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A machine that a provider would rent out. `price_per_hour` is in US dollars, for all of it with its disk."""

    provider: ProviderName
    offer_id: str
    gpu_type: str
    gpus: int
    vram_gb: float | None  # of one GPU; None: the provider does not say
    price_per_hour: float
    region: str
    spot: bool
    reliability: float | None  # 0 to 1; None: the provider does not say
    stock: str  # in the provider's words
    left_out: str = ""  # why it is not for this search; "" if it is
    # what its create call needs beside
    creation: Mapping[str, object] = field(default_factory=dict, repr=False)

    @property
    def price_per_gpu_hour(self) -> float:
        return self.price_per_hour / self.gpus

    def without(self, reason: str) -> "Offer":
        """Return it as left out, unless it is already."""
        return self if self.left_out else replace(self, left_out=reason)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a create call is made from. `name` is unique, and the only way to find what a lost answer made."""

    name: str
    offer: Offer
    public_key: str  # "ssh-ed25519 AAAA…": who may log in
    disk_gib: int
    image: str | None
    ends_at: float | None = (
        None  # by this machine's clock; a provider that can, ends it then by itself
    )


@dataclass(frozen=True)
class Address:
    """Where a machine's SSH server may answer."""

    host: str
    port: int
    user: str
    private_key: str = field(default="", repr=False)  # of the provider's own; "": ours is let in


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A rented machine, as its provider tells of it."""

    provider: ProviderName
    machine_id: str
    name: str
    state: MachineState
    status: str  # in the provider's words
    message: str = ""
    price_per_hour: float | None = None  # None: the provider does not say
    addresses: tuple[Address, ...] = ()  # to be tried in this order
    gpu_type: str = ""
    region: str = ""

    @property
    def bills(self) -> bool:
        """Return whether it costs money, as far as its provider tells."""
        return self.state != "ended"
