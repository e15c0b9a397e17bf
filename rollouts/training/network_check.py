"""Try the way between the hosts of a job before a stage starts on them: all ranks meet, and add up a tensor.

torchrun … -m rollouts.training.network_check --device cpu --report FILE

Rank 0 prints the rate and writes it to FILE. Hosts whose builds of torch or NCCL, or whose NVIDIA drivers, differ end
it with one `error:` line, on every rank.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rollouts.training import distributed
from rollouts.training.nvidia_driver import driver_version

TIMEOUT_S = 120.0
MEASURE_S = 2.0
ELEMENTS = 2**22  # 16 MiB of float32


class NetworkError(RuntimeError):
    """The hosts do not fit each other, or do not reach each other."""


def versions(device: torch.device) -> dict[str, str]:
    """Return what must be the same on all hosts."""
    found = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = driver_version()
    return found


def require_same(found: list[dict[str, Any]]) -> None:
    """Raise NetworkError where hosts have different versions of something; `found` is each rank's {host, versions}."""
    for name in found[0]["versions"]:
        values: dict[str, list[str]] = {}
        for each in found:
            values.setdefault(each["versions"].get(name, "none"), []).append(each["host"])
        if len(values) > 1:
            listed = "; ".join(
                f"{value} on {', '.join(dict.fromkeys(hosts))}" for value, hosts in values.items()
            )
            raise NetworkError(
                f"the hosts have different versions of {name}: {listed}. Install one on all of them."
            )


def measure_rate(device: torch.device) -> dict[str, float]:
    """Return {"gigabytes_per_s", "ranks"}: what each rank sends and receives in an all-reduce of 16 MiB."""
    tensor = torch.ones(ELEMENTS, device=device)
    first_s = _all_reduce_s(tensor)
    ranks = distributed.world_size()
    if tensor[0].item() != ranks or tensor[-1].item() != ranks:
        raise NetworkError(f"an all-reduce of ones over {ranks} ranks gave {tensor[0].item()}")
    first_s = min(first_s, _all_reduce_s(tensor))
    times = distributed.broadcast_object(max(1, min(100, int(MEASURE_S / max(first_s, 1e-4)))))
    each_s = sum(_all_reduce_s(tensor) for _ in range(times)) / times
    sent = 2 * (ranks - 1) / ranks * 4 * ELEMENTS
    return {"gigabytes_per_s": round(sent / each_s / 1e9, 3), "ranks": ranks}


def _all_reduce_s(tensor: torch.Tensor) -> float:
    started = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description="Try the network between the hosts of a job.")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--report", required=True, type=Path, help="where rank 0 writes the rate")
    arguments = parser.parse_args()
    try:
        device = distributed.initialize(arguments.device, timeout_s=TIMEOUT_S)
        require_same(
            distributed.gather_objects({"host": os.uname().nodename, "versions": versions(device)})
        )
        found = measure_rate(device)
        distributed.shutdown()
    except (NetworkError, ValueError, RuntimeError) as error:
        print(
            f"error: network between the hosts: {' '.join(str(error).split())}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    if os.environ.get("RANK") == "0":
        arguments.report.write_text(json.dumps({"doing": "", "parts": found}))
        print(
            f"network between the hosts: {found['gigabytes_per_s']} GB/s over {found['ranks']:.0f} ranks",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a broken communicator may hang where Python takes it apart
    sys.exit(0)
