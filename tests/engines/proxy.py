"""A TCP proxy that does to an engine's answers what networks and dying servers do: a real socket on either side."""

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\nConnection: close\r\n\r\nsick"
)
RESET_NOW = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class Proxy:
    """Forwards `url` to the engine at `upstream`. `faults` holds, for the next requests to `path`, one each:

    "reset": the connection is reset once the engine works on it; "cut": half of the answer, then a reset; "503": the
    proxy's own answer; "drip": the answer at a byte every 50 ms; a callable: it is called, then the request passes.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = ("127.0.0.1", int(upstream.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.path = "/generate"
        self.faults: deque[str | Callable[[], Any]] = deque()
        self.requests: list[str] = []  # paths, in order
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One connection: request by request, each read whole."""
        # whoever went away: that is what the tests look at
        with client, contextlib.suppress(OSError):
            while request := read_message(client):
                path = request.split(b" ", 2)[1].decode().partition("?")[0]
                self.requests.append(path)
                fault = self.faults.popleft() if self.faults and path == self.path else None
                if callable(fault):
                    fault()
                if not self._answer(client, request, fault):
                    return

    def _answer(self, client: socket.socket, request: bytes, fault: Any) -> bool:
        """Whether the connection goes on."""
        if fault == "503":
            client.sendall(UNAVAILABLE)
            return False
        try:
            with socket.create_connection(self._upstream) as engine:
                engine.sendall(request)
                if fault == "reset":
                    time.sleep(0.05)
                    return self._reset(client)
                answer = read_message(engine)
        except OSError:
            return self._reset(client)
        if not answer:
            return self._reset(client)
        if fault == "cut":
            client.sendall(answer[: len(answer) // 2])
            return self._reset(client)
        if fault == "drip":
            for index in range(len(answer)):
                client.sendall(answer[index : index + 1])
                time.sleep(0.05)
        client.sendall(answer)
        return True

    def _reset(self, client: socket.socket) -> bool:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_NOW)
        return False


def read_message(source: socket.socket) -> bytes:
    """One HTTP message with its body, of Content-Length; b"" at the connection's end."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = source.recv(1 << 16)
        if not chunk:
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [
        line.split(b":")[1]
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    ]
    missing = (int(lengths[0]) if lengths else 0) - len(body)
    while missing > 0:
        chunk = source.recv(min(missing, 1 << 16))
        if not chunk:
            return b""
        data += chunk
        missing -= len(chunk)
    return data


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    made = Proxy(upstream)
    try:
        yield made
    finally:
        made.close()
