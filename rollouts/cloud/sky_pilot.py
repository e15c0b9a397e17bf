"""SkyPilot, as a provider of the clouds that it is set up for: `pip install 'rollouts[sky]'`, then `sky check`.

Its own Python interface is called, in a process of its own (sky_calls.py). A machine is a cluster of one node; its name
is its id. No autostop is asked for: on some clouds that copies the account's key to the machine.
"""

import json
import os
import subprocess
import sys
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
from rollouts.cloud.provider_keys import ProviderKey

CALL_TIMEOUT_S = 600.0
CREATE_TIMEOUT_S = 2400.0  # its launch returns once the machine is up
SAID_CHARS_MAX = 600
GONE = "ClusterDoesNotExist"
NO_CAPACITY = ("ResourcesUnavailableError",)
NOTHING_DONE = (  # what is told before a cloud was asked for a machine
    *("ModuleNotFoundError", "ImportError", "ApiServerConnectionError", "NoCloudAccessError"),
    *("InvalidCloudCredentials", "InvalidCloudConfigs", "ResourcesMismatchError"),
)
STATES: Mapping[str, MachineState] = {
    "INIT": "starting",
    "UP": "ready",
    "STOPPED": "broken",
    "AUTOSTOPPING": "broken",
}


class SkyPilot:
    """Machines of all clouds that SkyPilot has credentials for, but those that it reaches through its own server."""

    name: ProviderName = "sky"

    def __init__(self, key: ProviderKey) -> None:
        self.account = key.account
        self._key = key

    async def close(self) -> None:
        """Do nothing: each call is a process of its own."""

    async def offers(self, wanted: MachineNeeds) -> list[Offer]:
        found = rows(await self._call("offers", gpus=wanted.gpus))
        kinds = (False, True) if wanted.spot else (False,)
        return [_offer(item, wanted, spot=spot) for item in found for spot in kinds]

    async def create(self, order: Order) -> Machine:
        made = order.offer.creation
        try:
            await self._call(
                "create",
                timeout_s=CREATE_TIMEOUT_S,
                name=order.name,
                infra=made["infra"],
                instance_type=made["instance_type"],
                gpu=order.offer.gpu_type,
                gpus=order.offer.gpus,
                spot=order.offer.spot,
                disk_gib=order.disk_gib,
            )
        except CloudError as error:
            # a launch that failed may leave a part
            if error.kind == "no capacity" and await self.get(order.name) is not None:
                error.machine_id = order.name
            raise
        return Machine(
            provider="sky", machine_id=order.name, name=order.name, state="starting", status=""
        )

    async def get(self, machine_id: str) -> Machine | None:
        found = await self.machines(machine_id)
        return found[0] if found else None

    async def machines(self, *names: str) -> list[Machine]:
        return [_machine(found) for found in rows(await self._call("clusters", names=names))]

    async def terminate(self, machine_id: str) -> bool:
        try:
            await self._call("terminate", name=machine_id)
        except CloudError as error:
            if error.kind == "gone":
                return False
            raise
        return True

    async def _call(self, call: str, *, timeout_s: float = CALL_TIMEOUT_S, **asked: Any) -> Any:
        """Return the answer of one call. Raises CloudError; of a create whose end is not known, kind "unclear"."""
        lost: CloudError | None = None
        try:
            with anyio.fail_after(timeout_s):
                done = await anyio.run_process(
                    [sys.executable, "-m", "rollouts.cloud.sky_calls"],
                    input=json.dumps({"call": call, **asked}).encode(),
                    check=False,
                    stderr=subprocess.PIPE,
                    env={**os.environ, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
                )
            said = row(json.loads(done.stdout))
        except TimeoutError:
            lost = self._error(call, "unclear", f"no answer within {timeout_s:.0f} s")
        except ValueError:
            end = done.stderr.decode(errors="replace")[-SAID_CHARS_MAX:]
            lost = self._error(call, "unclear", f"exit code {done.returncode}: {end}")
        if lost is not None:
            raise lost from None
        if "error" in said:
            raise self._error(call, text(said["error"]), text(said.get("said")))
        return said.get("answer")

    def _error(self, call: str, error: str, said: str) -> CloudError:
        found = self._key.hidden(f"{error}: {said}"[:SAID_CHARS_MAX])
        if error == GONE:
            return CloudError("sky: there is no such cluster.", kind="gone", found=found)
        if error in NO_CAPACITY:
            return CloudError("sky has no such machine free now.", kind="no capacity", found=found)
        if error in NOTHING_DONE:
            fix = "`sky check` shows which clouds are set up, and what is missing"
            return CloudError(f"sky refuses {call}.", kind="refused", found=found, fix=fix)
        if call == "create":
            message = "sky: the launch had no clear end, so a machine may have been made."
            return CloudError(message, kind="unclear", found=found)
        fix = "`sky status` and `sky api logs` show more; try again later"
        return CloudError(f"sky: {call} failed.", kind="unavailable", found=found, fix=fix)


def _offer(item: Mapping[str, Any], wanted: MachineNeeds, *, spot: bool) -> Offer:
    cloud, region = text(item.get("cloud")).lower(), text(item.get("region"))
    kind = text(item.get("instance_type"))
    gpus = whole(item.get("accelerator_count")) or 0
    infra = f"{cloud}/{region}"
    offer = Offer(
        provider="sky",
        offer_id=f"{infra}/{kind}{'/spot' if spot else ''}",
        gpu_type=text(item.get("accelerator_name")),
        gpus=max(gpus, 1),
        vram_gb=number(item.get("device_memory")),
        price_per_hour=number(item.get("spot_price" if spot else "price")) or 0.0,
        region=infra,
        spot=spot,
        reliability=None,
        stock=kind,
        creation={"infra": infra, "instance_type": kind},
    )
    checks = (
        (gpus == wanted.gpus, f"{gpus} GPU(s)"),
        (kind != "", "no instance type"),
        (wanted.image is None, "it boots SkyPilot's own image of that cloud"),
    )
    for ok, reason in checks:
        offer = offer if ok else offer.without(reason)
    return offer


def _machine(found: Mapping[str, Any]) -> Machine:
    status, message = text(found.get("status")), ""
    state = STATES.get(status, "starting")
    host, user, key = (text(found.get(name)) for name in ("host", "user", "key"))
    if found.get("proxy"):
        state, message = "broken", "it is reached through a proxy, which is not followed"
    name = text(found.get("name"))
    address = Address(host, whole(found.get("port")) or 22, user, f"{key}\n" if key else "")
    return Machine(
        provider="sky",
        machine_id=name,
        name=name,
        state=state,
        status=status,
        message=message,
        price_per_hour=number(found.get("price")),
        addresses=(address,) if host and user else (),
        gpu_type=text(found.get("gpu")),
        region=text(found.get("region")),
    )
