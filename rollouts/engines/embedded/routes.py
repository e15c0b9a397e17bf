"""SGLang's routes over a loaded model: one method each. Starlette's event loop; the model has its own thread."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from rollouts.engines.embedded.generate_request import (
    VERSION,
    BadRequest,
    PromptRequest,
    RowResult,
    ServedLimits,
    parse_generate,
    row_to_json,
)
from rollouts.engines.embedded.mailbox import CommandRefused, Mailbox
from rollouts.engines.embedded.scheduler import PauseMode, Scheduler
from rollouts.training.weights import wire

T = TypeVar("T")
CLIENT_CLOSED = 499  # no client is left to read it
PAUSE_MODES: tuple[PauseMode, ...] = ("abort", "retract", "in_place")
HEALTH_TIMEOUT_S = 20.0  # SGLang's
LOAD_FORMATS = (None, "auto", "safetensors")
TENSOR_FORMAT = "flattened_bucket"
UPDATE_ABORTS = "Aborted for a weight update"
VERSION_ABORTS = "Aborted for a weight version update"


class Routes:
    """Answers requests. `info` is what /server_info shows of the command line."""

    def __init__(self, scheduler: Scheduler, mailbox: Mailbox, info: dict[str, Any]) -> None:
        self._scheduler = scheduler
        self._mailbox = mailbox
        self._info = info
        self._rids: set[str] = set()

    async def _call(self, function: Callable[[], T]) -> T:
        """Run `function` on the model thread, and return what it does."""
        return await asyncio.wrap_future(self._mailbox.call(function))

    # --- state ---

    async def health(self, request: Request) -> Response:
        return Response(status_code=200)

    async def health_generate(self, request: Request) -> Response:
        """Answer 200 once a token was sampled, or at once while paused: then none is expected."""
        if self._scheduler.paused:
            return Response(status_code=200)
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        parsed = parse_generate(body, self._limits())
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await asyncio.gather(*self._submit(parsed.prompts))
        except TimeoutError:
            return Response(status_code=503)
        return Response(status_code=200)

    async def model_info(self, request: Request) -> Response:
        weights = self._scheduler.weights
        return JSONResponse(
            {
                "model_path": weights.path,
                "tokenizer_path": self._info["model_path"],
                "is_generation": True,
                "weight_version": weights.version,
            }
        )

    async def server_info(self, request: Request) -> Response:
        served = self._scheduler.served
        about = {"engine": "embedded", "version": VERSION}
        more = {"context_length": served.context_length, "vocab_size": served.vocab_size}
        state = {"paused": self._scheduler.paused, **self._scheduler.counts()}
        return JSONResponse({**self._info, **about, **more, "internal_states": [state]})

    # --- generation ---

    async def generate(self, request: Request) -> Response:
        parsed = parse_generate(await _json(request), self._limits())
        rids = [prompt.rid for prompt in parsed.prompts]
        taken = sorted(self._rids.intersection(rids))
        if taken:
            raise BadRequest(f"rid={taken[0]!r}: a request with this id is still running")
        self._rids.update(rids)
        try:
            results = await self._results_or_gone(request, parsed.prompts)
        finally:
            self._rids.difference_update(rids)
        if results is None:
            return Response(status_code=CLIENT_CLOSED)
        served = self._scheduler.served
        decode = None if served.tokenizer is None else served.decode
        answers = [
            row_to_json(prompt, row, result, decode)
            for prompt, rows in zip(parsed.prompts, results, strict=True)
            for row, result in enumerate(rows)
        ]
        return JSONResponse(answers[0] if parsed.single else answers)

    async def _results_or_gone(
        self, request: Request, prompts: tuple[PromptRequest, ...]
    ) -> list[list[RowResult]] | None:
        """Return the rows of each prompt; None when the client hung up first, and then they are aborted."""
        results = asyncio.gather(*self._submit(prompts))
        # the body is read: only a disconnect can follow
        hung_up = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait((results, hung_up), return_when=asyncio.FIRST_COMPLETED)
            if results.done():
                return list(results.result())
            self._mailbox.call(
                partial(self._scheduler.abort, "Aborted", [prompt.rid for prompt in prompts])
            )
            results.cancel()
            return None
        finally:
            hung_up.cancel()
            with suppress(asyncio.CancelledError):
                await hung_up

    def _submit(
        self, prompts: tuple[PromptRequest, ...]
    ) -> list["asyncio.Future[list[RowResult]]"]:
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[list[RowResult]]] = [loop.create_future() for _ in prompts]

        def settle(index: int, rows: list[RowResult]) -> None:
            if not futures[index].done():
                futures[index].set_result(rows)

        def done(index: int, rows: list[RowResult]) -> None:
            loop.call_soon_threadsafe(settle, index, rows)

        self._mailbox.call(partial(self._scheduler.submit, prompts, done))
        return futures

    def _limits(self) -> ServedLimits:
        served = self._scheduler.served
        encode = None if served.tokenizer is None else served.encode
        return ServedLimits(served.context_length, served.vocab_size, encode)

    async def abort_request(self, request: Request) -> Response:
        body = await _json(request)
        rid, everything = body.get("rid") or "", _flag(body, "abort_all", False)
        if not isinstance(rid, str) or not (rid or everything):
            raise BadRequest("needs `rid`, the id of a request, or `abort_all`: true")
        await self._call(partial(self._scheduler.abort, "Aborted", None if everything else [rid]))
        return Response(status_code=200)

    async def pause_generation(self, request: Request) -> Response:
        body = await _json(request, empty_is={})
        given = body.get("mode") or "abort"
        mode = next((mode for mode in PAUSE_MODES if mode == given), None)
        if mode is None:
            raise BadRequest(f"mode={given!r}: needs one of {', '.join(PAUSE_MODES)}")
        await self._call(partial(self._scheduler.pause, mode))
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: Request) -> Response:
        await self._call(self._scheduler.resume)
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    async def flush_cache(self, request: Request) -> Response:
        """Answer 200 when the cache is empty. With ?timeout=S wait that long for the running requests to end."""
        try:
            timeout_s = float(request.query_params.get("timeout") or 0)
        except ValueError:
            raise BadRequest(
                f"timeout={request.query_params['timeout']!r}: needs seconds"
            ) from None
        flushed = await self._call(self._scheduler.flush)
        if not flushed and timeout_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await asyncio.wrap_future(await self._call(self._scheduler.when_idle))
            flushed = await self._call(self._scheduler.flush)
        if flushed:
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse(
            "Cache not flushed: requests are running in it.\n", status_code=400
        )

    # --- weights ---

    async def update_weights_from_disk(self, request: Request) -> Response:
        body = await _json(request)
        path, version = body.get("model_path"), _version(body)
        if not isinstance(path, str) or not path:
            raise BadRequest(f"model_path={path!r}: needs the path of a Hugging Face directory")
        if body.get("load_format") not in LOAD_FORMATS:
            raise BadRequest(
                f"load_format={body['load_format']!r}: needs one of {LOAD_FORMATS[1:]}, or null"
            )
        abort_all, flush = (
            _flag(body, "abort_all_requests", False),
            _flag(body, "flush_cache", True),
        )
        load = partial(self._scheduler.weights.load, path, version=version, flush_cache=flush)
        return await _updated(self._queue_update(load, abort_all))

    async def begin_weight_update(self, request: Request) -> Response:
        return await _updated(self._queue_update(self._scheduler.weights.begin))

    async def update_weights_from_tensor(self, request: Request) -> Response:
        """Copy one bucket of tensors from the sender's memory on this host: see `weights.wire`."""
        body = await _json(request)
        messages, version = body.get("serialized_named_tensors"), _version(body)
        if not (isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], str)):
            raise BadRequest(
                "serialized_named_tensors: needs a list of one text, since one process serves the model"
            )
        if body.get("load_format") != TENSOR_FORMAT:
            raise BadRequest(f"load_format={body.get('load_format')!r}: needs {TENSOR_FORMAT!r}")
        abort_all, flush = (
            _flag(body, "abort_all_requests", False),
            _flag(body, "flush_cache", True),
        )
        try:
            named = wire.loads(messages[0])
        except ValueError as error:
            raise BadRequest(f"serialized_named_tensors: {error}") from None
        copy = partial(self._scheduler.weights.copy, named, version=version, flush_cache=flush)
        queued = self._queue_update(copy, abort_all)
        del named, copy  # the model thread alone has them now, for as long as it copies
        return await _updated(queued)

    async def end_weight_update(self, request: Request) -> Response:
        return await _updated(self._queue_update(self._scheduler.weights.end))

    async def update_weight_version(self, request: Request) -> Response:
        body = await _json(request)
        version = body.get("new_version")
        if not isinstance(version, str) or not version:
            raise BadRequest(f"new_version={version!r}: needs a string")
        aborts = VERSION_ABORTS if _flag(body, "abort_all_requests", True) else None
        await self._call(partial(self._scheduler.set_version, version, aborts))
        message = f"Weight version updated to {version}"
        return JSONResponse({"success": True, "message": message, "new_version": version})

    def _queue_update(
        self, update: Callable[[], T], abort_all: bool = False
    ) -> "Future[Future[T]]":
        """Queue a weight update; the outer future is resolved once it is in line, the inner one once it ran."""
        aborts = UPDATE_ABORTS if abort_all else None
        return self._mailbox.call(partial(self._scheduler.between_requests, update, aborts))


async def _json(request: Request, *, empty_is: dict[str, Any] | None = None) -> dict[str, Any]:
    raw = await request.body()
    if not raw and empty_is is not None:
        return empty_is
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body needs to be a JSON object, found {type(body).__name__}")
    return body


def _version(body: dict[str, Any]) -> str | None:
    version = body.get("weight_version")
    if version is not None and not isinstance(version, str):
        raise BadRequest(f"weight_version={version!r}: needs a string")
    return version


async def _updated(queued: "Future[Future[tuple[str, int]]] | Future[Future[None]]") -> Response:
    """Answer with how a weight update ended: its message and the number of rows in the batch, if it returns them."""
    try:
        running: Future[Any] = await asyncio.wrap_future(queued)
        message, held = await asyncio.wrap_future(running) or ("Success", 0)
    except CommandRefused as error:
        return JSONResponse(
            {"success": False, "message": str(error), "num_paused_requests": 0}, status_code=400
        )
    return JSONResponse({"success": True, "message": message, "num_paused_requests": held})


def _flag(body: dict[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}={value!r}: needs true or false")
    return default if value is None else value
