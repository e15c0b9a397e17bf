"""Vast's HTTP interface."""

import re
from typing import Any

from tests.cloud.fakes.server import Answer, FakeCloud, FakeMachine

PAGE = 2
GONE = Answer(404, {"success": False, "error": "no_such_instance", "msg": "Instance not found"})


def _id_in(path: str) -> str:
    return re.findall(r"/instances/(\w+)/", path)[0]


def offer(number: int, gpu: str, base: float, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "machine_id": 7000 + number,
        "gpu_name": gpu,
        "num_gpus": 1,
        "gpu_ram": 81559 if "H100" in gpu else 24564,
        "dph_base": base,
        "dph_total": base + 0.01,
        "storage_cost": 0.15,
        "cuda_max_good": 12.8,
        "reliability2": 0.99,
        "direct_port_count": 10,
        "geolocation": "Sweden, SE",
        "verified": True,
        "rentable": True,
        "rented": False,
        "cpu_cores": None,
        **changes,
    }


OFFERS = [
    offer(101, "H100 SXM", 2.10),
    offer(102, "H100 SXM", 2.20),
    *(offer(number, "H100 SXM", 2.30) for number in range(111, 115)),
    offer(103, "RTX 4090", 0.30),
    offer(104, "H100 SXM", 0.90, reliability2=0.4),  # breaks the filters, as some do
    offer(105, "H100 SXM", 0.95, cuda_max_good=11.8),
    offer(106, "H100 PCIE", 0.97, rented=True),
]


class FakeVast(FakeCloud):
    provider = "vast"

    def __init__(self) -> None:
        super().__init__()
        self.offers = list(OFFERS)
        self.address_form = "direct"  # or "proxy", or "jupyter"
        self.let_in: dict[str, str] = {}

    def operation(self, method: str, path: str) -> str:
        if path == "/api/v0/bundles/":
            return "offers"
        if path.startswith("/api/v0/asks/"):
            return "create"
        if path == "/api/v1/instances/":
            return "list"
        if path.endswith("/ssh/"):
            return "keys"
        return "terminate" if method == "DELETE" else "get"

    def error(self, status: int, text: str) -> Answer:
        return Answer(status, {"success": False, "error": "error", "msg": text})

    def no_capacity(self) -> Answer:
        return Answer(
            410,
            {
                "success": False,
                "error": "no_such_ask",
                "msg": "Instance type by id is not available.",
            },
        )

    def take_away(self, machine: FakeMachine) -> None:
        """Outbid: it is stopped, and its disk bills until it is destroyed."""
        machine.fate, machine.looks = "preempted", 9
        self.shut_down(machine)

    def accepted(self) -> Answer:
        return Answer(200, {"success": True})

    def on_offers(self, path: str, query: dict[str, str], body: Any) -> Answer:
        assert body["allocated_storage"] > 0 and body["rented"] == {"eq": False}, body
        wanted = body["num_gpus"]["eq"]
        return Answer(
            200, {"offers": [found for found in self.offers if found["num_gpus"] == wanted]}
        )

    def on_keys(self, path: str, query: dict[str, str], body: Any) -> Answer:
        self.let_in[_id_in(path)] = body["ssh_key"]
        return self.accepted()

    def on_terminate(self, path: str, query: dict[str, str], body: Any) -> Answer:
        machine = self.machines.get(_id_in(path))
        if machine is None or not machine.bills or machine.is_hidden:
            return GONE
        self.end(machine)
        return self.accepted()

    def on_get(self, path: str, query: dict[str, str], body: Any) -> Answer:
        shown = self.seen(_id_in(path))
        return Answer(200, {"instances": self._instance(shown)}) if shown and shown.bills else GONE

    def on_create(self, path: str, query: dict[str, str], body: Any) -> Answer:
        number = int(re.findall(r"/asks/(\d+)/", path)[0])
        found = [each for each in self.offers if each["id"] == number]
        if not found:
            return Answer(404, {"success": False, "error": "no_such_ask", "msg": "no such offer"})
        self.offers.remove(found[0])  # nobody else can rent it
        price = found[0]["dph_base"] + body["disk"] * found[0]["storage_cost"] / 30 / 24
        key = re.findall(r"echo '([^']+)'", body["onstart"])[0]
        machine = self.make(
            body["label"], price, {**body, "offer": found[0]}, key, str(900000 + next(self.ids))
        )
        if self.take("create", ("error with a machine",)):
            return Answer(
                400, {"success": False, "error": "oops", "new_contract": int(machine.machine_id)}
            )
        return Answer(
            200,
            {
                "success": True,
                "new_contract": int(machine.machine_id),
                "instance_api_key": "scoped-to-the-machine",
            },
        )

    def on_list(self, path: str, query: dict[str, str], body: Any) -> Answer:
        shown = [machine for machine in self.shown() if machine.bills]
        assert query["limit"] == "25", query
        at = int(query.get("after_token", "t0")[1:])
        following = f"t{at + PAGE}" if at + PAGE < len(shown) else None
        return Answer(
            200,
            {
                "instances": [self._instance(m) for m in shown[at : at + PAGE]],
                "next_token": following,
            },
        )

    def _instance(self, machine: FakeMachine) -> dict[str, Any]:
        """null, loading, created, then running; an outbid one is stopped in all three ways."""
        step = 1 if machine.fate == "stuck" else min(machine.looks, 3)
        status = (None, "loading", "created", "running")[step]
        state = "stopped" if machine.fate == "preempted" and machine.looks > 4 else "running"
        host, port, _ = machine.address
        found: dict[str, Any] = {
            "id": int(machine.machine_id),
            "label": machine.name,
            "actual_status": status,
            "cur_state": state,
            "intended_status": state,
            "next_state": state,
            "status_msg": None,
            "dph_total": machine.price_per_hour,
            "gpu_name": machine.asked["offer"]["gpu_name"],
            "image_runtype": "ssh_direc ssh_proxy",
            "public_ipaddr": None,
            "ports": None,
        }
        if machine.fate == "broken":
            found |= {
                "actual_status": "created",
                "status_msg": "Error: OCI runtime create failed: no such device",
            }
        if step == 3 and self.address_form == "direct":
            found |= {
                "public_ipaddr": f" {host}\n",
                "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]},
            }
        elif step == 3:
            jupyter = self.address_form == "jupyter"
            found |= {"ssh_host": host, "ssh_port": port - int(jupyter)}
            found |= {"image_runtype": "jupyter_direc ssh_direc ssh_proxy"} if jupyter else {}
        return found
