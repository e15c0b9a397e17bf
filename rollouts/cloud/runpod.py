"""RunPod's REST interface, version 2; and GraphQL, its older one, for a pod that RunPod ends by itself at its time."""

import base64
import shlex
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

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

OWN_IMAGES = "runpod/"  # they start an SSH server for $PUBLIC_KEY
DEFAULT_IMAGE = "runpod/pytorch:2.8.0-py3.11-cuda12.8.1"
DISK_PER_GB_MONTH = (
    0.10  # US dollars, of a running pod's own disk: docs.runpod.io/pods/storage/types
)
HOURS_PER_MONTH = 30 * 24
CLOUDS = ("secure", "community")
STATES: Mapping[str, MachineState] = {
    "PROVISIONING": "starting",
    "STARTING": "starting",
    "RUNNING": "ready",
    "EXITED": "broken",
    "ERROR": "broken",
    "TERMINATED": "ended",
}
NO_PODS = ("no longer any instances", "no instances", "does not have the resources")
NO_CAPACITY = (*NO_PODS, "capacity", "not available", "unavailable", "out of stock")
NOTHING_DONE = ("GRAPHQL_VALIDATION_FAILED", "BAD_USER_INPUT", "UNAUTHENTICATED", "FORBIDDEN")
DEPLOY = (
    "mutation Deploy($input: PodFindAndDeployOnDemandInput)"
    " { podFindAndDeployOnDemand(input: $input) { id desiredStatus costPerHr } }"
)


class RunPod:
    """Pods on demand. Spot pods exist in RunPod's other interface alone, and are not offered."""

    name: ProviderName = "runpod"

    def __init__(self, key: ProviderKey) -> None:
        self._api = ProviderApi("runpod", key)
        base = self._api.base_url.removesuffix("/v2")
        self._graph = ProviderApi("runpod", key, url=f"{base}/graphql")
        self.account = key.account

    async def close(self) -> None:
        await self._api.close()
        await self._graph.close()

    async def offers(self, wanted: MachineNeeds) -> list[Offer]:
        answer = await self._api.read("/catalog/gpus", include="AVAILABILITY", product="POD")
        return [
            _offer(gpu, cloud, price, wanted)
            for gpu in rows(row(answer).get("gpus"))
            for cloud in CLOUDS
            if (price := number(row(gpu.get("price")).get(cloud))) is not None
        ]

    async def create(self, order: Order) -> Machine:
        made = order.offer.creation
        image = order.image or DEFAULT_IMAGE
        body: dict[str, Any] = {
            "name": order.name,
            "image": image,
            "gpu": {"id": made["gpu"], "count": order.offer.gpus},
            "cloud": made["cloud"],
            "disk": order.disk_gib,
            "ports": ["22/tcp"],
            "env": {"PUBLIC_KEY": order.public_key},
            "startSsh": True,
        }
        if not image.startswith(OWN_IMAGES):
            body["args"] = start_ssh(order.public_key)
        if order.ends_at is not None:
            return await self._deploy(body, order.ends_at)
        answer = await self._api.create("POST", "/pods", json=body, refused=_refusal)
        machine = _machine(row(answer))
        self._api.made(machine.machine_id, answer, "POST /pods")
        return machine

    async def _deploy(self, body: Mapping[str, Any], ends_at: float) -> Machine:
        """Make the pod by the other interface, the only one in which RunPod ends it by itself."""
        asked = {
            "name": body["name"],
            "imageName": body["image"],
            "gpuTypeId": body["gpu"]["id"],
            "gpuCount": body["gpu"]["count"],
            "cloudType": body["cloud"],
            "containerDiskInGb": body["disk"],
            "volumeInGb": 0,
            "ports": ",".join(body["ports"]),
            "env": [{"key": key, "value": value} for key, value in body["env"].items()],
            "startSsh": True,
            "supportPublicIp": True,
            "dockerArgs": body.get("args", ""),
            "terminateAfter": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ends_at)),
        }
        call = {"query": DEPLOY, "variables": {"input": asked}}
        answer = await self._graph.create("POST", "", json=call, refused=_graph_refusal)
        pod = row(row(row(answer).get("data")).get("podFindAndDeployOnDemand"))
        return Machine(
            provider="runpod",
            machine_id=self._api.made(text(pod.get("id")), answer, "the deploy call"),
            name=body["name"],
            state="starting",
            status=text(pod.get("desiredStatus")),
            price_per_hour=number(pod.get("costPerHr")),
        )

    async def get(self, machine_id: str) -> Machine | None:
        found = await self._api.read_known(_path(machine_id))
        return None if found is None else _machine(row(found))

    async def machines(self) -> list[Machine]:
        async def read(cursor: str | None) -> tuple[list[Machine], str | None]:
            answer = row(await self._api.read("/pods", cursor=cursor))
            after = row(answer.get("pagination"))
            following = text(after.get("nextCursor")) if after.get("hasNextPage") else ""
            return [_machine(pod) for pod in rows(answer.get("pods"))], following or None

        return [machine async for page in pages(read, self.name) for machine in page]

    async def terminate(self, machine_id: str) -> bool:
        return await self._api.end("DELETE", _path(machine_id))


def _path(machine_id: str) -> str:
    return f"/pods/{quote(machine_id, safe='')}"


def _offer(gpu: Mapping[str, Any], cloud: str, price: float, wanted: MachineNeeds) -> Offer:
    name, stock = text(gpu.get("id")), text(gpu.get("availability"))
    disk = wanted.disk_gib * DISK_PER_GB_MONTH / HOURS_PER_MONTH
    offer = Offer(
        provider="runpod",
        offer_id=f"{name}/{cloud}",
        gpu_type=name,
        gpus=wanted.gpus,
        vram_gb=number(gpu.get("memory")),
        price_per_hour=price * wanted.gpus + disk if price > 0 else 0.0,
        region="any",
        spot=False,
        reliability=None,
        stock=f"{cloud} {stock}".lower(),
        creation={"gpu": name, "cloud": cloud.upper()},
    )
    most = whole(gpu.get("maxCount"))
    if most is not None and wanted.gpus > most:
        offer = offer.without(f"at most {most} of these in one machine")
    return offer.without("none free") if stock == "NONE" else offer


def _refusal(reply: HttpReply) -> CloudError | None:
    """Return the error of an answer that says that nothing was made."""
    said = said_by(reply)
    if reply.status in (400, 409) and any(words in said for words in NO_CAPACITY):
        return CloudError(
            "runpod has no such machine free now.", kind="no capacity", found=reply.said
        )
    if reply.status == 402:
        fix = "add credit to the account"
        return CloudError(
            "runpod: the account's credit does not cover it.",
            kind="refused",
            found=reply.said,
            fix=fix,
        )
    return None


def _graph_refusal(reply: HttpReply) -> CloudError | None:
    """Do `_refusal` for the other interface, which answers errors with HTTP 200."""
    errors = rows(row(reply.body).get("errors"))
    if not errors:
        return _refusal(reply)
    said = " ".join(text(error.get("message")) for error in errors).lower()
    codes = [text(row(error.get("extensions")).get("code")) for error in errors]
    if any(words in said for words in NO_PODS):
        return CloudError(
            "runpod has no such machine free now.", kind="no capacity", found=reply.said
        )
    if any(code in NOTHING_DONE for code in codes):
        return CloudError("runpod refuses the deploy call.", kind="refused", found=reply.said)
    message = "runpod: the deploy call failed at the provider, so a machine may have been made."
    return CloudError(message, kind="unclear", found=reply.said)


def _machine(pod: Mapping[str, Any]) -> Machine:
    status, gpu = text(pod.get("status")), row(pod.get("gpu"))
    return Machine(
        provider="runpod",
        machine_id=text(pod.get("id")),
        name=text(pod.get("name")),
        state=STATES.get(status, "starting"),
        status=status,
        price_per_hour=number(pod.get("cost")),
        addresses=tuple(_addresses(pod)),
        gpu_type=text(gpu.get("id")),
        region=text(pod.get("dataCenterId")),
    )


def _addresses(pod: Mapping[str, Any]) -> list[Address]:
    found = []
    direct = row(row(pod.get("ssh")).get("direct"))
    host, port = text(direct.get("host")), whole(direct.get("port"))
    if host and port:
        found.append(Address(host, port, text(direct.get("username")) or "root"))
    for mapped in rows(row(pod.get("runtime")).get("ports")):
        host, port = text(mapped.get("ip")), whole(mapped.get("public"))
        if (
            whole(mapped.get("private")) == 22
            and text(mapped.get("type")) == "tcp"
            and host
            and port
        ):
            found.append(Address(host, port, "root"))
    return list(dict.fromkeys(found))


def start_ssh(public_key: str) -> str:
    """Return arguments for an image that has no SSH server running: install one, let the key in, and wait."""
    script = (
        "command -v sshd rsync tmux >/dev/null 2>&1 || (apt-get update -q && DEBIAN_FRONTEND=noninteractive"
        " apt-get install -qy openssh-server rsync tmux)\n"
        "mkdir -p -m 700 ~/.ssh /run/sshd\n"
        f"echo {shlex.quote(public_key)} >> ~/.ssh/authorized_keys && chmod 600 ~/.ssh/authorized_keys\n"
        "ssh-keygen -A\n"
        "$(command -v sshd || echo /usr/sbin/sshd)\n"
        "sleep infinity\n"
    )
    return f"bash -c 'echo {base64.b64encode(script.encode()).decode()} | base64 -d | bash'"
