"""A network between a laptop and a host: a TCP proxy that delays, cuts, swallows and counts."""

import contextlib
import queue
import random
import socket
import threading
import time
from collections.abc import Iterator

BUFFER_BYTES = 64 * 1024  # of the sockets here, so that little is under way when the link is cut
CHUNKS_MAX = 4096  # that are on their way: at 64 KiB more than any delay here fills
RELAYED_BYTES = 64 * 1024
RESENT_S = 0.25  # a lost packet holds up all behind it, until TCP sends it again: 200 ms at least


class Link:
    """Forwards connections on `port` to `upstream`, each byte `delay_s` later.

    `down_bytes` and `up_bytes` count what was handed to the laptop and to the host. `cut_at` are values of `down_bytes`
    at which every connection is closed. The link goes down at `held_at`, one of `down_bytes`, and at `down_at`, one of
    `up_bytes`. While `is_down`, nothing passes, and nobody is told. `loss` of what is relayed comes RESENT_S later
    still, and all behind it.
    """

    def __init__(self, upstream: int, *, delay_s: float = 0.0, loss: float = 0.0) -> None:
        self.upstream, self.delay_s, self.loss = upstream, delay_s, loss
        self._rng = random.Random(0)
        self.down_bytes = self.up_bytes = self.cuts = 0
        self.cut_at: list[int] = []
        self.down_at: int | None = None
        self.held_at: int | None = None
        self._passes = threading.Event()
        self._passes.set()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def is_down(self) -> bool:
        return not self._passes.is_set()

    def set_down(self, down: bool) -> None:
        if down:
            self._passes.clear()
        else:
            self._passes.set()

    def cut(self) -> None:
        """Close every connection, on both sides; new ones pass."""
        with self._lock:
            ended, self._open = self._open, set()
            self.cuts += 1
        for end in ended:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self._passes.set()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                try:
                    host = socket.create_connection(("127.0.0.1", self.upstream))
                except OSError:
                    client.close()
                    continue
                for end in (client, host):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
                with self._lock:
                    self._open |= {client, host}
                for source, sink, down in ((host, client, True), (client, host, False)):
                    way: queue.Queue[tuple[float, bytes]] = queue.Queue(CHUNKS_MAX)
                    threading.Thread(target=self._take, args=(source, way), daemon=True).start()
                    threading.Thread(target=self._give, args=(sink, way, down), daemon=True).start()

    def _take(self, source: socket.socket, way: "queue.Queue[tuple[float, bytes]]") -> None:
        data = b"x"
        while data:
            try:
                data = source.recv(RELAYED_BYTES)
            except OSError:
                data = b""
            way.put((time.monotonic() + self.delay_s, data))

    def _give(
        self, sink: socket.socket, way: "queue.Queue[tuple[float, bytes]]", down: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                time.sleep(RESENT_S if self._rng.random() < self.loss else 0.0)
                self._passes.wait()
                if not data:
                    break
                sink.sendall(data)
                self._count(len(data), down)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        while way.get()[1]:  # so that the one who takes never waits for room
            pass

    def _count(self, size: int, down: bool) -> None:
        with self._lock:
            if not down:
                self.up_bytes += size
                if self.down_at is not None and self.up_bytes >= self.down_at:
                    self.down_at = None
                    self._passes.clear()
                return
            self.down_bytes += size
            if self.held_at is not None and self.down_bytes >= self.held_at:
                self.held_at = None
                self._passes.clear()
            due = bool(self.cut_at) and self.down_bytes >= self.cut_at[0]
            if due:
                self.cut_at.pop(0)
        if due:
            self.cut()


@contextlib.contextmanager
def link(upstream: int, *, delay_s: float = 0.0, loss: float = 0.0) -> Iterator[Link]:
    made = Link(upstream, delay_s=delay_s, loss=loss)
    try:
        yield made
    finally:
        made.close()
