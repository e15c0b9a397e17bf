"""Serve the page on this machine alone, until Ctrl-C."""

import contextlib
import errno
import secrets
import signal
import socket
from collections.abc import Callable
from types import FrameType

from rollouts.view.ui.access import TOKEN, Access
from rollouts.view.ui.desk import Desk

LOOPBACK = "127.0.0.1"
PORT = 8090  # the first that is tried
PORTS_TRIED = 20
END_S = 2  # for requests that are being answered, at the end


class PortInUseError(OSError):
    """No port could be had. The message names those that were tried."""


def listen(port: int | None) -> socket.socket:
    """Return a socket on loopback at `port`, or at the first free one from PORT on. Raises PortInUseError."""
    tried = range(PORT, PORT + PORTS_TRIED) if port is None else [port]
    for number in tried:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, number))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            if port is not None or error.errno != errno.EADDRINUSE:
                raise PortInUseError(error.errno, f"port {number}: {error.strerror}") from None
    raise PortInUseError(errno.EADDRINUSE, f"ports {PORT} to {PORT + PORTS_TRIED - 1} are in use")


def serve(desk: Desk, listener: socket.socket, tell: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `tell` is given the link, which works from then on."""
    import uvicorn

    from rollouts.view.ui.addresses import make_app

    port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
    config = uvicorn.Config(
        Access(make_app(desk), token=token, port=port),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=END_S,
        ws="none",
    )
    server = uvicorn.Server(config)
    desk.is_ending = lambda: server.should_exit
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            desk.warm()
            tell(f"http://{LOOPBACK}:{port}/?{TOKEN}={token}")
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
        desk.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
