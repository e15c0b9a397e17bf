"""Clients of the inference engines, and the cycle that gives an engine new weights and proves that it serves them.

One sync is: pause → load from disk → flush the prefix cache (checked) → read the version back → continue. What fails is
raised, naming the engine; no caller goes on with weights that were not proven. Works under asyncio and trio.
"""

import inspect
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import anyio
import anyio.lowlevel
import httpx

REQUEST_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 30.0
READY_POLL_S = 0.1


class EngineError(Exception):
    """An engine that cannot be reached, or that refused. The message has its URL, the route and what it answered."""


class WeightSyncError(EngineError):
    """New weights that did not arrive, or that could not be proven to serve."""


@dataclass(frozen=True)
class Generation:
    """One sampled continuation: T output ids, and their natural log-probs at the sampling temperature.

    `finish_reason` is "stop" (the stop token is the last id), "length" or "abort" (the ids are what there was).
    """

    output_ids: list[int]
    logprobs: list[float] | None  # None when not asked for
    finish_reason: str
    finish_detail: dict[str, Any]  # as the server sent it: type, and matched, length or message
    weight_version: str  # of the newest weights that sampled a token of this
    weight_versions: list[dict[str, Any]]  # [{version, start, end}]: more than one when weights changed midway
    text: str | None  # None where the server has no tokenizer
    prompt_tokens: int
    cached_tokens: int


class Engine(Protocol):
    """All that `sync_weights_to_engines` needs of an engine. It may take `weight_version` too."""

    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict[str, Any]:
        """Serve the checkpoint directory's weights; {"success": bool, ...}."""
        ...


class _HTTPEngine:
    """A JSON-over-HTTP engine: one pooled client per event loop it is used from, errors with the server's words."""

    def __init__(self, base_url: str, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self._client: httpx.AsyncClient | None = None
        self._client_loop: object = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. The engine may be used again; it opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._client_loop == anyio.lowlevel.current_token():
            await client.aclose()

    async def health(self) -> bool:
        """Whether the engine answers and says it can serve. Never raises for an engine that is down."""
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
                    response = await self._send("GET", "/health")
                    if response.status_code == 200:
                        return
                    last = f"/health answered {response.status_code}"
                except EngineError as error:
                    last = str(error)
                await anyio.sleep(READY_POLL_S)
        raise EngineError(f"{self.base_url}: not ready after {timeout_s:g} s; last seen: {last}")

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer (JSON where it is JSON, else text). Raises EngineError unless the status is 200."""
        response = await self._send(method, path, body)
        if response.status_code != 200:
            raise EngineError(f"{self.base_url}{path}: {response.status_code}: {_server_message(response)}")
        try:
            return response.json()
        except ValueError:
            return response.text

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            return await self._http().request(method, self.base_url + path, json=body)
        except (httpx.HTTPError, OSError) as error:
            raise EngineError(f"{self.base_url}{path}: {type(error).__name__}: {error or 'no answer'}") from error

    def _http(self) -> httpx.AsyncClient:
        loop = anyio.lowlevel.current_token()  # connections belong to the event loop they were opened in
        if self._client is None or self._client_loop != loop:
            timeout = httpx.Timeout(self.timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=300)
            secure = self.base_url.startswith("https:")  # without: no certificate store, which takes 20 ms to read
            self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, verify=secure)
            self._client_loop = loop
        return self._client


class SGLangEngine(_HTTPEngine):
    """Client of an SGLang server, and of the embedded engine, which speaks the same routes."""

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[Generation]:
        """`n` continuations of one prompt, in sampling order. `sampling_params` as SGLang names them."""
        body: dict[str, Any] = {
            "input_ids": list(input_ids),
            "sampling_params": {**sampling_params, "n": n},
            "return_logprob": return_logprob,
        }
        if rid is not None:
            body["rid"] = rid
        answer = await self._request("POST", "/generate", body)
        return self._generations(answer if isinstance(answer, list) else [answer], n, return_logprob)

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
    ) -> list[list[Generation]]:
        """`n` continuations of each prompt in one request: a list for each prompt, in order.

        `sampling_params` is for all prompts, or a list with one for each (a seed for each, say).
        """
        if not prompts:
            return []
        if isinstance(sampling_params, Mapping):
            params: Any = {**sampling_params, "n": n}
        else:
            params = [{**item, "n": n} for item in sampling_params]
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": params,
            "return_logprob": return_logprob,
        }
        answer = await self._request("POST", "/generate", body)
        flat = self._generations(answer, n * len(prompts), return_logprob)
        return [flat[start : start + n] for start in range(0, len(flat), n)]

    def _generations(self, answers: Any, expected: int, return_logprob: bool) -> list[Generation]:
        if not isinstance(answers, list) or len(answers) != expected:
            found = len(answers) if isinstance(answers, list) else type(answers).__name__
            raise EngineError(f"{self.base_url}/generate: asked for {expected} continuations, got {found}")
        return [_generation(answer, return_logprob, self.base_url) for answer in answers]

    async def pause(self, mode: str = "retract") -> None:
        """Stop sampling: "abort" ends what runs, "retract" re-queues it, "in_place" freezes it with its cache."""
        await self._request("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Sample again after `pause` (SGLang's /continue_generation)."""
        await self._request("POST", "/continue_generation", {})

    async def flush_cache(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Empty the prefix cache. Raises EngineError when the server refuses, which it does while requests run."""
        await self._request("POST", f"/flush_cache?timeout={timeout_s:g}")

    async def abort(self, rid: str | None = None) -> None:
        """End one request, or all of them when `rid` is None, with the tokens they have."""
        await self._request("POST", "/abort_request", {"abort_all": True} if rid is None else {"rid": rid})

    async def model_info(self) -> dict[str, Any]:
        """`model_path`, `weight_version`, ... of what is being served."""
        info = await self._request("GET", "/model_info")
        if not isinstance(info, dict):
            raise EngineError(f"{self.base_url}/model_info: needs an object, got {info!r}")
        return info

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]:
        """Serve the weights of a Hugging Face directory that the server can read; returns only once that is proven.

        `weight_version` must not have been used before; None makes one up from the directory's name. Returns the
        server's answer with `weight_version` added. Requests in flight are re-queued and go on with the new weights.
        Raises WeightSyncError. When the server kept its old weights it serves on; in any other failure it stays
        paused, so that nothing is sampled from weights nobody can name.
        """
        path = str(Path(checkpoint_path).absolute())
        version = weight_version or f"{Path(path).name}-{uuid.uuid4().hex[:8]}"
        try:
            await self.pause("retract")
        except EngineError as error:
            raise WeightSyncError(f"weight sync of {path} failed at pause: {error}") from error
        body = {"model_path": path, "weight_version": version, "flush_cache": False}
        try:
            answer = await self._request("POST", "/update_weights_from_disk", body)
            _require(isinstance(answer, dict) and answer.get("success") is True, f"{self.base_url}: {answer!r}")
        except EngineError as error:
            raise WeightSyncError(
                f"weight sync of {path} failed at update: {error}. {await self._after_failed_update(version)}"
            ) from error
        try:
            await self.flush_cache()
            served = (await self.model_info()).get("weight_version")
            _require(served == version, f"{self.base_url} serves version {served!r}, needs {version!r}")
            await self.resume()
        except EngineError as error:
            raise WeightSyncError(f"weight sync of {path} failed: {error}. The engine is left paused") from error
        return {**answer, "weight_version": version}

    async def _after_failed_update(self, version: str) -> str:
        """Let the engine go on if it can be shown to have kept its old weights; what was done, in words."""
        try:
            served = (await self.model_info()).get("weight_version")
            if served == version:
                return "The engine reports the new version all the same, and is left paused"
            await self.resume()
        except EngineError as error:
            return f"The engine is left as it is: {error}"
        return f"The engine serves on with version {served!r}"


class VLLMEngine(_HTTPEngine):
    """Weight updates of a vLLM server started with VLLM_SERVER_DEV_MODE=1: its workers reload from disk.

    vLLM has no disk route of its own; `collective_rpc` calls `reload_weights(weights_path=...)` in every worker.
    """

    async def update_weights_from_checkpoint(self, checkpoint_path: str) -> dict[str, Any]:
        """As `SGLangEngine`'s, but what is proven is that every worker's reload returned without an error.

        Raises WeightSyncError; the engine is then left paused.
        """
        path = str(Path(checkpoint_path).absolute())
        reload = {"method": "reload_weights", "kwargs": {"weights_path": path}, "timeout": self.timeout_s}
        try:
            await self._request("POST", "/pause?mode=keep")
            await self._request("POST", "/collective_rpc", reload)
            await self._request("POST", "/reset_prefix_cache")
            await self._request("POST", "/resume")
        except EngineError as error:
            raise WeightSyncError(f"weight sync of {path} failed: {error}. The engine is left paused") from error
        return {"success": True, "message": f"reloaded from {path}"}


async def sync_weights_to_engines(
    engines: Sequence[Engine], checkpoint_path: str, weight_version: str | None = None
) -> list[dict[str, Any]]:
    """Give all engines the checkpoint's weights, in parallel; their answers, in the engines' order.

    `weight_version` goes to the engines that take one. Raises WeightSyncError when any engine raised or did not answer
    with success true; it names each of them. All engines are waited for first.
    """
    answers: list[dict[str, Any]] = [{} for _ in engines]
    failures: list[str] = []
    causes: list[Exception] = []

    async def sync_one(index: int, engine: Engine) -> None:
        name = getattr(engine, "base_url", None) or repr(engine)
        update: Any = engine.update_weights_from_checkpoint
        versioned = weight_version is not None and "weight_version" in inspect.signature(update).parameters
        try:
            answer = await (
                update(checkpoint_path, weight_version=weight_version) if versioned else update(checkpoint_path)
            )
        except Exception as error:  # engines are duck-typed: whatever one raises is its failure, told with its name
            failures.append(f"{name}: {error or type(error).__name__}")
            causes.append(error)
            return
        if not isinstance(answer, dict) or answer.get("success") is not True:
            failures.append(f"{name}: answered {answer!r}, needs success true")
            return
        answers[index] = answer

    async with anyio.create_task_group() as group:
        for index, engine in enumerate(engines):
            group.start_soon(sync_one, index, engine)
    if failures:
        count = f"{len(failures)} of {len(engines)} engines did not take {checkpoint_path}"
        raise WeightSyncError("; ".join([count, *failures])) from (causes[0] if causes else None)
    return answers


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise EngineError(message)


def _generation(answer: Any, return_logprob: bool, where: str) -> Generation:
    """One entry of a /generate answer. Raises EngineError when ids and log-probs do not belong together."""
    try:
        meta, output_ids = answer["meta_info"], answer["output_ids"]
        reason = meta["finish_reason"]
        logprobs = None
        if return_logprob:
            entries = meta["output_token_logprobs"]
            logprobs = [float(entry[0]) for entry in entries]
            if [entry[1] for entry in entries] != output_ids or not all(map(math.isfinite, logprobs)):
                raise EngineError(f"{where}/generate: the log-probs are not finite ones of the output_ids")
        return Generation(
            output_ids=output_ids,
            logprobs=logprobs,
            finish_reason=reason["type"],
            finish_detail=reason,
            weight_version=str(meta["weight_version"]),
            weight_versions=meta.get("weight_versions") or [],
            text=answer.get("text"),
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta.get("cached_tokens") or 0,
        )
    except (KeyError, TypeError, IndexError) as error:
        shown = json.dumps(answer)[:200]
        raise EngineError(f"{where}/generate: an answer without {error}: {shown}") from error


def _server_message(response: httpx.Response) -> str:
    """What the server said was wrong: SGLang's {"error": {"message"}} or {"message"}, else the body's beginning."""
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
