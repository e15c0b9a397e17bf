"""Authenticated lines between two supervisors: a handshake by the group key, then JSON with a code each.

`<HMAC-SHA256 in hexadecimal> <JSON>\\n`; the code covers both sides' random numbers, the direction and the line's
number, so no line of another connection, direction or place in line passes. Standard library only.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Collection
from typing import Any

LINE_BYTES_MAX = 1 << 16
HANDSHAKE_S = 10.0
ACCEPT_S = 1.0


class PeerError(Exception):
    """The other side is not a supervisor of this run, or sent what is not valid."""


class PeerLine:
    """One proven connection. Sending and receiving may be done by a thread each."""

    def __init__(self, connection: socket.socket, key: bytes, *, leads: bool) -> None:
        self.closed = False
        self._connection, self._key = connection, key
        self._out, self._in = (b"leader", b"member") if leads else (b"member", b"leader")
        self._nonces = b""
        self._sent, self._received = 0, 0
        self._buffer = b""
        self._sending = threading.Lock()

    def prove(self, own: str, theirs: str) -> None:
        """Bind all later lines to both sides' random numbers, the leader's first."""
        self._nonces = f"{own} {theirs}".encode()

    def send(self, row: dict[str, Any]) -> None:
        """Send a line. Raises OSError."""
        text = json.dumps(row).encode()
        with self._sending:
            code = self._code(self._out, self._sent, text)
            self._sent += 1
            self._connection.sendall(code + b" " + text + b"\n")

    def receive(self, *, timeout_s: float) -> dict[str, Any]:
        """Return the next line. Raises OSError (TimeoutError too) or PeerError."""
        code, _, text = self.receive_plain(timeout_s=timeout_s).partition(b" ")
        expected = self._code(self._in, self._received, text)
        self._received += 1
        if not hmac.compare_digest(code, expected):
            raise PeerError("a line without the run's key")
        row = json.loads(text)  # its sender has the key, and made it with json.dumps
        if not isinstance(row, dict):
            raise PeerError("a line that is not an object")
        return row

    def send_plain(self, text: str) -> None:
        self._connection.sendall(text.encode() + b"\n")

    def receive_plain(self, *, timeout_s: float) -> bytes:
        """Return a line without its end. Raises OSError, or PeerError for one that is too long or cut off."""
        self._connection.settimeout(timeout_s)
        while b"\n" not in self._buffer:
            data = self._connection.recv(4096)
            if not data or len(self._buffer) > LINE_BYTES_MAX:
                raise PeerError("the connection ended" if not data else "a line without an end")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that receives
        self._connection.close()

    def _code(self, side: bytes, number: int, text: bytes) -> bytes:
        said = b"\0".join([side, self._nonces, str(number).encode(), text])
        return hmac.new(self._key, said, hashlib.sha256).hexdigest().encode()


def listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens at this address alone."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, port), family=family)
    listening.settimeout(ACCEPT_S)
    return listening


def accept(listening: socket.socket) -> socket.socket | None:
    """Return the next connection, of whomever; None for none just now."""
    try:
        return listening.accept()[0]
    except OSError:  # none came within ACCEPT_S, or it left again
        return None


def welcome_peer(
    connection: socket.socket, key: bytes, *, ranks: Collection[int]
) -> tuple[int, PeerLine] | None:
    """Return the rank and channel of a host that proves that it has the key; None, and closed, for anyone else."""
    channel = PeerLine(connection, key, leads=True)
    try:
        own = secrets.token_hex(16)
        channel.send_plain(own)
        theirs = channel.receive_plain(timeout_s=HANDSHAKE_S).decode("ascii")
        channel.prove(own, theirs)
        channel.send({"leader": True})
        rank = channel.receive(timeout_s=HANDSHAKE_S).get("rank")
        if not isinstance(rank, int) or rank not in ranks:
            raise PeerError(f"rank {rank!r}")
    except (OSError, PeerError, UnicodeError):
        channel.close()
        return None
    return rank, channel


def call_leader(address: str, port: int, key: bytes, *, rank: int) -> PeerLine:
    """Connect to host 0 and prove who this is. Raises OSError or PeerError."""
    channel = PeerLine(
        socket.create_connection((address, port), timeout=HANDSHAKE_S), key, leads=False
    )
    try:
        theirs = channel.receive_plain(timeout_s=HANDSHAKE_S).decode("ascii", errors="replace")
        own = secrets.token_hex(16)
        channel.send_plain(own)
        channel.prove(theirs, own)
        channel.receive(timeout_s=HANDSHAKE_S)
        channel.send({"rank": rank})
    except (OSError, PeerError):
        channel.close()
        raise
    return channel
