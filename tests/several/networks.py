"""Hosts in networks of their own: network namespaces on a bridge, each with its own sshd, home and host name."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.remote.hosts import Host, host, wait_for

_numbers = itertools.count()


def require_namespaces() -> None:
    """Skip where hosts of their own cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("several hosts are network namespaces, which need root")
    if shutil.which("ip") is None:
        pytest.skip(
            "several hosts are network namespaces, which need `ip`: apt-get install iproute2"
        )
    probe = subprocess.run(
        ["ip", "netns", "add", (name := f"rp{os.getpid()}")],
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode != 0:
        pytest.skip(
            f"several hosts are network namespaces, which this kernel or container refuses: {probe.stderr}"
        )
    subprocess.run(["ip", "netns", "del", name], check=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Network:
    """A bridge that this machine is on, too, and the namespaces behind it."""

    name: str
    prefix: str  # of its addresses
    namespaces: list[str] = field(default_factory=list)

    def address(self, index: int) -> str:
        return f"{self.prefix}.{index + 1}"

    def add(self) -> str:
        """Add a namespace with an address of the bridge's network; return its name."""
        index = len(self.namespaces)
        space, link = f"{self.name}h{index}", f"{self.name}v{index}"
        ip("netns", "add", space)
        self.namespaces.append(space)
        ip("link", "add", link, "type", "veth", "peer", "name", "lan0", "netns", space)
        ip("link", "set", link, "master", self.name, "up")
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", space, "link", "set", "lan0", "up")
        ip("-n", space, "addr", "add", f"{self.address(index)}/24", "dev", "lan0")
        return space

    def cut(self, index: int) -> None:
        """Take the link down: nothing comes or goes any more, and nobody is told."""
        ip("link", "set", f"{self.name}v{index}", "down")

    def close(self, index: int, port: str) -> None:
        """Have the host's firewall drop what it would send to this port of the others."""
        space = self.namespaces[index]
        ip("-n", space, "rule", "add", "ipproto", "tcp", "dport", port, "blackhole")

    def processes(self, index: int) -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", self.namespaces[index]],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in done.stdout.split()]

    def kill(self, index: int) -> None:
        """End a host as a power cut does: its link is down, and no process of it is left."""
        self.cut(index)
        while pids := self.processes(index):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A bridge with an address of this machine's. All namespaces are gone afterwards, and what ran in them."""
    require_namespaces()
    # two processes that run tests have different networks, as have two tests of one
    pid = os.getpid()
    made = Network(
        f"rn{pid % 100_000:05}{next(_numbers) % 100}", f"10.{64 + pid // 250 % 128}.{pid % 250 + 1}"
    )
    ip("link", "add", made.name, "type", "bridge")
    try:
        ip("addr", "add", f"{made.prefix}.254/24", "dev", made.name)
        ip("link", "set", made.name, "up")
        yield made
    finally:
        for index, space in enumerate(made.namespaces):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                made.kill(index)
            # the namespace goes some time after its last process
            ip("link", "del", f"{made.name}v{index}")
            ip("netns", "del", space)
        ip("link", "del", made.name)


@contextlib.contextmanager
def networked_host(
    made: Network,
    directory: Path,
    key: Path,
    *,
    path: Path,
    environment: dict[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Host]:
    """A host in a new namespace of the network, with a host name of its own."""
    index = len(made.namespaces)
    space = made.add()
    renamed = ("unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', f"node{index}")
    inside = ("ip", "netns", "exec", space, *renamed)
    wait_for(lambda: _has_address(space, made.address(index)), "the namespace's address")
    with host(
        directory,
        key,
        path=path,
        environment=environment,
        address=made.address(index),
        wrapper=inside,
        port=port,
    ) as started:
        yield started


def _has_address(space: str, address: str) -> bool:
    shown = subprocess.run(
        ["ip", "-n", space, "addr"], capture_output=True, text=True, check=False
    ).stdout
    return address in shown
