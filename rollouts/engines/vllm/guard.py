"""The run's keys before vLLM's routes: `vllm serve --middleware rollouts.engines.vllm.guard.KeyGuard`.

vLLM's own --api-key is on the command line and leaves the development routes open: pauses and weight updates. Here the
keys come from the environment (rollouts/engines/keys.py) and each route needs its own key, as with SGLang. Runs in the
engine's environment; plain ASGI.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rollouts.engines.keys import is_allowed, read_keys

Message = Mapping[str, Any]
App = Callable[
    [Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]
REFUSAL = b'{"error": {"message": "Unauthorized"}}'


class KeyGuard:
    """Answers 401 to a request without its route's key, and closes such a websocket; all else goes to `app`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._keys = read_keys()

    async def __call__(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] in ("http", "websocket"):
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            if not is_allowed(scope["path"], given, *self._keys):
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                    return
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": REFUSAL})
                return
        await self._app(scope, receive, send)
