"""A socket to a machine: over TCP, a jump host's channel, or a ProxyCommand."""

import contextlib
import os
import socket
import subprocess
import tempfile

import paramiko

from rollouts.remote.host.ssh_config import Hop
from rollouts.remote.host.ssh_errors import ProxyEnded

FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}


def open_tcp(hop: Hop) -> socket.socket:
    """Connect, trying every address. Raises OSError: the first address's, since that one is meant."""
    family = FAMILIES.get(hop.values.get("addressfamily", ""), socket.AF_UNSPEC)
    source = hop.values.get("bindaddress")
    first_error: OSError | None = None
    for kind, _, _, _, address in socket.getaddrinfo(
        hop.host, hop.port, family, socket.SOCK_STREAM
    ):
        made = socket.socket(kind, socket.SOCK_STREAM)
        try:
            made.settimeout(hop.connect_timeout_s)
            if source:
                made.bind((source, 0))
            made.connect(address)
            return made
        except OSError as error:
            made.close()
            first_error = first_error or error
    assert first_error is not None  # getaddrinfo returns an address or raises
    raise first_error


def open_through(transport: paramiko.Transport, hop: Hop) -> paramiko.Channel:
    """Ask a jump host for a connection to the next one. Raises ChannelException with its reason."""
    return transport.open_channel(
        "direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), timeout=hop.connect_timeout_s
    )


class Proxy:
    """A ProxyCommand, run by the user's shell as ssh does; its input and output are `socket`."""

    def __init__(self, command: str) -> None:
        self.socket, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the proxy)
        self._process = subprocess.Popen(
            [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C is for us
        )
        theirs.close()

    def ended(self) -> ProxyEnded | None:
        """Say how it ended; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.5)
        code = self._process.poll()
        if code is None:
            return None
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").strip()[-500:]
        return ProxyEnded(f"exit code {code}" + (f": {words}" if words else ", no message"))

    def close(self) -> None:
        self.socket.close()
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.2)  # most end with their input
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._stderr.close()
