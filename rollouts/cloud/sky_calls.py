"""Calls of SkyPilot's Python interface, in a process of their own: it is slow to import, and prints as it likes.

    python -m rollouts.cloud.sky_calls < {"call": NAME, …}

One line of JSON goes to where stdout was: {"answer": …}, or {"error": the exception's class, "said": its text}. The
calls and their fields are those of SkyPilot 0.14.1's sources.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Asked = Mapping[str, Any]
BEHIND_A_PROXY = ("kubernetes", "slurm", "ssh")  # SSH goes through SkyPilot's server there


def offers(sky: Any, asked: Asked) -> list[dict[str, Any]]:
    """Return what the enabled clouds have with so many GPUs, a row for each instance type and region."""
    sdk = importlib.import_module("sky.client.sdk")
    enabled = [cloud.lower() for cloud in sky.get(sdk.enabled_clouds())]
    found = sky.list_accelerators(
        gpus_only=True,
        quantity_filter=asked["gpus"],
        clouds=[cloud for cloud in enabled if cloud not in BEHIND_A_PROXY],
        all_regions=True,
        case_sensitive=False,
    )
    names = ("cloud", "instance_type", "accelerator_name", "accelerator_count", "device_memory")
    more = ("price", "spot_price", "region")
    return [
        {name: _plain(getattr(row, name)) for name in (*names, *more)}
        for rows in found.values()
        for row in rows
    ]


def create(sky: Any, asked: Asked) -> None:
    """Launch a cluster of one machine, which has nothing to do; return once it is up."""
    task = sky.Task(name=asked["name"], num_nodes=1)
    task.set_resources(
        sky.Resources(
            infra=asked["infra"],
            instance_type=asked["instance_type"],
            accelerators={asked["gpu"]: asked["gpus"]},
            use_spot=asked["spot"],
            disk_size=asked["disk_gib"],
        )
    )
    sky.get(sky.launch(task, cluster_name=asked["name"]))


def clusters(sky: Any, asked: Asked) -> list[dict[str, Any]]:
    """Return the clusters of this user, or those of a name, as their clouds tell of them now."""
    mode = sky.StatusRefreshMode.FORCE
    names = asked["names"] or None
    records = sky.get(sky.status(names, refresh=mode, _include_credentials=True))
    return [_cluster(record) for record in records]


def _cluster(record: Any) -> dict[str, Any]:
    handle, login = record["handle"], record["credentials"] or {}
    known = {"name": record["name"], "status": record["status"].value}
    if handle is None:
        return known
    resources = handle.launched_resources
    hosts, ports = handle.cached_external_ips, handle.cached_external_ssh_ports
    return known | {
        "host": hosts[0] if hosts else None,
        "port": ports[0] if ports else None,
        "user": handle.ssh_user or login.get("ssh_user"),
        "key": login.get("ssh_private_key_content"),
        "proxy": login.get("ssh_proxy_command"),
        "price": _plain(resources.get_cost(3600)),
        "gpu": next(iter(resources.accelerators or {}), ""),
        "region": f"{resources.cloud}/{resources.region}".lower(),
    }


def terminate(sky: Any, asked: Asked) -> None:
    """End a cluster; return once its cloud did so."""
    sky.get(sky.down(asked["name"]))


def _plain(value: object) -> object:
    """Return a value as JSON has it; a price that is not a number, of what is not sold so, is none."""
    return None if isinstance(value, float) and math.isnan(value) else value


CALLS: Mapping[str, Callable[[Any, Asked], Any]] = {
    "offers": offers,
    "create": create,
    "clusters": clusters,
    "terminate": terminate,
}


def main() -> None:
    """Read a call, make it, and write its answer."""
    mouth = os.dup(1)
    os.dup2(2, 1)  # what SkyPilot prints is no answer
    asked = json.loads(sys.stdin.read())
    try:
        sky = importlib.import_module("sky")
        said: dict[str, Any] = {"answer": CALLS[asked["call"]](sky, asked)}
    except Exception as error:
        said = {"error": type(error).__name__, "said": str(error)[-2000:]}
    with os.fdopen(mouth, "w") as stream:
        stream.write(f"{json.dumps(said)}\n")


if __name__ == "__main__":
    main()
