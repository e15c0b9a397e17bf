"""Who may see the page: a browser on this machine that has the token. A layer of ASGI before all routes.

The token comes once in the address, and becomes a cookie. Without it nothing is served, so that other users of the
machine get nothing; and for a Host that is not this machine nothing either, so that no web site can name itself so.
"""

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Callable[[], Awaitable[Any]], Send], Awaitable[None]]

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
TOKEN = "token"
SAFE_METHODS = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
NO_TOKEN = "403: this page needs the link that `deploy ui` printed, with its token.\n"
NO_HOST = "403: this server answers for 127.0.0.1 and localhost alone.\n"
OTHER_SITE = "403: another site asked for this.\n"


class Access:
    """Lets requests pass that have the token, and puts the page's policy on every answer."""

    def __init__(self, app: Asgi, *, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._cookie = f"rollouts_ui_{port}"  # browsers share cookies between a machine's ports
        self._session = secrets.token_urlsafe(32)  # an address may stay in a history: not the token

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Send
    ) -> None:
        if scope["type"] != "http":
            return  # there are no web sockets
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal, location = self._decide(scope, headers)
        if refusal:
            await _answer(send, 403, refusal)
        elif location:
            cookie = f"{self._cookie}={self._session}; HttpOnly; SameSite=Strict; Path=/"
            await _answer(send, 303, "", {"location": location, "set-cookie": cookie})
        else:
            await self._app(scope, receive, _with_policy(send))

    def _decide(self, scope: Scope, headers: dict[str, str]) -> tuple[str, str]:
        """Return (why a request is refused, where its token leads on to); ("", "") lets it pass."""
        host, safe = headers.get("host", ""), scope["method"] in SAFE_METHODS
        name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
        if name.lower() not in LOOPBACK_NAMES:
            return NO_HOST, ""
        if not safe and headers.get("origin") != f"http://{host}":
            return OTHER_SITE, ""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get(TOKEN)
        if given is not None:
            fits = safe and _equal(given, self._token)
            return ("", _without_token(scope, query)) if fits else (NO_TOKEN, "")
        cookies = dict(
            part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";")
        )
        return ("" if _equal(cookies.get(self._cookie, ""), self._session) else NO_TOKEN), ""


def _without_token(scope: Scope, query: list[tuple[str, str]]) -> str:
    others = urlencode([(name, value) for name, value in query if name != TOKEN])
    path = "/" + scope["raw_path"].decode("latin-1").lstrip(
        "/"
    )  # //host would lead to another machine
    return f"{path}?{others}" if others else path


def _equal(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode())


async def _answer(
    send: Send, status: int, text: str, headers: dict[str, str] | None = None
) -> None:
    shown = {
        "content-type": "text/plain; charset=utf-8",
        "cache-control": "no-store",
        **(headers or {}),
    }
    start = {"type": "http.response.start", "status": status, "headers": _encoded(shown)}
    await _with_policy(send)(start)
    await send({"type": "http.response.body", "body": text.encode()})


def _with_policy(send: Send) -> Send:
    async def send_with_policy(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_encoded(HEADERS)]
        await send(message)

    return send_with_policy


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
