"""One provider's HTTP interface: a call with its retries, and an error that says what is known afterwards.

A read, or a request to end a machine, may be made again; it is, until its deadline. A create is made once.
"""

import contextlib
import functools
import hashlib
import json as json_text
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx

from rollouts.cloud.answer_fields import row, text
from rollouts.cloud.cloud_errors import CloudError
from rollouts.cloud.machine_types import ProviderName
from rollouts.cloud.provider_keys import ProviderKey

URLS: Mapping[ProviderName, str] = {
    "runpod": "https://api.runpod.io/v2",
    "vast": "https://console.vast.ai",
    "lambda": "https://cloud.lambda.ai/api/v1",
    "prime": "https://api.primeintellect.ai/api/v1",
}
CREATE_TIMEOUT_S = 60.0
READ_TIMEOUT_S = 20.0
RETRY_FOR_S = 45.0  # reads and ends, from the first try
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
SAID_CHARS_MAX = 600
PAGES_MAX = 200  # of a list; more: a provider whose cursor leads in a circle
REFUSED, NOT_FOUND, TIMED_OUT, OVERLOADED, SERVER_ERROR = 400, 404, 408, 429, 500
NO_INSTANCE = "no_such_instance"  # Vast's word, with whatever status


@dataclass(frozen=True)
class HttpReply:
    """An HTTP answer that came whole, without any key. `body` is None where it is not JSON."""

    status: int
    body: Any
    said: str  # its text, cut
    retry_after_s: float | None


class ProviderApi:
    """Calls to one provider with one key. `gap_s` is the least time between two calls.

    `url` is another address of the provider than the one that `base_url` finds.
    """

    def __init__(
        self,
        provider: ProviderName,
        key: ProviderKey,
        *,
        gap_s: float = 0.0,
        url: str | None = None,
    ) -> None:
        self.provider = provider
        self.base_url = url or base_url(provider)
        self._key = key
        self._gap_s = gap_s
        self._next_at = 0.0
        headers = {"Authorization": f"Bearer {key.secret}", "User-Agent": "rollouts"}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=READ_TIMEOUT_S,
            follow_redirects=False,  # the key goes nowhere else
            verify=_certificates(),
            # a proxy, where the way leads out of this machine
            trust_env=self.base_url.startswith("https:"),
        )

    @property
    def team(self) -> str | None:
        """Return the team that pays, where the provider has teams."""
        return self._key.team

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def read(
        self, path: str, *, method: str = "GET", json: object = None, **params: object
    ) -> Any:
        """Return the JSON that a call answers which changes nothing, tried again where that may help."""
        reply = await self.repeat(method, path, json=json, params=params)
        return self.checked(reply, f"{method} {path}").body

    async def repeat(
        self, method: str, path: str, *, json: object = None, params: Mapping[str, object] = {}
    ) -> HttpReply:
        """Return the answer to a call that may be made twice. Raises CloudError where none came in time."""
        deadline, wait_s = time.monotonic() + RETRY_FOR_S, FIRST_WAIT_S
        while True:
            try:
                reply = await self._once(
                    method, path, json=json, params=params, timeout_s=READ_TIMEOUT_S
                )
                if reply.status != OVERLOADED and reply.status < SERVER_ERROR:
                    return reply
                problem: HttpReply | str = reply
                pause_s = wait_s if reply.retry_after_s is None else reply.retry_after_s
            except httpx.HTTPError as error:
                problem, pause_s = _words(error), wait_s
            if time.monotonic() + pause_s > deadline:
                raise self._unavailable(method, path, problem)
            await anyio.sleep(pause_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def create(
        self,
        method: str,
        path: str,
        *,
        json: object,
        refused: Callable[[HttpReply], CloudError | None],
    ) -> Any:
        """Return what a create call answers; it is made once. `refused` says which answers mean that nothing was made.

        Raises CloudError: `kind` "unclear" where a machine may have been made.
        """
        what = f"{method} {path}"
        try:
            reply = await self._once(method, path, json=json, params={}, timeout_s=CREATE_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise self._unclear(what, _words(error)) from None
        refusal = refused(reply)
        if refusal is not None:
            raise refusal
        if reply.status in (TIMED_OUT, OVERLOADED) or reply.status >= SERVER_ERROR:
            raise self._unclear(what, f"HTTP {reply.status}: {reply.said}")
        # cut off, or a proxy's page: the call itself may have worked
        if reply.status < REFUSED and reply.body is None:
            raise self._unclear(what, f"HTTP {reply.status}, and no JSON: {reply.said}")
        return self.checked(reply, what).body

    def made(self, machine_id: str, answer: object, what: str) -> str:
        """Return the id of the machine that a create call made. Raises CloudError, "unclear", where it names none."""
        if not machine_id:
            message = (
                f"{self.provider}: {what} answered without an id, so a machine may have been made."
            )
            raise CloudError(message, kind="unclear", found=str(answer)[:SAID_CHARS_MAX])
        return machine_id

    async def read_known(self, path: str) -> Any:
        """Return what the provider says of one thing; None where it knows no such thing."""
        try:
            return await self.read(path)
        except CloudError as error:
            if error.kind == "gone":
                return None
            raise

    async def end(self, method: str, path: str, *, json: object = None) -> bool:
        """Ask for the end of a machine; return False where the provider knows none of this id."""
        reply = await self.repeat(method, path, json=json)
        if reply.status == NOT_FOUND or NO_INSTANCE in reply.said:
            return False
        self.checked(reply, f"{method} {path}")
        return True

    def checked(self, reply: HttpReply, what: str) -> HttpReply:
        """Return an answer that is JSON and no error. Raises CloudError."""
        if reply.status in (401, 403):
            raise CloudError(
                f"{self.provider} refuses the key in {self._key.source}: HTTP {reply.status} to {what}.",
                kind="key",
                found=reply.said,
                fix="make a new key at the provider, and set it there; machines that run go on billing meanwhile",
            )
        if reply.status >= REFUSED:
            message = f"{self.provider} refuses {what}: HTTP {reply.status}."
            gone = reply.status in (NOT_FOUND, 410) or NO_INSTANCE in reply.said
            raise CloudError(message, kind="gone" if gone else "refused", found=reply.said)
        if reply.body is None and reply.said:
            message = f"{self.provider} answers {what} with something that is not JSON."
            raise CloudError(message, kind="unreadable", found=reply.said)
        return reply

    async def _once(
        self,
        method: str,
        path: str,
        *,
        json: object,
        params: Mapping[str, object],
        timeout_s: float,
    ) -> HttpReply:
        await self._pace()
        words = {name: str(value) for name, value in params.items() if value is not None}
        with _whole_call(timeout_s):
            answer = await self._client.request(
                method, self.base_url + path, json=json, params=words or None, timeout=timeout_s
            )
        said = self._key.hidden(answer.text)  # nothing that comes from a provider holds a key
        try:
            body = json_text.loads(said)
        except (ValueError, RecursionError):
            body = None
        return HttpReply(
            answer.status_code, body, said[:SAID_CHARS_MAX].strip(), _retry_after_s(answer)
        )

    async def _pace(self) -> None:
        now = time.monotonic()
        at = max(now, self._next_at)
        self._next_at = at + self._gap_s
        if at > now:
            await anyio.sleep(at - now)

    def _unclear(self, what: str, found: str) -> CloudError:
        message = f"{self.provider}: {what} had no clear answer, so a machine may have been made."
        return CloudError(message, kind="unclear", found=self._key.hidden(found))

    def _unavailable(self, method: str, path: str, problem: HttpReply | str) -> CloudError:
        found = problem if isinstance(problem, str) else f"HTTP {problem.status}: {problem.said}"
        message = f"{self.provider} does not answer {method} {path} within {RETRY_FOR_S:.0f} s."
        return CloudError(
            message, kind="unavailable", found=self._key.hidden(found), fix="try again later"
        )


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Return what all connections trust, read once: it takes longer than a call."""
    return httpx.create_ssl_context()


@contextlib.contextmanager
def _whole_call(timeout_s: float) -> Iterator[None]:
    """Bound a call as a whole: httpx bounds each read, so that a slow drip never ends."""
    try:
        with anyio.fail_after(2 * timeout_s):
            yield
    except TimeoutError:
        raise httpx.ReadTimeout(f"no whole answer within {2 * timeout_s:.0f} s") from None


def base_url(provider: ProviderName) -> str:
    """Return where a provider answers; $ROLLOUTS_<PROVIDER>_URL replaces it. Raises CloudError for one in the clear."""
    variable = f"ROLLOUTS_{provider.upper()}_URL"
    url = os.environ.get(variable, "").rstrip("/") or URLS[provider]
    parts = urlsplit(url)
    if parts.scheme != "https" and not (
        parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    ):
        needed = "https://…, since the API key goes there; http:// for this machine alone"
        raise CloudError(
            f"{variable}={url!r} is not a place to send a key to.", kind="key", needed=needed
        )
    return url


def key_name(public_key: str) -> str:
    """Return the name under which an account holds a public key: made from its content, so that it is added once."""
    return f"rollouts-{hashlib.sha256(public_key.encode()).hexdigest()[:16]}"


def _retry_after_s(answer: httpx.Response) -> float | None:
    try:
        return min(max(float(answer.headers.get("Retry-After", "")), 0.0), LONGEST_WAIT_S)
    except ValueError:  # none, or a date
        return None


def _words(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


async def pages(read: Callable[[Any], Any], provider: ProviderName) -> AsyncIterator[Any]:
    """Yield every page of a list. `read` takes a place, first None, and returns (page, the next place or None)."""
    place: Any = None
    seen: set[str] = set()
    for _ in range(PAGES_MAX):
        page, place = await read(place)
        yield page
        if place is None:
            return
        if str(place) in seen:
            break
        seen.add(str(place))
    raise CloudError(
        f"{provider}: its list of machines does not end.",
        kind="unreadable",
        found=f"place {place!r}",
    )


def said_by(reply: HttpReply) -> str:
    """Return what an error answer says, in whichever of the providers' forms, in lower case."""
    body = row(reply.body)
    inner = row(body.get("error"))
    words = (body.get(name) for name in ("title", "detail", "msg", "message", "error"))
    inside = (inner.get(name) for name in ("code", "message"))
    return " ".join(filter(None, map(text, (*words, *inside)))).lower() or reply.said.lower()
