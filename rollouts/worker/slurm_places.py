"""Where the nodes of a job of Slurm's meet: each tells the others by a file in the run's directory, which they share.

Addresses and free ports are known when the job starts, on the nodes alone. The plan has stand-ins for them.
Standard library only.
"""

import contextlib
import fcntl
import ipaddress
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from typing import Any

from rollouts import run_dir
from rollouts.plain_files import read_plain
from rollouts.run_dir import RunDir

WAIT_S = 180.0  # from the first node's start to the last one's, and for a shared disk to show their files
POLL_S = 0.1
ANSWER_S = 20.0
SIOCGIFADDR = 0x8915  # netdevice(7)
Values = dict[str, str]  # stand-in -> what the plan gets in its place


class PlaceError(Exception):
    """The nodes of the job cannot meet. The message is for the user."""


def name_of(environment: dict[str, str]) -> str:
    """Return this node's name, as Slurm has it."""
    return environment.get("SLURMD_NODENAME") or os.uname().nodename


def tell(
    run: RunDir, rank: int, attempt: str, name: str, values: Values, *, error: str = ""
) -> None:
    """Write what the other nodes need of this one; `run` is the first one's, `error` why this one cannot start."""
    run.node(rank).parent.mkdir(mode=0o700, exist_ok=True)
    place = {"attempt": attempt, "name": name, "values": values, "error": error}
    run_dir.write_json_atomic(run.node(rank), place)


def hear(run: RunDir, count: int, attempt: str) -> tuple[list[str], Values]:
    """Return the names of all nodes, and what they told. Raises PlaceError for one that cannot start, or is not heard
    of."""
    deadline = time.monotonic() + WAIT_S
    while True:
        os.listdir(run.node(0).parent)  # has a shared disk look for new files
        places = [_read(run, rank, attempt) for rank in range(count)]
        if errors := [f"{place['name']}: {place['error']}" for place in places if place["error"]]:
            raise PlaceError("; ".join(errors))
        silent = [rank for rank, place in enumerate(places) if not place["name"]]
        if not silent:
            return [place["name"] for place in places], {
                name: value for place in places for name, value in place["values"].items()
            }
        if time.monotonic() > deadline:
            raise PlaceError(
                f"node {', '.join(map(str, silent))} of the job did not say within {WAIT_S:g} s where it is:"
                f" all start, or none. Does it see {run.path}? logs/slurm.log has what it printed."
            )
        time.sleep(POLL_S)


def _read(run: RunDir, rank: int, attempt: str) -> dict[str, Any]:
    """Return what a node told for this start of the job; without a name where it did not yet."""
    with contextlib.suppress(OSError, ValueError):  # not yet, or of an earlier start
        found = json.loads(read_plain(run.node(rank)))
        if found["attempt"] == attempt:
            return dict(found)
    return {"name": "", "values": {}, "error": ""}


def own_place(environment: dict[str, str], rank: int) -> tuple[str, str]:
    """Return (address, interface) by which this node reaches the first one; of the first, the second. Raises
    PlaceError."""
    names = _ask("scontrol", "show", "hostnames", environment.get("SLURM_JOB_NODELIST", "")).split()
    peer = names[1 if rank == 0 else 0]
    found = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "show", "node", peer))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((found[1] if found else peer, 9))
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise PlaceError(
            f"{os.uname().nodename} has no way to the node {peer} over IPv4: {error}"
        ) from None
    return address, _interface(address)


def is_public(address: str) -> bool:
    return ipaddress.ip_address(address).is_global


def _interface(address: str) -> str:
    for _, name in socket.if_nameindex():
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
            contextlib.suppress(OSError),
        ):
            packed = struct.pack("256s", name.encode()[:15])
            answer = fcntl.ioctl(asking.fileno(), SIOCGIFADDR, packed)
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise PlaceError(f"no network interface of {os.uname().nodename} has the address {address}.")


def _ask(*command: str) -> str:
    """Return what one of Slurm's programs prints. Raises PlaceError."""
    program = shutil.which(command[0])
    if program is None:
        raise PlaceError(
            f"{os.uname().nodename} has no {command[0]} on its PATH, which a job on several nodes asks for"
            " their names."
        )
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise PlaceError(f"{' '.join(command)}: {said.strip()}") from None
    return done.stdout
