"""An engine's side of a broadcast, in a process of its own: JSON lines on stdin, one answer each on stdout.

{"join": {address, port, rank, world, name, backend, device}} makes the group as SGLang's init_custom_process_group
does, and {"receive": bytes} takes part in a broadcast: {"sum"} of what came.
"""

import datetime
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

TIMEOUT = datetime.timedelta(seconds=60)


def join(
    *, address: str, port: int, rank: int, world: int, name: str, backend: str, device: str
) -> tuple[dist.ProcessGroup, torch.device]:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    store = PrefixStore(name, dist.TCPStore(address, port, world, False, timeout=TIMEOUT))
    group, _ = _new_process_group_helper(
        world, rank, [], Backend(backend), store, group_name=GroupName(name), timeout=TIMEOUT
    )
    _world.pg_group_ranks[group] = {index: index for index in range(world)}
    return group, where


def main() -> None:
    joined: tuple[dist.ProcessGroup, torch.device] | None = None
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if "join" in asked:
            joined = join(**asked["join"])
            answer: dict[str, Any] = {}
        else:
            assert joined is not None
            flat = torch.zeros(asked["receive"], dtype=torch.uint8, device=joined[1])
            dist.broadcast(flat, 0, group=joined[0])
            answer = {"sum": int(flat.sum().item())}
        print(json.dumps(answer), flush=True)


main()
