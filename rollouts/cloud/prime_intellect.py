"""Prime Intellect's HTTP interface, which rents from other clouds."""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import anyio

from rollouts.cloud.answer_fields import Row, number, row, rows, text, whole
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
from rollouts.cloud.provider_api import (
    PAGES_MAX,
    HttpReply,
    ProviderApi,
    key_name,
    pages,
    said_by,
)
from rollouts.cloud.provider_keys import ProviderKey

PAGE_SIZE = 100
PAGES_AT_ONCE = 2  # of offers; most searches have no third one
DEFAULT_IMAGE = "ubuntu_22_cuda_12"
NO_CAPACITY = (
    "no capacity",
    "capacity",
    "out of stock",
    "not available",
    "unavailable",
    "sold out",
)
STATES: Mapping[str, MachineState] = {
    "PROVISIONING": "starting",
    "PENDING": "starting",
    "ACTIVE": "ready",
    "STOPPED": "broken",
    "ERROR": "broken",
    "DELETING": "starting",  # it may bill until it is gone
    "TERMINATED": "ended",
}
CONNECTION = re.compile(
    r"(?:ssh\s+)?(?P<user>[\w.-]+)@(?P<host>[\w.:-]+?)(?:\s+-p\s*(?P<port>\d+))?\s*"
)


class PrimeIntellect:
    """Pods of many clouds behind one account."""

    name: ProviderName = "prime"

    def __init__(self, key: ProviderKey) -> None:
        self._api = ProviderApi("prime", key)
        self.account = key.account

    async def close(self) -> None:
        await self._api.close()

    async def offers(self, wanted: MachineNeeds) -> list[Offer]:
        pages_read: dict[int, Row] = {}
        last = PAGES_AT_ONCE  # only an answer says how many there are
        while len(pages_read) < last:
            wants = range(len(pages_read) + 1, last + 1)
            pages_read |= await self._offer_pages(wants)
            total = max(whole(page.get("totalCount")) or 0 for page in pages_read.values())
            last = -(-total // PAGE_SIZE)
            if last > PAGES_MAX:
                raise CloudError(
                    "prime: its list of offers does not end.",
                    kind="unreadable",
                    found=f"totalCount {total}",
                )
        items = (item for _, page in sorted(pages_read.items()) for item in rows(page.get("items")))
        return [_offer(item, wanted) for item in items]

    async def _offer_pages(self, numbers: Iterable[int]) -> dict[int, Row]:
        """Return these pages of the offers, read all at once. Raises CloudError."""
        found: dict[int, Row] = {}
        errors: list[CloudError] = []

        async def read(number: int) -> None:
            try:
                answer = await self._api.read(
                    "/availability/gpus", page=number, page_size=PAGE_SIZE
                )
            except CloudError as error:
                errors.append(error)
            else:
                found[number] = row(answer)

        async with anyio.create_task_group() as group:
            for number in numbers:
                group.start_soon(read, number)
        if errors:
            raise errors[0]
        return found

    async def create(self, order: Order) -> Machine:
        made = order.offer.creation
        pod: dict[str, Any] = {
            "name": order.name,
            "cloudId": made["cloud_id"],
            "gpuType": order.offer.gpu_type,
            "socket": made["socket"],
            "gpuCount": order.offer.gpus,
            "diskSize": order.disk_gib,
            "image": order.image or made["image"],
            "dataCenterId": made["data_center"],
            "maxPrice": order.offer.price_per_hour,
            "sshKeyId": await self._registered(order.public_key),
        }
        team = {"teamId": self._api.team} if self._api.team else None
        body = {"pod": pod, "provider": {"type": made["provider"]}, "team": team}
        answer = await self._api.create("POST", "/pods", json=body, refused=_refusal)
        machine = _machine(row(answer))
        self._api.made(machine.machine_id, answer, "POST /pods")
        return machine

    async def _registered(self, public_key: str) -> str:
        """Return the id of the key in the account, where it is added if it is missing."""
        name = key_name(public_key)
        answer = await self._api.read("/ssh_keys")
        known = rows(row(answer).get("data") if isinstance(answer, dict) else answer)
        for key in known:
            if text(key.get("name")) == name:
                return text(key.get("id"))
        added = await self._api.read(
            "/ssh_keys", method="POST", json={"name": name, "publicKey": public_key}
        )
        return text(row(added).get("id"))

    async def get(self, machine_id: str) -> Machine | None:
        answer = row(await self._api.read("/pods/status", pod_ids=machine_id))
        for pod in rows(answer.get("data")):
            if machine_id == (text(pod.get("podId")) or text(pod.get("id")) or machine_id):
                return _machine({**pod, "id": machine_id})
        return None

    async def machines(self) -> list[Machine]:
        async def read(offset: int | None) -> tuple[list[Machine], int | None]:
            at = offset or 0
            answer = row(await self._api.read("/pods", offset=at, limit=PAGE_SIZE))
            found = [_machine(pod) for pod in rows(answer.get("data"))]
            total = whole(answer.get("total_count")) or whole(answer.get("totalCount")) or 0
            return found, at + len(found) if found and at + len(found) < total else None

        return [machine async for page in pages(read, self.name) for machine in page]

    async def terminate(self, machine_id: str) -> bool:
        return await self._api.end("DELETE", f"/pods/{quote(machine_id, safe='')}")


def _offer(item: Mapping[str, Any], wanted: MachineNeeds) -> Offer:
    prices = row(item.get("prices"))
    price = number(prices.get("onDemand")) or number(prices.get("communityPrice"))
    images = [text(image) for image in item.get("images") or [] if text(image)]
    image = wanted.image or (DEFAULT_IMAGE if DEFAULT_IMAGE in images or not images else images[0])
    gpus = whole(item.get("gpuCount")) or 1
    provider, stock = text(item.get("provider")), text(item.get("stockStatus"))
    offer = Offer(
        provider="prime",
        offer_id="/".join(
            map(text, (item.get(name) for name in ("provider", "cloudId", "dataCenter", "socket")))
        ),
        gpu_type=text(item.get("gpuType")),
        gpus=gpus,
        vram_gb=number(item.get("gpuMemory")),
        price_per_hour=price or 0.0,
        region=text(item.get("dataCenter")) or text(item.get("country")),
        spot=item.get("isSpot") is True,
        reliability=None,
        stock=f"{provider} {stock}".strip().lower(),
        creation={
            "cloud_id": text(item.get("cloudId")),
            "socket": text(item.get("socket")),
            "provider": provider,
            "data_center": text(item.get("dataCenter")) or None,
            "image": image,
        },
    )
    checks = (
        (gpus == wanted.gpus, f"{gpus} GPU(s)"),
        (stock.lower() not in ("unavailable", "out of stock"), "none free"),
        (not images or image in images, f"it has no image {image!r}"),
    )
    for ok, reason in checks:
        offer = offer if ok else offer.without(reason)
    return offer


def _refusal(reply: HttpReply) -> CloudError | None:
    """Return the error of an answer that says that nothing was made."""
    if reply.status in (400, 404, 409) and any(words in said_by(reply) for words in NO_CAPACITY):
        return CloudError(
            "prime has no such machine free now.", kind="no capacity", found=reply.said
        )
    if reply.status == 402:
        fix = "add credit to the account"
        return CloudError(
            "prime: the account's credit does not cover it.",
            kind="refused",
            found=reply.said,
            fix=fix,
        )
    return None


def _machine(pod: Mapping[str, Any]) -> Machine:
    status = text(pod.get("status"))
    state, failure = STATES.get(status, "starting"), text(pod.get("installationFailure"))
    if state == "ready":  # ACTIVE says that it is there; the image may still be on its way
        installed = (
            text(pod.get("installationStatus")) == "FINISHED"
            or number(pod.get("installationProgress")) == 100
        )
        state = "broken" if failure else "ready" if installed else "starting"
    return Machine(
        provider="prime",
        machine_id=text(pod.get("id")),
        name=text(pod.get("name")),
        state=state,
        status=status,
        message=failure[:300],
        price_per_hour=number(pod.get("priceHr")),
        addresses=tuple(_addresses(pod)),
        gpu_type=text(pod.get("gpuType")) or text(pod.get("gpuName")),
        region=text(pod.get("dataCenterId")),
    )


def _addresses(pod: Mapping[str, Any]) -> list[Address]:
    """Return where SSH answers. `sshConnection` is a string, a list of them, or [null]."""
    found = pod.get("sshConnection")
    made = []
    for line in found if isinstance(found, list) else [found]:
        if match := CONNECTION.fullmatch(text(line)):
            made.append(Address(match["host"], int(match["port"] or 22), match["user"]))
    return made
