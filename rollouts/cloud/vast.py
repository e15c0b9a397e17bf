"""Vast's HTTP interface."""

from collections.abc import Mapping
from typing import Any

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
from rollouts.cloud.provider_api import HttpReply, ProviderApi, pages, said_by
from rollouts.cloud.provider_keys import ProviderKey

DEFAULT_IMAGE = "vastai/pytorch:cuda-12.8.1-auto"
RELIABILITY_MIN = 0.9
CUDA_MIN = 12.6
OFFERS_MAX = 200
MB_PER_GB = 1024
HOURS_PER_MONTH = 30 * 24
STATES: Mapping[str, MachineState] = {
    "": "starting",
    "loading": "starting",
    "created": "starting",
    "running": "ready",
    "unknown": "starting",  # its host does not report; that may pass
    "offline": "starting",
    "rebooting": "starting",
    "restarting": "starting",
    "exited": "broken",
    "stopped": "broken",
    "frozen": "broken",
}
NEVER_RUNS = "OCI runtime create failed"


class Vast:
    """Containers on other people's machines, on demand."""

    name: ProviderName = "vast"

    def __init__(self, key: ProviderKey) -> None:
        self._api = ProviderApi("vast", key)
        self.account = key.account

    async def close(self) -> None:
        await self._api.close()

    async def offers(self, wanted: MachineNeeds) -> list[Offer]:
        asked: dict[str, Any] = {
            "type": "on-demand",
            "num_gpus": {"eq": wanted.gpus},
            "direct_port_count": {"gte": 1},
            "verified": {"eq": True},
            "rentable": {"eq": True},
            "rented": {"eq": False},
            "reliability2": {"gte": RELIABILITY_MIN},
            "cuda_max_good": {"gte": CUDA_MIN},
            "allocated_storage": wanted.disk_gib,
            "order": [["dph_total", "asc"]],
            "limit": OFFERS_MAX,
        }
        if wanted.vram_gb_min is not None:
            # 80 GB cards report 81,559 MB
            asked["gpu_ram"] = {"gte": int(wanted.vram_gb_min * MB_PER_GB * 0.95)}
        answer = await self._api.read("/api/v0/bundles/", method="POST", json=asked)
        return [_offer(found, wanted) for found in rows(row(answer).get("offers"))]

    async def create(self, order: Order) -> Machine:
        body = {
            "image": order.image or DEFAULT_IMAGE,
            "disk": order.disk_gib,
            "label": order.name,
            "runtype": "ssh_direct",
            "env": {},
            "onstart": _on_start(order.public_key),
            "cancel_unavail": True,
        }
        path = f"/api/v0/asks/{order.offer.offer_id}/"
        answer = row(await self._api.create("PUT", path, json=body, refused=_refusal))
        contract = text(answer.get("new_contract"))
        if answer.get("success") is not True or not contract:
            message, found = f"vast: {path} answered without success.", str(answer)[:300]
            raise CloudError(
                message,
                kind="no capacity" if contract else "unclear",
                found=found,
                machine_id=contract or None,
            )
        await self._let_in(contract, order.public_key)
        return Machine(
            provider="vast",
            machine_id=contract,
            name=order.name,
            state="starting",
            status="",
            price_per_hour=order.offer.price_per_hour,
        )

    async def _let_in(self, machine_id: str, public_key: str) -> None:
        """Register the key with the machine. Raises CloudError that names it, so that it ends."""
        path = f"/api/v0/instances/{machine_id}/ssh/"
        try:
            reply = await self._api.repeat("POST", path, json={"ssh_key": public_key})
            self._api.checked(reply, f"POST {path}")
        except CloudError as error:
            error.machine_id = machine_id
            raise

    async def get(self, machine_id: str) -> Machine | None:
        answer = await self._api.read_known(f"/api/v0/instances/{machine_id}/")
        found = row(row(answer).get("instances"))
        return _machine(found) if found else None

    async def machines(self) -> list[Machine]:
        async def read(token: str | None) -> tuple[list[Machine], str | None]:
            answer = row(await self._api.read("/api/v1/instances/", limit=25, after_token=token))
            return [_machine(found) for found in rows(answer.get("instances"))], text(
                answer.get("next_token")
            ) or None

        return [machine async for page in pages(read, self.name) for machine in page]

    async def terminate(self, machine_id: str) -> bool:
        return await self._api.end("DELETE", f"/api/v0/instances/{machine_id}/")


def _offer(found: Mapping[str, Any], wanted: MachineNeeds) -> Offer:
    base, storage = number(found.get("dph_base")), number(found.get("storage_cost"))
    total = number(found.get("dph_total")) or 0.0
    price = total
    if base is not None and storage is not None:
        price = base + wanted.disk_gib * storage / HOURS_PER_MONTH if base > 0 else 0.0
    memory = number(found.get("gpu_ram"))
    offer = Offer(
        provider="vast",
        offer_id=text(found.get("id")),
        gpu_type=text(found.get("gpu_name")),
        gpus=whole(found.get("num_gpus")) or 1,
        vram_gb=None if memory is None else round(memory / MB_PER_GB, 1),
        price_per_hour=price,
        region=text(found.get("geolocation")),
        spot=False,
        reliability=number(found.get("reliability2")),
        stock=f"machine {text(found.get('machine_id'))}",
        creation={"machine_id": text(found.get("machine_id"))},
    )
    reliability, cuda, ports = (
        offer.reliability,
        number(found.get("cuda_max_good")),
        number(found.get("direct_port_count")),
    )
    checks = (  # again here: some offers break the filters
        (offer.gpus == wanted.gpus, f"{offer.gpus} GPU(s)"),
        (
            found.get("rentable") is not False and found.get("rented") is not True,
            "rented by somebody else",
        ),
        (
            reliability is not None and reliability >= RELIABILITY_MIN,
            f"reliability under {RELIABILITY_MIN}",
        ),
        (cuda is not None and cuda >= CUDA_MIN, f"its driver is too old for CUDA {CUDA_MIN}"),
        (ports is not None and ports >= 1, "no port for SSH"),
        (offer.offer_id != "", "no id"),
    )
    for ok, reason in checks:
        offer = offer if ok else offer.without(reason)
    return offer


def _refusal(reply: HttpReply) -> CloudError | None:
    """Return the error of an answer that says that nothing was made. One with a machine in it goes on."""
    contract = text(row(reply.body).get("new_contract"))
    if contract and reply.status >= 400:
        message = "vast made a machine and answered with an error."
        return CloudError(message, kind="no capacity", found=reply.said, machine_id=contract)
    if reply.status in (404, 410) or (reply.status == 400 and "no_such_ask" in said_by(reply)):
        return CloudError("vast: the offer is gone.", kind="no capacity", found=reply.said)
    return None


def _on_start(public_key: str) -> str:
    """Return what the machine runs first: no tmux around each login, and the key let in."""
    return (
        "touch ~/.no_auto_tmux; mkdir -p -m 700 ~/.ssh; "
        f"echo '{public_key}' >> ~/.ssh/authorized_keys; chmod 600 ~/.ssh/authorized_keys"
    )


def _machine(found: Mapping[str, Any]) -> Machine:
    status, message = text(found.get("actual_status")), text(found.get("status_msg"))
    state = STATES.get(status, "starting")
    if status == "created" and NEVER_RUNS in message:
        state = "broken"
    if all(found.get(name) == "stopped" for name in ("cur_state", "intended_status", "next_state")):
        state = "preempted"
    return Machine(
        provider="vast",
        machine_id=text(found.get("id")),
        name=text(found.get("label")),
        state=state,
        status=status or "null",
        message=message[:300],
        price_per_hour=number(found.get("dph_total")),
        addresses=tuple(_addresses(found)),
        gpu_type=text(found.get("gpu_name")),
        region=text(found.get("geolocation")),
    )


def _addresses(found: Mapping[str, Any]) -> list[Address]:
    """Return both forms of a machine's address, the direct one first."""
    made = []
    mapped = rows(row(found.get("ports")).get("22/tcp"))
    host, port = (
        text(found.get("public_ipaddr")),
        whole(mapped[0].get("HostPort")) if mapped else None,
    )
    if host and port:
        made.append(Address(host, port, "root"))
    host, port = text(found.get("ssh_host")), whole(found.get("ssh_port"))
    if host and port:
        made.append(
            Address(host, port + int("jupyter" in text(found.get("image_runtype"))), "root")
        )
    return made
