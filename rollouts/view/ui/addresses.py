"""The page's addresses: each is answered by a function of the desk; starlette carries the answers."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.plain_files import read_plain
from rollouts.run_dir import parse_row, valid_run_id
from rollouts.view.ui import build_answers, live, run_answers, sample_answers
from rollouts.view.ui.desk import Desk
from rollouts.view.ui.html import page, shown
from rollouts.view.ui.run_source import PageError

if TYPE_CHECKING:  # the control side starts without it
    from starlette.requests import Request
    from starlette.responses import Response

STATIC = Path(__file__).parent / "static"
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POSTED_BYTES_MAX = 1 << 20
Answer = Callable[[Desk, "Request"], Any]  # a JSON value


def make_app(desk: Desk) -> Any:
    """Return the ASGI application, without the check of who may see it: `Access`."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    pages = {
        "/": lambda request: page("runs", {"list": run_answers.run_list(desk)}),
        "/build": lambda request: page("build", build_answers.start(desk), title="new config"),
        "/compare": lambda request: _compare_page(desk, request),
        "/runs/{run_id}": lambda request: _run_page(desk, _run_id(request)),
        "/runs/{run_id}/samples": lambda request: _samples_page(desk, request),
    }
    answers: dict[str, Answer] = {
        "/api/runs": lambda desk, request: run_answers.run_list(desk),
        "/api/runs/{run_id}": lambda desk, request: run_answers.run_summary(desk, _run_id(request)),
        "/api/runs/{run_id}/answers": lambda desk, request: run_answers.answer_rows(
            desk.run(_run_id(request))
        ),
        "/api/runs/{run_id}/samples": lambda desk, request: sample_answers.sample_list(
            desk, _run_id(request), request.query_params
        ),
        "/api/runs/{run_id}/samples/{offset}": lambda desk, request: sample_answers.one_sample(
            desk, _run_id(request), request.path_params["offset"]
        ),
        "/api/build/fields": lambda desk, request: desk.builder.fields(
            request.query_params.get("base", "")
        ),
        "/api/chart": _chart,
        "/api/curves": _curves,
        "/api/compare": lambda desk, request: run_answers.comparison(desk, _run_ids(request)),
    }
    routes = [Route(path, _html(make)) for path, make in pages.items()]
    routes += [Route(path, _json(desk, answer)) for path, answer in answers.items()]
    routes += [
        Route(f"/api/build/{what}", _posted(desk, make), methods=["POST"])
        for what, make in build_answers.POSTED.items()
    ]
    routes += [
        Route("/api/runs/{run_id}/live", _live(desk)),
        Route("/static/vega.js", _vega(desk)),
        Route("/static/{name}", _static),
    ]
    return Starlette(routes=routes, exception_handlers={404: _no_page})


def _run_id(request: "Request") -> str:
    return _checked(request.path_params["run_id"])


def _run_ids(request: "Request") -> list[str]:
    return [_checked(name) for name in request.query_params.getlist("run")]


def _checked(name: str) -> str:
    if not valid_run_id(name):
        raise PageError(f"{name[:100]!r} is not the name of a run")
    return name


def _chart(desk: Desk, request: "Request") -> Any:
    asked = request.query_params
    stage, name, by = asked.get("stage", ""), asked.get("name", ""), asked.get("by", "step")
    return run_answers.chart(desk, _run_ids(request), stage, name, by=by)


def _curves(desk: Desk, request: "Request") -> Any:
    return run_answers.curves(desk, _run_ids(request), request.query_params.getlist("curve"))


# --- pages ------------------------------------------------------------------------------------------------------------


def _run_page(desk: Desk, run_id: str) -> str:
    return page("run", {"run": run_answers.run_summary(desk, run_id)}, title=run_id)


def _samples_page(desk: Desk, request: "Request") -> str:
    run_id = _run_id(request)
    desk.source.directory(run_id)
    first = sample_answers.sample_list(desk, run_id, request.query_params)
    return page("samples", {"run_id": run_id, "list": first}, title=f"samples of {run_id}")


def _compare_page(desk: Desk, request: "Request") -> str:
    run_ids = _run_ids(request)
    found = run_answers.comparison(desk, run_ids) if len(run_ids) > 1 else None
    names = [row["run_id"] for row in desk.source.runs().rows]
    return page(
        "compare", {"comparison": found, "known": names, "chosen": run_ids}, title="compare runs"
    )


def _html(make: Callable[["Request"], str]) -> Any:
    async def answer(request: "Request") -> "Response":
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import HTMLResponse

        try:
            status, text = 200, await run_in_threadpool(make, request)
        except PageError as error:
            status, text = error.status, page("message", {}, title="Not here", message=str(error))
        return HTMLResponse(text, status, headers={"cache-control": "no-store"})

    return answer


async def _no_page(request: "Request", error: Exception) -> "Response":
    from starlette.responses import HTMLResponse

    message = "There is no such page."
    return HTMLResponse(page("message", {}, title="Not here", message=message), 404)


# --- values -----------------------------------------------------------------------------------------------------------


def _json(desk: Desk, make: Answer) -> Any:
    async def answer(request: "Request") -> "Response":
        return await _as_json(lambda: make(desk, request))

    return answer


def _posted(desk: Desk, make: Callable[[Desk, Mapping[str, Any]], Any]) -> Any:
    """Return the answer to a JSON object that a page of ours sends."""

    async def answer(request: "Request") -> "Response":
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > POSTED_BYTES_MAX:
                break
        return await _as_json(lambda: make(desk, _object(bytes(body))))

    return answer


def _object(body: bytes) -> Mapping[str, Any]:
    asked = parse_row(body) if len(body) <= POSTED_BYTES_MAX else None
    if asked is None:
        raise PageError(f"needs a JSON object of {POSTED_BYTES_MAX} bytes at most", status=400)
    return asked


async def _as_json(make: Callable[[], Any]) -> "Response":
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response

    def made() -> tuple[int, str]:
        try:
            status, value = 200, make()
        except PageError as error:
            status, value = error.status, {"error": str(error)}
        return status, json.dumps(shown(value), separators=(",", ":"), allow_nan=False)

    status, text = await run_in_threadpool(made)
    return Response(text, status, {"cache-control": "no-store"}, "application/json")


def _live(desk: Desk) -> Any:
    async def answer(request: "Request") -> "Response":
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import StreamingResponse

        try:
            path = await run_in_threadpool(desk.source.directory, _run_id(request))
        except PageError:
            return StreamingResponse(
                iter([live.sent_event("gone", None)]), media_type="text/event-stream"
            )
        run_id, asked = _run_id(request), request.query_params
        told = request.headers.get("last-event-id") or asked.get("told", "")
        events = live.happenings(
            path,
            asked.get("log"),
            told,
            lambda: run_answers.state_of(desk, run_id),
            desk.is_ending,
        )
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    return answer


# --- files ------------------------------------------------------------------------------------------------------------


async def _static(request: "Request") -> "Response":
    from starlette.responses import PlainTextResponse, Response

    name = request.path_params["name"]
    file = STATIC / name
    if not re.fullmatch(r"[a-z_]+\.(js|css|svg)", name) or not file.is_file():
        return PlainTextResponse("no such file\n", 404)
    return Response(
        read_plain(file), headers={"cache-control": "no-cache"}, media_type=KINDS[file.suffix]
    )


def _vega(desk: Desk) -> Any:
    async def answer(request: "Request") -> "Response":
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import Response

        forever = {
            "cache-control": "private, max-age=31536000, immutable"
        }  # its address names its version
        return Response(
            await run_in_threadpool(desk.vega), headers=forever, media_type="text/javascript"
        )

    return answer
