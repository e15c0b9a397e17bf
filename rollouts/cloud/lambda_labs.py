"""Lambda's HTTP interface."""

import re
import time
from collections.abc import Mapping
from typing import Any

import anyio

from rollouts.cloud.answer_fields import number, row, rows, text, whole
from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.machine_types import (
    Address,
    Machine,
    MachineNeeds,
    MachineState,
    Offer,
    Order,
    ProviderName,
)
from rollouts.cloud.provider_api import HttpReply, ProviderApi, key_name, said_by
from rollouts.cloud.provider_keys import ProviderKey

CALL_GAP_S = 1.05  # at most one call a second
LAUNCH_GAP_S = 12.5  # at most one launch in twelve
USER = "ubuntu"
CAPACITY_CODES = ("insufficient-capacity", "insufficient capacity")
STATES: Mapping[str, MachineState] = {
    "booting": "starting",
    "active": "ready",
    "unhealthy": "broken",
    "terminating": "starting",  # it bills until it is gone
    "terminated": "ended",
    "preempted": "ended",
}


class LambdaLabs:
    """Virtual machines with Lambda's own image."""

    name: ProviderName = "lambda"

    def __init__(self, key: ProviderKey) -> None:
        self._api = ProviderApi("lambda", key, gap_s=CALL_GAP_S)
        self.account = key.account
        self._launch_at = 0.0

    async def close(self) -> None:
        await self._api.close()

    async def offers(self, wanted: MachineNeeds) -> list[Offer]:
        answer = await self._api.read("/instance-types")
        return [
            offer
            for name, found in row(row(answer).get("data")).items()
            for offer in _offers(str(name), row(found), wanted)
        ]

    async def create(self, order: Order) -> Machine:
        key_name = await self._registered(order.public_key)
        body = {
            "region_name": order.offer.creation["region"],
            "instance_type_name": order.offer.creation["type"],
            "ssh_key_names": [key_name],
            "name": order.name,
            "quantity": 1,
        }
        await self._pace()
        answer = await self._api.create(
            "POST", "/instance-operations/launch", json=body, refused=_refusal
        )
        made = row(row(answer).get("data")).get("instance_ids")
        machine_id = self._api.made(text(made), answer, "the launch")
        return Machine(
            provider="lambda",
            machine_id=machine_id,
            name=order.name,
            state="starting",
            status="",
            price_per_hour=order.offer.price_per_hour,
        )

    async def _pace(self) -> None:
        now = time.monotonic()
        at, self._launch_at = self._launch_at, max(now, self._launch_at) + LAUNCH_GAP_S
        if at > now:
            await anyio.sleep(at - now)

    async def _registered(self, public_key: str) -> str:
        """Return the name under which the account holds the key, which is added where it is missing."""
        name = key_name(public_key)
        answer = await self._api.read("/ssh-keys")
        if name not in [text(key.get("name")) for key in rows(row(answer).get("data"))]:
            await self._api.read(
                "/ssh-keys", method="POST", json={"name": name, "public_key": public_key}
            )
        return name

    async def get(self, machine_id: str) -> Machine | None:
        answer = await self._api.read_known(f"/instances/{machine_id}")
        return None if answer is None else _machine(row(row(answer).get("data")))

    async def machines(self) -> list[Machine]:
        answer = await self._api.read("/instances")
        return [_machine(found) for found in rows(row(answer).get("data"))]

    async def terminate(self, machine_id: str) -> bool:
        asked = {"instance_ids": [machine_id]}
        return await self._api.end("POST", "/instance-operations/terminate", json=asked)


def _offers(name: str, found: Mapping[str, Any], wanted: MachineNeeds) -> list[Offer]:
    kind = row(found.get("instance_type"))
    regions = [
        text(region.get("name")) for region in rows(found.get("regions_with_capacity_available"))
    ]
    gpus = whole(row(kind.get("specs")).get("gpus")) or 0
    about = text(kind.get("gpu_description")) or name
    memory = re.search(r"(\d+) ?GB", about)
    cents = number(kind.get("price_cents_per_hour"))
    made = []
    for region in regions or [""]:
        offer = Offer(
            provider="lambda",
            offer_id=f"{name}/{region}",
            gpu_type=about,
            gpus=max(gpus, 1),
            vram_gb=float(memory[1]) if memory else None,
            price_per_hour=(cents or 0.0) / 100,
            region=region or "none",
            spot=False,
            reliability=None,
            stock=name,
            creation={"type": name, "region": region},
        )
        checks = (
            (gpus == wanted.gpus, f"{gpus} GPU(s)"),
            ("gh200" not in name.lower(), "an ARM machine"),
            (region != "", "none free"),
            (wanted.image is None, "it boots Lambda's own image"),
        )
        for ok, reason in checks:
            offer = offer if ok else offer.without(reason)
        made.append(offer)
    return made


def _refusal(reply: HttpReply) -> CloudError | None:
    """Return the error of an answer that says that nothing was made."""
    if reply.status == 400 and any(code in said_by(reply) for code in CAPACITY_CODES):
        return CloudError(
            "lambda has no such machine free now.", kind="no capacity", found=reply.said
        )
    return None


def _machine(found: Mapping[str, Any]) -> Machine:
    status, kind = text(found.get("status")), row(found.get("instance_type"))
    cents, host = number(kind.get("price_cents_per_hour")), text(found.get("ip"))
    return Machine(
        provider="lambda",
        machine_id=text(found.get("id")),
        name=text(found.get("name")),
        state=STATES.get(status, "starting"),
        status=status,
        price_per_hour=None if cents is None else cents / 100,
        addresses=(Address(host, 22, USER),) if host else (),
        gpu_type=text(kind.get("gpu_description")) or text(kind.get("name")),
        region=text(row(found.get("region")).get("name")),
    )
