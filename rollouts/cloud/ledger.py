"""What was rented from here: lines on disk, written before the provider is asked, folded into one lease a machine.

`~/.rollouts/cloud/ledger.jsonl` is only ever appended to, and every line is on the disk before the next step is taken.
No line holds a key.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from rollouts.cloud.machine_types import Machine, Order, ProviderName
from rollouts.run_dir import append_jsonl, home_dir, read_jsonl

# intent: about to be created. unclear: the answer was lost. created. refused: nothing was made.
# taken: by its provider. ending: by somebody here. ended.
LeaseStep = Literal["intent", "unclear", "created", "refused", "taken", "ending", "ended"]
STEPS = get_args(LeaseStep)
OPEN_STEPS = ("intent", "unclear", "created", "taken", "ending")  # it may bill
AT_LIMIT_S = 60.0  # guards on other clocks may be so much earlier than this one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a guard holds a machine to, from its intent on."""

    hours_max: float
    spend_max: float  # US dollars
    idle_minutes_max: float | None = (
        None  # without a live run and with idle GPUs; None: as long as it likes
    )

    def hours(self, price_per_hour: float) -> float:
        """Return how many hours a machine of this price may live. One that costs nothing spends nothing."""
        by_money = self.spend_max / price_per_hour if price_per_hour > 0 else float("inf")
        return min(self.hours_max, by_money)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """One name that was, or was about to be, rented."""

    name: str
    provider: ProviderName
    step: LeaseStep
    since: float  # of the intent, by this machine's clock
    gpu_type: str
    gpus: int
    region: str
    price_per_hour: float
    machine_id: str | None = None
    made_at: float | None = None  # when its id was known here
    ended_at: float | None = None
    reason: str = ""  # why it ended, or was refused
    run_id: str | None = None  # the run that it was rented for
    limits: Limits | None = None  # when a guard ends it; None: nobody does
    keep: bool = False  # up to then, when its run is done too
    spot: bool = False  # it may be taken away, and then be in no list
    account: str = ""  # ProviderKey.account of whoever rented it; "" is not known
    ended_by: Literal["", "provider", "us"] = (
        ""  # what came first: it was taken, or told to end from here
    )

    @property
    def may_bill(self) -> bool:
        """Return whether a machine of this name may cost money."""
        return self.step in OPEN_STEPS

    @property
    def until(self) -> float | None:
        """Return when its time or its money is up, at the price that is known by now; None: no guard ends it."""
        hours = None if self.limits is None else self.limits.hours(self.price_per_hour)
        return None if hours is None else self.since + 3600 * hours

    def limit_reached(self, now: float) -> str:
        """Return which of its limits is reached, as its guards count; "" where it has time and money left."""
        if self.limits is None or self.until is None or now < self.until:
            return ""
        by_time = now - self.since >= 3600 * self.limits.hours_max
        return "its time was up" if by_time else f"it had cost ${self.limits.spend_max:.2f}"

    def spent(self, now: float) -> float:
        """Return what it cost at most up to `now`, in dollars, from its intent on."""
        if self.step == "refused":
            return 0.0
        return self.price_per_hour * max(0.0, (self.ended_at or now) - self.since) / 3600


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a machine is rented for, its limits, whether it outlives its run, and what starts its guards."""

    run_id: str
    limits: Limits
    keep: bool
    arm: Callable[[Lease], None]  # called between the intent and the create call


class Ledger:
    """The file. Several processes may append to it at once."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or home_dir() / "cloud" / "ledger.jsonl"

    def intend(
        self, order: Order, *, now: float, account: str = "", terms: Terms | None = None
    ) -> None:
        """Write down that a machine of this name is about to be created, for which run and for how long."""
        offer = order.offer
        fields: dict[str, Any] = {
            "gpu_type": offer.gpu_type,
            "gpus": offer.gpus,
            "region": offer.region,
            "spot": offer.spot,
        }
        fields |= {"price_per_hour": offer.price_per_hour, "account": account}
        if terms is not None:
            limits = terms.limits
            fields |= {"run_id": terms.run_id, "keep": terms.keep, "hours_max": limits.hours_max}
            fields |= {"spend_max": limits.spend_max, "idle_minutes_max": limits.idle_minutes_max}
        self._append(order.name, "intent", now, provider=offer.provider, **fields)

    def note(self, name: str, step: LeaseStep, **fields: Any) -> None:
        """Write down a step of a lease. Raises OSError, also where the file with its intent is away."""
        if not self.path.exists():  # its disk is not mounted: a new file would hide the lease
            raise FileNotFoundError(errno.ENOENT, "the ledger is gone", str(self.path))
        self._append(name, step, time.time(), **fields)

    def adopt(self, machine: Machine, *, now: float) -> Lease:
        """Write down a machine that was rented from elsewhere, under a name of ours."""
        price = machine.price_per_hour or 0.0
        fields = {
            "gpu_type": machine.gpu_type,
            "gpus": 1,
            "region": machine.region,
            "price_per_hour": price,
        }
        name = machine.name or f"{machine.provider}-{machine.machine_id}"
        self._append(name, "intent", now, provider=machine.provider, **fields)
        self.note(name, "created", machine_id=machine.machine_id)
        return self.lease(name)

    def lease(self, name: str) -> Lease:
        """Return the lease of a name that is in the ledger."""
        return fold(read_jsonl(self.path))[name]

    def intent(self, name: str) -> dict[str, Any]:
        """Return the line of a name's intent."""
        lines = (line for line in read_jsonl(self.path) if line.get("step") == "intent")
        return next(line for line in lines if line.get("name") == name)

    def leases(self) -> list[Lease]:
        """Return all leases, the oldest first."""
        return list(fold(read_jsonl(self.path)).values())

    def open_leases(self) -> list[Lease]:
        """Return those that may cost money."""
        return [lease for lease in self.leases() if lease.may_bill]

    def _append(self, name: str, step: LeaseStep, now: float, **fields: Any) -> None:
        first = not self.path.exists()
        append_jsonl(self.path, {"time": now, "name": name, "step": step, **fields})
        _to_disk(self.path)
        if first:
            self.path.chmod(0o600)
            _to_disk(self.path.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fold(lines: Iterable[dict[str, Any]]) -> dict[str, Lease]:
    """Return the leases that these lines make. A line that makes no sense changes nothing."""
    leases: dict[str, Lease] = {}
    for line in lines:
        name, step = line.get("name"), line.get("step")
        if not isinstance(name, str) or step not in STEPS:
            continue
        if step == "intent" and line.get("provider") in get_args(ProviderName):
            leases[name] = Lease(
                name=name,
                provider=line["provider"],
                step="intent",
                since=_number(line.get("time")),
                gpu_type=str(line.get("gpu_type", "")),
                gpus=int(_number(line.get("gpus"))) or 1,
                region=str(line.get("region", "")),
                price_per_hour=_number(line.get("price_per_hour")),
                run_id=line["run_id"] if isinstance(line.get("run_id"), str) else None,
                limits=_limits(line),
                keep=line.get("keep") is True,
                spot=line.get("spot") is True,
                account=str(line.get("account") or ""),
            )
        elif name in leases:
            leases[name] = _after(leases[name], line)
    return leases


def _limits(line: dict[str, Any]) -> Limits | None:
    """Return the limits of an intent. Lines of an earlier version have the time alone."""
    if line.get("until") is not None:
        hours = (_number(line["until"]) - _number(line.get("time"))) / 3600
        return Limits(hours_max=max(0.0, hours), spend_max=float("inf"))
    if line.get("hours_max") is None:
        return None
    return Limits(
        hours_max=_number(line["hours_max"]),
        spend_max=float("inf") if line.get("spend_max") is None else _number(line["spend_max"]),
        idle_minutes_max=_number(line.get("idle_minutes_max")) or None,
    )


def _after(lease: Lease, line: dict[str, Any]) -> Lease:
    changes: dict[str, Any] = {"step": line["step"]}
    if isinstance(line.get("machine_id"), str):
        changes["machine_id"] = line["machine_id"]
    if line["step"] == "created":
        changes["made_at"] = _number(line.get("time"))
    if line.get("price_per_hour") is not None:
        changes["price_per_hour"] = _number(line["price_per_hour"])
    if isinstance(line.get("reason"), str):
        changes["reason"] = line["reason"]
    if line["step"] in ("taken", "ending") and not lease.ended_by:
        changes["ended_by"] = "provider" if line["step"] == "taken" else "us"
    changes["ended_at"] = (
        _number(line.get("time")) if line["step"] in ("ended", "refused") else None
    )
    return replace(lease, **changes)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
