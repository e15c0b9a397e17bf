"""The HTTP application: which route is answered by which method of `Routes`, and what is said before they exist."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rollouts.engines.embedded.generate_request import BadRequest
from rollouts.engines.embedded.mailbox import Mailbox
from rollouts.engines.embedded.routes import Routes
from rollouts.engines.embedded.scheduler import Scheduler
from rollouts.engines.keys import is_allowed

GET, POST, BOTH = ["GET"], ["POST"], ["GET", "POST"]
TABLE: tuple[tuple[str, Callable[[Routes, Request], Awaitable[Response]], list[str]], ...] = (
    ("/health", Routes.health, GET),
    ("/health_generate", Routes.health_generate, GET),
    ("/ready", Routes.health, GET),
    ("/model_info", Routes.model_info, GET),
    ("/get_model_info", Routes.model_info, GET),
    ("/server_info", Routes.server_info, GET),
    ("/get_server_info", Routes.server_info, GET),
    ("/generate", Routes.generate, ["POST", "PUT"]),
    ("/abort_request", Routes.abort_request, POST),
    ("/pause_generation", Routes.pause_generation, POST),
    ("/continue_generation", Routes.continue_generation, POST),
    ("/flush_cache", Routes.flush_cache, BOTH),
    ("/update_weights_from_disk", Routes.update_weights_from_disk, POST),
    ("/begin_weight_update", Routes.begin_weight_update, POST),
    ("/update_weights_from_tensor", Routes.update_weights_from_tensor, POST),
    ("/end_weight_update", Routes.end_weight_update, POST),
    ("/update_weight_version", Routes.update_weight_version, POST),
)


class EmbeddedServer:
    """Answers 503 until `open`. `info` is shown by /server_info; `keys` are the api and the admin key."""

    def __init__(
        self,
        mailbox: Mailbox,
        info: dict[str, Any],
        keys: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self._mailbox = mailbox
        self._info = info
        self._keys = keys
        self._routes: Routes | None = None

    def open(self, scheduler: Scheduler) -> None:
        """Answer requests from now on. Called on the model thread, once the model is loaded."""
        self._routes = Routes(scheduler, self._mailbox, self._info)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route(path, self._answering(handler), methods=methods)
                for path, handler, methods in TABLE
            ]
        )

    def _answering(
        self, handler: Callable[[Routes, Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if not is_allowed(
                request.url.path, request.headers.get("authorization", ""), *self._keys
            ):
                return error_response("Unauthorized", 401)
            if self._routes is None:
                return error_response("the model is still loading", 503)
            try:
                return await handler(self._routes, request)
            except BadRequest as error:
                return error_response(str(error), 400)

        return answer


def error_response(message: str, status: int) -> Response:
    """Return an error in the shape of SGLang's native routes."""
    return JSONResponse({"error": {"message": message}}, status_code=status)
