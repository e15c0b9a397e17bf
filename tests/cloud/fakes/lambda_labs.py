"""Lambda's HTTP interface."""

from typing import Any

from tests.cloud.fakes.server import Answer, FakeCloud, FakeMachine


def kind(name: str, about: str, cents: int, gpus: int, *regions: str) -> dict[str, Any]:
    return {
        "instance_type": {
            "name": name,
            "gpu_description": about,
            "price_cents_per_hour": cents,
            "specs": {"gpus": gpus, "vcpus": 26},
        },
        "regions_with_capacity_available": [
            {"name": region, "description": region} for region in regions
        ],
    }


TYPES = {
    "gpu_1x_h100_pcie": kind(
        "gpu_1x_h100_pcie", "H100 (80 GB PCIe)", 249, 1, "us-west-3", "us-east-1"
    ),
    "gpu_8x_h100_sxm5": kind("gpu_8x_h100_sxm5", "H100 (80 GB SXM5)", 2392, 8, "us-west-3"),
    "gpu_1x_gh200": kind("gpu_1x_gh200", "GH200 (96 GB)", 149, 1, "us-east-3"),
    "gpu_1x_a10": kind("gpu_1x_a10", "A10 (24 GB PCIe)", 75, 1),
}

GONE = Answer(
    404, {"error": {"code": "global/object-does-not-exist", "message": "no such instance"}}
)


class FakeLambda(FakeCloud):
    provider = "lambda"
    prefix = "/api/v1"

    def __init__(self) -> None:
        super().__init__()
        self.types = TYPES
        self.keys: dict[str, str] = {}

    def operation(self, method: str, path: str) -> str:
        return {
            "/instance-types": "offers",
            "/ssh-keys": "keys",
            "/instance-operations/launch": "create",
            "/instance-operations/terminate": "terminate",
            "/instances": "list",
        }.get(path, "get")

    def error(self, status: int, text: str) -> Answer:
        return Answer(
            status, {"error": {"code": "global/error", "message": text, "suggestion": ""}}
        )

    def no_capacity(self) -> Answer:
        code = "instance-operations/launch/insufficient-capacity"
        return Answer(
            400,
            {"error": {"code": code, "message": "Not enough capacity", "suggestion": "try again"}},
        )

    def on_offers(self, path: str, query: dict[str, str], body: Any) -> Answer:
        return Answer(200, {"data": self.types})

    def on_keys(self, path: str, query: dict[str, str], body: Any) -> Answer:
        if body:
            assert body["name"] not in self.keys, "a name is taken once"
            self.keys[body["name"]] = body["public_key"]
        return Answer(
            200, {"data": [{"id": n, "name": n, "public_key": k} for n, k in self.keys.items()]}
        )

    def on_list(self, path: str, query: dict[str, str], body: Any) -> Answer:
        return Answer(
            200, {"data": [self._instance(machine) for machine in self.shown() if machine.bills]}
        )

    def on_get(self, path: str, query: dict[str, str], body: Any) -> Answer:
        machine = self.seen(path.removeprefix("/instances/"))
        return Answer(200, {"data": self._instance(machine)}) if machine else GONE

    def on_create(self, path: str, query: dict[str, str], body: Any) -> Answer:
        (key,) = body["ssh_key_names"]
        assert body["quantity"] == 1 and len(body["name"]) <= 64, body
        found = self.types[body["instance_type_name"]]["instance_type"]
        machine = self.make(body["name"], found["price_cents_per_hour"] / 100, body, self.keys[key])
        return Answer(200, {"data": {"instance_ids": [machine.machine_id]}})

    def on_terminate(self, path: str, query: dict[str, str], body: Any) -> Answer:
        found = [
            machine
            for machine_id in body["instance_ids"]
            if (machine := self.machines.get(machine_id))
        ]
        if not found or found[0].is_hidden:
            return GONE
        for machine in found:
            self.end(machine)
        return Answer(
            200, {"data": {"terminated_instances": [self._instance(machine) for machine in found]}}
        )

    def take_away(self, machine: FakeMachine) -> None:
        """Preempted: it is gone, and can still be asked for."""
        machine.fate = "preempted"
        self.end(machine)

    def accepted(self) -> Answer:
        return Answer(200, {"data": {"terminated_instances": []}})

    def _instance(self, machine: FakeMachine) -> dict[str, Any]:
        """booting without an ip, booting with one, then active; terminated ones can still be asked for."""
        step = 0 if machine.fate == "stuck" else min(machine.looks, 3)
        status = ("booting", "booting", "booting", "active")[step]
        status = "unhealthy" if machine.fate == "broken" else status
        ended = "preempted" if machine.fate == "preempted" else "terminated"
        found: dict[str, Any] = {
            "id": machine.machine_id,
            "name": machine.name,
            "status": status if machine.bills else ended,
            "instance_type": self.types[machine.asked["instance_type_name"]]["instance_type"],
            "region": {"name": machine.asked["region_name"]},
            "private_ip": "10.0.0.1",
        }
        return found | ({"ip": machine.address[0]} if step >= 2 else {})
