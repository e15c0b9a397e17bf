"""Speak JSON over HTTP to one engine: connections are kept, waits bounded, errors carry the server's words."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.lowlevel
import httpx

from rollouts.engines.keys import key_for
from rollouts.training.inference.connections import TIMEOUTS, Connections

REQUEST_TIMEOUT_S = 600.0
READY_POLL_S = 0.1


class EngineError(Exception):
    """An engine that cannot be reached, or that refused. The message has its URL, the route and its answer."""


class EngineLost(EngineError):
    """No answer, a broken connection, or a 5xx: the engine failed, so retrying the same request may succeed."""


class WeightSyncError(EngineError):
    """New weights that did not arrive, or that no engine was proven to serve. Its cause may be an EngineLost."""


@dataclass(frozen=True)
class Generation:
    """One sampled continuation: T output ids, and their natural log-probs at the sampling temperature.

    `finish_reason` is "stop" (the stop token is the last id), "length" or "abort" (the ids are those sampled so far).
    """

    output_ids: list[int]
    logprobs: list[float] | None  # None when not asked for
    finish_reason: str
    finish_detail: dict[str, Any]  # as the server sent it: type, and matched, length or message
    weight_version: str  # of the newest weights that sampled one of these tokens
    # [{version, start, end}]: several when weights changed midway
    weight_versions: list[dict[str, Any]]
    text: str | None  # None where the server has no tokenizer
    prompt_tokens: int
    cached_tokens: int


class HTTPClient:
    """Sends requests to one server. It may be used from one event loop after another: each has its own connections.

    `timeout_s` bounds each request as a whole, an answer that drips in byte by byte too.
    """

    ready_route = "/health"

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        api_key: str | None = None,
        admin_key: str | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self._keys = (api_key, admin_key)
        self._connections: Connections | None = None
        self._connections_loop: object = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. The client may be used again; it opens new ones."""
        connections, self._connections = self._connections, None
        if connections is not None and self._connections_loop == anyio.lowlevel.current_token():
            await connections.aclose()

    async def health(self) -> bool:
        """Return whether the engine answers and says it can serve. Never raises for an engine that is down."""
        try:
            return (await self._send("GET", "/health")).status_code == 200
        except EngineError:
            return False

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once the engine is healthy. Raises EngineError after `timeout_s`, with what was last seen."""
        last = "nothing was tried"
        with anyio.move_on_after(timeout_s):
            while True:
                try:
                    response = await self._send("GET", self.ready_route)
                    if response.status_code == 200:
                        return
                    last = f"{self.ready_route} answered {response.status_code}"
                except EngineError as error:
                    last = str(error)
                await anyio.sleep(READY_POLL_S)
        raise EngineError(f"{self.base_url}: not ready after {timeout_s:g} s; last seen: {last}")

    async def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the decoded answer: JSON if it is JSON, else text. Raises EngineError unless the status is 200."""
        response = await self._send(method, path, body)
        if response.status_code != 200:
            kind = EngineLost if response.status_code >= 500 else EngineError
            raise kind(
                f"{self.base_url}{path}: {response.status_code}: {_server_message(response)}"
            )
        try:
            return response.json()
        except ValueError:
            return response.text

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        """Return the answer, whatever its status. Raises EngineLost unless it is there, whole, within `timeout_s`."""
        timeouts = {"timeout": TIMEOUTS}
        try:
            request = httpx.Request(
                method,
                self.base_url + path,
                json=body,
                headers=self._headers(path),
                extensions=timeouts,
            )
            with anyio.fail_after(self.timeout_s):
                async with self._connected().one() as connection:
                    response = await connection.handle_async_request(request)
                    await response.aread()
                    return response
        except TimeoutError as error:
            raise EngineLost(
                f"{self.base_url}{path}: no whole answer within {self.timeout_s:g} s"
            ) from error
        except (httpx.HTTPError, OSError) as error:
            raise EngineLost(
                f"{self.base_url}{path}: {type(error).__name__}: {error or 'no answer'}"
            ) from error

    def _headers(self, path: str) -> dict[str, str]:
        key = key_for(path.partition("?")[0], *self._keys)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _connected(self) -> Connections:
        # connections belong to the event loop they were opened in
        loop = anyio.lowlevel.current_token()
        if self._connections is None or self._connections_loop != loop:
            self._connections = Connections(secure=self.base_url.startswith("https:"))
            self._connections_loop = loop
        return self._connections


def require(ok: bool, message: str) -> None:
    """Raise EngineError with `message` unless `ok`."""
    if not ok:
        raise EngineError(message)


def _server_message(response: httpx.Response) -> str:
    """Return the server's reason: SGLang's {"error": {"message"}} or {"message"}, else the body's beginning."""
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:500] or "(no message)"
    if isinstance(body, dict):
        error = body.get("error")
        message = error.get("message") if isinstance(error, dict) else error or body.get("message")
        if message:
            return str(message)
    return str(body)[:500]
