"""Prime Intellect's HTTP interface."""

from typing import Any

from tests.cloud.fakes.server import Answer, FakeCloud, FakeMachine

STEPS = ("PROVISIONING", "PENDING", "ACTIVE", "ACTIVE", "ACTIVE")


def item(cloud_id: str, gpu: str, memory: int, price: float, **changes: Any) -> dict[str, Any]:
    return {
        "cloudId": cloud_id,
        "gpuType": gpu,
        "socket": "SXM5",
        "gpuCount": 1,
        "gpuMemory": memory,
        "dataCenter": "US-EAST-1",
        "provider": "hyperstack",
        "images": ["ubuntu_22_cuda_12", "cuda_12_6_pytorch_2_7"],
        "stockStatus": "Available",
        "isSpot": False,
        "prices": {"onDemand": price, "communityPrice": None, "isVariable": False},
        **changes,
    }


ITEMS = [
    item("h100-a", "H100_80GB", 80, 1.99),
    item("h100-b", "H100_80GB", 80, 1.20, isSpot=True),
    item("h100-c", "H100_80GB", 80, 1.00, stockStatus="Unavailable"),
    *(
        item(f"old-{number}", "RTX4090_24GB", 24, 0.40 + number / 100, dataCenter=None)
        for number in range(150)
    ),
]


class FakePrime(FakeCloud):
    provider = "prime"
    prefix = "/api/v1"

    def __init__(self) -> None:
        super().__init__()
        self.items = list(ITEMS)
        self.keys: dict[str, dict[str, str]] = {}
        self.connection_form = "string"  # or "list"

    def operation(self, method: str, path: str) -> str:
        path = path.rstrip("/")
        if path == "/availability/gpus":
            return "offers"
        if path == "/ssh_keys":
            return "keys"
        if path == "/pods":
            return "create" if method == "POST" else "list"
        return "get" if path == "/pods/status" else "terminate"

    def error(self, status: int, text: str) -> Answer:
        return Answer(status, {"detail": text})

    def no_capacity(self) -> Answer:
        return self.error(400, "The requested configuration is out of stock")

    def accepted(self) -> Answer:
        return Answer(200, {"status": "DELETING"})

    def on_offers(self, path: str, query: dict[str, str], body: Any) -> Answer:
        page, size = int(query["page"]), int(query["page_size"])
        shown = self.items[(page - 1) * size : page * size]
        return Answer(200, {"items": shown, "totalCount": len(self.items)})

    def on_keys(self, path: str, query: dict[str, str], body: Any) -> Answer:
        if body:
            assert body["name"] not in [key["name"] for key in self.keys.values()]
            self.keys[f"k{len(self.keys)}"] = body
            return Answer(200, {"id": f"k{len(self.keys) - 1}", **body, "isPrimary": False})
        return Answer(200, {"data": [{"id": i, **key} for i, key in self.keys.items()]})

    def on_list(self, path: str, query: dict[str, str], body: Any) -> Answer:
        at, most = int(query["offset"]), min(int(query["limit"]), 2)
        shown = [machine for machine in self.shown() if machine.bills]
        data = [self._pod(machine) for machine in shown[at : at + most]]
        return Answer(200, {"data": data, "total_count": len(shown), "offset": at, "limit": most})

    def on_get(self, path: str, query: dict[str, str], body: Any) -> Answer:
        machine = self.seen(query["pod_ids"])
        return Answer(200, {"data": [self._status(machine)] if machine else []})

    def on_terminate(self, path: str, query: dict[str, str], body: Any) -> Answer:
        machine = self.machines.get(path.removeprefix("/pods/").rstrip("/"))
        if machine is None or machine.is_hidden:
            return self.error(404, "pod not found")
        self.end(machine)
        return self.accepted()

    def on_create(self, path: str, query: dict[str, str], body: Any) -> Answer:
        pod = body["pod"]
        (found,) = [each for each in self.items if each["cloudId"] == pod["cloudId"]]
        assert pod["image"] in found["images"] and body["provider"] == {
            "type": found["provider"]
        }, body
        price = found["prices"]["onDemand"]
        if price > pod["maxPrice"]:
            return self.no_capacity()
        machine = self.make(pod["name"], price, body, self.keys[pod["sshKeyId"]]["publicKey"])
        return Answer(200, self._pod(machine))

    def _pod(self, machine: FakeMachine) -> dict[str, Any]:
        status = self._status(machine)
        return {
            "id": machine.machine_id,
            "name": machine.name,
            "priceHr": machine.price_per_hour,
            "gpuName": machine.asked["pod"]["gpuType"],
            "status": status["status"],
            "installationStatus": status["installationStatus"],
            "sshConnection": status["sshConnection"],
        }

    def _status(self, machine: FakeMachine) -> dict[str, Any]:
        """PROVISIONING, PENDING, ACTIVE while the image installs, then ACTIVE and installed."""
        step = 0 if machine.fate == "stuck" else min(machine.looks, 4)
        host, port, user = machine.address
        where: Any = f"{user}@{host} -p {port}" if step >= 3 else None
        where = [where] if self.connection_form == "list" else where
        return {
            "podId": machine.machine_id,
            "status": STEPS[step] if machine.bills else "TERMINATED",
            "sshConnection": where,
            "ip": [host] if step >= 3 else None,
            "installationProgress": 100 if step == 4 else 40,
            "installationStatus": "FINISHED" if step == 4 else "PENDING",
            "installationFailure": "image not found"
            if machine.fate == "broken" and step == 4
            else None,
        }
