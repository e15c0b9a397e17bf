"""Keep connections to one server open between requests: a request costs the same, however many run beside it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx

CONNECT_TIMEOUT_S = 10.0
KEEP_IDLE_S = 300.0  # an idle connection that is older is not used again
IDLE_MAX = 512  # connections that are kept open without a request

# of a request: only connecting has a limit here
TIMEOUTS = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S).as_dict()


class Connections:
    """Lend connections to one server, within one event loop, to one request each.

    A pool of httpx looks at all its connections several times a request: with 128 of them, 13 ms of CPU each time.
    So every connection here is an httpx pool of one, and the idle ones are kept on a stack.
    """

    def __init__(self, *, secure: bool) -> None:
        """Read the certificate store, which takes 20 ms, if `secure`: for https."""
        self._verify = httpx.create_ssl_context(trust_env=False) if secure else False
        self._idle: list[httpx.AsyncHTTPTransport] = []  # the one used last is used next
        self._closed = False

    @asynccontextmanager
    async def one(self) -> AsyncIterator[httpx.AsyncHTTPTransport]:
        """Lend a connection for one request. It is closed if that fails, else kept for another."""
        connection = self._idle.pop() if self._idle else self._new()
        kept = False
        try:
            yield connection
            kept = not self._closed and len(self._idle) < IDLE_MAX
        finally:
            if kept:
                self._idle.append(connection)
            else:
                with anyio.CancelScope(shield=True):
                    await connection.aclose()

    def _new(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(
            max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEP_IDLE_S
        )
        return httpx.AsyncHTTPTransport(verify=self._verify, trust_env=False, limits=limits)

    async def aclose(self) -> None:
        """Close the idle connections. One that is in use is closed once its answer is there."""
        self._closed = True
        while self._idle:
            await self._idle.pop().aclose()
