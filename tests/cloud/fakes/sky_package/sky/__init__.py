"""SkyPilot's Python interface, as far as it is called: after the sources of SkyPilot 0.14.1.

$FAKE_SKY is a directory: `clusters.json` is what bills, `fault` the exception that the next launch raises, `ssh.json`
where a cluster's SSH answers.
"""

import enum
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

print("SkyPilot prints what it likes")


class StatusRefreshMode(enum.Enum):
    NONE = "NONE"
    AUTO = "AUTO"
    FORCE = "FORCE"


class ClusterStatus(enum.Enum):
    INIT = "INIT"
    UP = "UP"
    STOPPED = "STOPPED"


class InstanceTypeInfo(NamedTuple):
    cloud: str
    instance_type: str | None
    accelerator_name: str
    accelerator_count: float
    cpu_count: float | None
    device_memory: float | None
    memory: float | None
    price: float
    spot_price: float
    region: str


class ResourcesUnavailableError(Exception):
    pass


class ClusterDoesNotExist(ValueError):
    pass


CATALOG = [
    InstanceTypeInfo("AWS", "p5.4xlarge", "H100", 1, 16, 80.0, 256, 6.88, 2.5, "us-east-1"),
    InstanceTypeInfo("GCP", "a3-high-1", "H100", 1, 26, 80.0, 234, 2.4, float("nan"), "us-east4"),
    InstanceTypeInfo("AWS", "g5.xlarge", "A10G", 1, 4, 24.0, 16, 1.006, 0.4, "us-east-1"),
    InstanceTypeInfo("AWS", "p5.48xlarge", "H100", 8, 192, 80.0, 2048, 55.04, 20.0, "us-east-1"),
]


def _read(name: str) -> Any:
    return json.loads((Path(os.environ["FAKE_SKY"]) / name).read_text())


def _write(clusters: dict[str, Any]) -> None:
    (Path(os.environ["FAKE_SKY"]) / "clusters.json").write_text(json.dumps(clusters))


def list_accelerators(
    *,
    gpus_only: bool = True,
    name_filter: str | None = None,
    region_filter: str | None = None,
    quantity_filter: int | None = None,
    clouds: list[str] | str | None = None,
    all_regions: bool = False,
    require_price: bool = True,
    case_sensitive: bool = True,
) -> dict[str, list[InstanceTypeInfo]]:
    found: dict[str, list[InstanceTypeInfo]] = {}
    for row in CATALOG:
        if row.cloud.lower() in (clouds or []) and quantity_filter in (None, row.accelerator_count):
            found.setdefault(row.accelerator_name, []).append(row)
    return found


class Resources:
    def __init__(
        self,
        infra: str | None = None,
        instance_type: str | None = None,
        accelerators: dict[str, int] | None = None,
        use_spot: bool | None = None,
        disk_size: int | None = None,
    ) -> None:
        self.cloud, self.region = (infra or "").split("/")
        self.accelerators, self.instance_type = accelerators, instance_type
        self.use_spot, self.disk_size = use_spot, disk_size

    def get_cost(self, seconds: float) -> float:
        (row,) = [one for one in CATALOG if one.instance_type == self.instance_type]
        return (row.spot_price if self.use_spot else row.price) * seconds / 3600


class Task:
    def __init__(self, name: str | None = None, *, num_nodes: int | None = None) -> None:
        assert num_nodes == 1
        self.name = name

    def set_resources(self, resources: Resources) -> "Task":
        self.resources = resources
        return self


def launch(task: Task, cluster_name: str | None = None) -> Any:
    def request() -> Any:
        fault = Path(os.environ["FAKE_SKY"]) / "fault"
        words = fault.read_text().split() if fault.exists() else []
        fault.unlink(missing_ok=True)
        made = vars(task.resources)
        if "left" not in words and words:
            raise _error(words[0])
        _write(
            _read("clusters.json") | {cluster_name: {**made, "status": "INIT" if words else "UP"}}
        )
        if words:
            raise _error(words[0])
        return None, None

    return request


def _error(name: str) -> Exception:
    known = {"ResourcesUnavailableError": ResourcesUnavailableError}
    return known.get(name, RuntimeError)("Failed to provision on AWS us-east-1")


def status(
    cluster_names: list[str] | None = None,
    refresh: StatusRefreshMode = StatusRefreshMode.NONE,
    all_users: bool = False,
    *,
    _include_credentials: bool = False,
) -> Any:
    assert refresh is StatusRefreshMode.FORCE, "else it is as old as the last look"

    def record(name: str, made: dict[str, Any]) -> dict[str, Any]:
        ssh = _read("ssh.json")
        resources = Resources(infra=f"{made['cloud']}/{made['region']}")
        resources.__dict__.update(made)
        handle = SimpleNamespace(
            launched_resources=resources,
            cached_external_ips=[ssh["host"]],
            cached_external_ssh_ports=[ssh["port"]],
            ssh_user=None,
        )
        credentials = {
            "ssh_user": ssh["user"],
            "ssh_private_key": "~/.sky/clients/key",
            "ssh_control_name": name,
            "ssh_proxy_command": ssh.get("proxy"),
            "ssh_private_key_content": ssh["key"],
        }
        row = {"name": name, "status": ClusterStatus(made["status"]), "handle": handle}
        return row | {"credentials": credentials if _include_credentials else None}

    def request() -> list[dict[str, Any]]:
        found = _read("clusters.json").items()
        return [record(n, made) for n, made in found if cluster_names is None or n in cluster_names]

    return request


def down(cluster_name: str, purge: bool = False) -> Any:
    def request() -> None:
        clusters = _read("clusters.json")
        if cluster_name not in clusters:
            raise ClusterDoesNotExist(f"Cluster {cluster_name!r} does not exist.")
        del clusters[cluster_name]
        _write(clusters)

    return request


def get(request_id: Any) -> Any:
    return request_id()
