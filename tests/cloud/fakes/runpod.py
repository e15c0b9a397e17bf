"""RunPod's REST interface, version 2, and of its GraphQL one the call that makes a pod with an end."""

from datetime import datetime
from typing import Any

from tests.cloud.fakes.server import Answer, FakeCloud, FakeMachine

GPUS = [
    {
        "id": "NVIDIA H100 80GB HBM3",
        "memory": 80,
        "price": {"secure": 2.99, "community": 2.69},
        "maxCount": 8,
        "availability": "HIGH",
        "cudaVersions": ["12.8"],
    },
    {
        "id": "NVIDIA GeForce RTX 4090",
        "memory": 24,
        "price": {"secure": 0.69, "community": 0.34},
        "maxCount": 6,
        "availability": "LOW",
    },
    {
        "id": "NVIDIA B200",
        "memory": 180,
        "price": {"secure": 5.98, "community": None},
        "maxCount": 8,
        "availability": "NONE",
    },
]
PAGE = 2
DEPLOY_FIELDS = {
    *("name", "imageName", "gpuTypeId", "gpuCount", "cloudType", "containerDiskInGb", "volumeInGb"),
    *("ports", "env", "startSsh", "supportPublicIp", "dockerArgs", "terminateAfter"),
}


def graphql_error(said: str, code: str) -> Answer:
    return Answer(200, {"errors": [{"message": said, "extensions": {"code": code}}], "data": None})


class FakeRunPod(FakeCloud):
    provider = "runpod"
    prefix = "/v2"

    def __init__(self) -> None:
        super().__init__()
        self.gpus = GPUS

    def operation(self, method: str, path: str) -> str:
        if path == "/catalog/gpus":
            return "offers"
        if path == "/graphql":
            return "create"
        if path == "/pods":
            return "create" if method == "POST" else "list"
        return "terminate" if method == "DELETE" else "get"

    def error(self, status: int, text: str) -> Answer:
        return Answer(status, {"title": "Error", "status": status, "detail": text})

    def no_capacity(self) -> Answer:
        said = "There are no longer any instances available with the requested specifications."
        is_graphql = self.requests[-1][1] == "/graphql"
        return graphql_error(said, "RUNPOD") if is_graphql else self.error(400, said)

    def on_offers(self, path: str, query: dict[str, str], body: Any) -> Answer:
        assert query == {"include": "AVAILABILITY", "product": "POD"}, query
        return Answer(200, {"gpus": self.gpus})

    def on_terminate(self, path: str, query: dict[str, str], body: Any) -> Answer:
        machine = self.machines.get(path.removeprefix("/pods/"))
        if machine is None or not machine.bills or machine.is_hidden:
            return self.error(404, "pod not found")
        self.end(machine)
        return self.accepted()

    def on_get(self, path: str, query: dict[str, str], body: Any) -> Answer:
        shown = self.seen(path.removeprefix("/pods/"))
        if shown is None or not shown.bills:
            return self.error(404, "pod not found")
        return Answer(200, self._pod(shown))

    def on_create(self, path: str, query: dict[str, str], body: Any) -> Answer:
        if path == "/graphql":
            return self._deploy(body["query"], body["variables"]["input"])
        known = {"name", "image", "gpu", "cloud", "disk", "ports", "env", "startSsh", "args"}
        assert set(body) <= known and body["ports"] == ["22/tcp"], body
        (gpu,) = [gpu for gpu in self.gpus if gpu["id"] == body["gpu"]["id"]]
        price = gpu["price"][body["cloud"].lower()] * body["gpu"]["count"]
        machine = self.make(body["name"], price, body, body["env"]["PUBLIC_KEY"])
        return Answer(201, self._pod(machine))

    def _deploy(self, query: str, asked: dict[str, Any]) -> Answer:
        """podFindAndDeployOnDemand, the interface that knows terminateAfter. Its errors come with HTTP 200."""
        assert "podFindAndDeployOnDemand(input: $input)" in query, query
        if unknown := set(asked) - DEPLOY_FIELDS:
            return graphql_error(f"unknown fields {unknown}", "GRAPHQL_VALIDATION_FAILED")
        assert asked["ports"] == "22/tcp" and asked["startSsh"] is True, asked
        (gpu,) = [gpu for gpu in self.gpus if gpu["id"] == asked["gpuTypeId"]]
        price = gpu["price"][asked["cloudType"].lower()] * asked["gpuCount"]
        env = {pair["key"]: pair["value"] for pair in asked["env"]}
        kept = {**asked, "gpu": {"id": gpu["id"], "count": asked["gpuCount"]}}
        machine = self.make(asked["name"], price, kept, env["PUBLIC_KEY"])
        ends_at = datetime.strptime(asked["terminateAfter"], "%Y-%m-%dT%H:%M:%S%z")
        machine.ends_at = ends_at.timestamp()
        pod = {"id": machine.machine_id, "desiredStatus": "RUNNING", "costPerHr": price}
        return Answer(200, {"data": {"podFindAndDeployOnDemand": pod}})

    def on_list(self, path: str, query: dict[str, str], body: Any) -> Answer:
        shown = [machine for machine in self.shown() if machine.bills]
        at = int(query.get("cursor", "c0")[1:])
        more = at + PAGE < len(shown)
        pagination = {"nextCursor": f"c{at + PAGE}" if more else None, "hasNextPage": more}
        return Answer(
            200, {"pods": [self._pod(m) for m in shown[at : at + PAGE]], "pagination": pagination}
        )

    def _pod(self, machine: FakeMachine) -> dict[str, Any]:
        """PROVISIONING, STARTING, then RUNNING: first with ports in `runtime` alone, then with `ssh.direct` too."""
        step = 0 if machine.fate == "stuck" else min(machine.looks, 4)
        status = ("PROVISIONING", "STARTING", "RUNNING", "RUNNING", "RUNNING")[step]
        status = "ERROR" if machine.fate == "broken" else status
        host, port, user = machine.address
        mapped = [
            {"private": 8888, "public": 1, "ip": host, "type": "http"},
            {"private": 22, "public": str(port), "ip": host, "type": "tcp"},
        ]
        return {
            "id": machine.machine_id,
            "name": machine.name,
            "status": status,
            "cost": machine.price_per_hour,
            "gpu": machine.asked["gpu"],
            "dataCenterId": "EU-RO-1",
            "ssh": {
                "direct": {"host": host, "port": port, "username": user} if step == 4 else None
            },
            "runtime": {"ports": mapped} if step >= 3 else None,
        }
