"""Connections to one server, kept open between requests: a request costs the same, however many run beside it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx

CONNECT_TIMEOUT_S = 10.0
KEEP_IDLE_S = 300.0  # an idle connection that is older is not used again
IDLE_MAX = 512  # connections that are kept open without a request

_TIMEOUTS = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S).as_dict()


class Connections:
    """Sends requests to one server, from one event loop, each over a connection of its own.

    A pool of httpx looks at all of its connections several times a request: with 128 of them, 13 ms of CPU each time.
    So every connection here is a pool of one, and those that are idle lie on a stack.
    """

    def __init__(self, *, secure: bool) -> None:
        """`secure`: for https. Without, no certificate store is read, which takes 20 ms."""
        self._verify = httpx.create_ssl_context(trust_env=False) if secure else False
        self._idle: list[httpx.AsyncHTTPTransport] = []  # the one used last is used next
        self._closed = False

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Return the answer, read whole. Raises httpx.HTTPError; only connecting has a time limit."""
        request.extensions["timeout"] = _TIMEOUTS
        async with self._connection() as connection:
            response = await connection.handle_async_request(request)
            await response.aread()
            return response

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[httpx.AsyncHTTPTransport]:
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
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEP_IDLE_S)
        return httpx.AsyncHTTPTransport(verify=self._verify, trust_env=False, limits=limits)

    async def aclose(self) -> None:
        """Close the idle connections. One that is in use is closed once its answer is there."""
        self._closed = True
        while self._idle:
            await self._idle.pop().aclose()
