"""Client of an SGLang server, and of the embedded engine, which speaks the same routes."""

import dataclasses
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rollouts.training.inference.client import EngineClient, read_vocab_size, sampling
from rollouts.training.inference.http import (
    EngineError,
    EngineLost,
    Generation,
    WeightSyncError,
    require,
)
from rollouts.training.inference.inference_engine import ServerInfo, ServerKind
from rollouts.training.inference.known_versions import check_version
from rollouts.training.inference.requests import per_prompt, row_seed
from rollouts.training.inference.weight_routes import Adapter, WeightRoutes

SPARE_TOKENS = (
    2  # SGLang never fills the last ones of its context: it cuts such answers short, silently
)


class SGLangEngine(EngineClient):
    """Client of an SGLang server, and of the embedded engine, which speaks the same routes."""

    ready_route = "/ready"

    @cached_property
    def weights(self) -> WeightRoutes:
        return WeightRoutes(self)

    async def _ask_server(self) -> ServerInfo:
        info = await self.request("GET", "/server_info")
        require(
            isinstance(info, dict), f"{self.base_url}/server_info: needs an object, got {info!r}"
        )
        if info.get("engine") == "embedded":
            version = check_version(self.base_url, "embedded", info.get("version"))
            return ServerInfo(
                "embedded", version, True, info.get("vocab_size"), info.get("context_length")
            )
        version = check_version(self.base_url, "sglang", info.get("version"))
        seeds = info.get("enable_deterministic_inference") is True
        context = info.get("context_length")  # None: the model's own
        tokens_max = None if context is None else context - SPARE_TOKENS
        return ServerInfo(
            "sglang", version, seeds, await read_vocab_size(info["model_path"]), tokens_max
        )

    async def health(self) -> bool:
        """Return whether the engine answers and can serve, perhaps once it is resumed. Never raises.

        It does not ask /health, for which SGLang generates a token: a paused or busy server would seem dead.
        """
        try:
            ready = (await self._send("GET", "/ready")).status_code == 200
            return ready or (await self._send("GET", "/server_info")).status_code == 200
        except EngineError:
            return False

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[list[Generation]]:
        """Return `n` continuations of each prompt, all by one HTTP request. See `EngineClient`."""
        if not prompts:
            return []
        params = per_prompt(sampling_params, len(prompts))
        await self.check(prompts, params, n)
        kind = (await self.server()).kind
        pairs = zip(prompts, params, strict=True)
        entries = [
            entry for prompt, item in pairs for entry in entries_of(kind, prompt, item, n, rid)
        ]
        body: dict[str, Any] = {
            "input_ids": [entry.input_ids for entry in entries],
            "sampling_params": [entry.sampling_params for entry in entries],
            "return_logprob": return_logprob,
        }
        if rid is not None:
            body["rid"] = self._row_rids[rid] = [str(entry.rid) for entry in entries]
        try:
            async with sampling.here():
                adapter = self.weights.adapter  # after the wait: it may have changed meanwhile
                answer = await self.request("POST", "/generate", _naming(adapter, body))
        except EngineError as error:
            await self._raise_if_lost(adapter, error)
            raise
        finally:
            if rid is not None:
                self._row_rids.pop(rid, None)
        flat = generations(answer, n * len(prompts), return_logprob, self.base_url)
        if adapter is not None:
            flat = [_sampled_with(adapter.version, row) for row in flat]
        return [flat[start : start + n] for start in range(0, len(flat), n)]

    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Return [T-1] natural log-probs of all but the first of T tokens, at temperature 1. Nothing is sampled."""
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        adapter = self.weights.adapter
        try:
            answer = await self.request("POST", "/generate", _naming(adapter, body))
        except EngineError as error:
            await self._raise_if_lost(adapter, error)
            raise
        try:
            entries = answer["meta_info"]["input_token_logprobs"]
            # SGLang echoes the vocabulary's last id as 0, so ids are not compared
            if len(entries) == len(input_ids):
                return [float(entry[0]) for entry in entries[1:]]
        except (KeyError, TypeError, IndexError) as error:
            raise EngineError(
                f"{self.base_url}/generate: an answer without {error}: {str(answer)[:200]}"
            ) from error
        raise EngineError(
            f"{self.base_url}/generate: {len(entries)} log-probs of {len(input_ids)} tokens"
        )

    async def _raise_if_lost(self, adapter: Adapter | None, error: EngineError) -> None:
        """Raise EngineLost if `error` is the refusal of an adapter that the server lost when it was started again."""
        if adapter is None or isinstance(error, EngineLost):
            return
        served = (await self.request("GET", "/model_info"))["weight_version"]
        if served != adapter.version:
            started_anew = (
                f"serves version {served!r}, and was given the adapter of {adapter.version!r}"
            )
            raise EngineLost(f"{self.base_url}: {started_anew}: {error}") from error

    async def pause(self, mode: str = "retract") -> None:
        """Stop sampling: "abort" ends what runs, "retract" re-queues it, "in_place" freezes it with its cache."""
        await self.request("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Sample again after `pause` (SGLang's /continue_generation)."""
        await self.request("POST", "/continue_generation", {})

    async def flush_cache(self) -> None:
        """Empty the prefix cache. Raises EngineError when the server refuses, which it does while requests run.

        It leaves out SGLang's `timeout`, which waits until there are no requests: a pause holds some for ever.
        """
        await self.request("POST", "/flush_cache")

    async def abort(self, rid: str | None = None) -> None:
        """End one request, or all if `rid` is None. They answer with the tokens sampled so far."""
        if rid is None:
            await self.request("POST", "/abort_request", {"abort_all": True})
            return
        for one in self._row_rids.get(rid, [rid]):
            await self.request("POST", "/abort_request", {"rid": one})

    async def model_info(self) -> dict[str, Any]:
        """Return `model_path`, `weight_version`, ... of the weights being served."""
        info = await self.request("GET", "/model_info")
        if not isinstance(info, dict):
            raise EngineError(f"{self.base_url}/model_info: needs an object, got {info!r}")
        return info

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]:
        """Serve the weights of a Hugging Face directory that the server can read. Returns only once that is proven.

        `weight_version` must not have been used before; None makes one up from the directory's name. Returns the
        server's answer with `weight_version` added. Requests in flight are re-queued and go on with the new weights.
        Raises WeightSyncError. A server that kept its old weights serves on. After any other failure it stays paused,
        so that nothing is sampled from weights of unknown version.
        """
        path = str(Path(checkpoint_path).absolute())
        version = weight_version or f"{Path(path).name}-{uuid.uuid4().hex[:8]}"
        await self._require_readable(path)
        try:
            await self.pause("retract")
        except EngineError as error:
            raise WeightSyncError(f"weight sync of {path} failed at pause: {error}") from error
        body = {"model_path": path, "weight_version": version, "flush_cache": False}
        try:
            answer = await self.request("POST", "/update_weights_from_disk", body)
            require(
                isinstance(answer, dict) and answer.get("success") is True,
                f"{self.base_url}: {answer!r}",
            )
        except EngineError as error:
            raise WeightSyncError(
                f"weight sync of {path} failed at update: {error}. {await self._after_failed_update(version)}"
            ) from error
        try:
            await self.flush_cache()
            served = (await self.model_info()).get("weight_version")
            require(
                served == version, f"{self.base_url} serves version {served!r}, needs {version!r}"
            )
            await self.resume()
        except EngineError as error:
            raise WeightSyncError(
                f"weight sync of {path} failed: {error}. The engine is left paused"
            ) from error
        return {**answer, "weight_version": version}

    async def _after_failed_update(self, version: str) -> str:
        """Let the engine go on if it has kept its old weights. Return in words what was done."""
        try:
            served = (await self.model_info()).get("weight_version")
            if served == version:
                return "The engine reports the new version all the same, and is left paused"
            await self.resume()
        except EngineError as error:
            return f"The engine is left as it is: {error}"
        return f"The engine serves on with version {served!r}"


@dataclass(frozen=True)
class RequestEntry:
    """One prompt of a /generate request, or a request by itself. The server answers it with `rows` continuations."""

    input_ids: list[int]
    sampling_params: dict[str, Any]
    rid: str | None
    rows: int


def entries_of(
    kind: ServerKind, prompt: Sequence[int], params: Mapping[str, Any], n: int, rid: str | None
) -> list[RequestEntry]:
    """Return the entries of a request for n continuations of a prompt.

    The embedded engine gets one entry for n rows. SGLang gets an entry a row: it gives rows of one seed the same
    tokens, and once it uses seeds also rows without one. It prefills an n-fold prompt n times, one after another.
    """
    if kind == "embedded":
        return [RequestEntry(list(prompt), {**params, "n": n}, rid, n)]
    rids = [None if rid is None else f"{rid}-{row}" for row in range(n)]
    seeds = [row_seed(params.get("sampling_seed"), row) for row in range(n)]
    return [
        RequestEntry(list(prompt), {**params, "sampling_seed": seeds[row]}, rids[row], 1)
        for row in range(n)
    ]


def _naming(adapter: Adapter | None, body: dict[str, Any]) -> dict[str, Any]:
    return body if adapter is None else {**body, "lora_path": adapter.name}


def generations(answers: Any, expected: int, return_logprob: bool, where: str) -> list[Generation]:
    """Return the rows of a /generate answer, a list of `expected`. Raises EngineError for anything else."""
    if not isinstance(answers, list) or len(answers) != expected:
        found = len(answers) if isinstance(answers, list) else type(answers).__name__
        raise EngineError(f"{where}/generate: asked for {expected} continuations, got {found}")
    return [_generation(answer, return_logprob, where) for answer in answers]


def _sampled_with(version: str, row: Generation) -> Generation:
    """Return `row` under the adapter's version: the server reports the newest one, but a request keeps its adapter."""
    spans = [{"version": version, "start": 0, "end": len(row.output_ids)}]
    return dataclasses.replace(row, weight_version=version, weight_versions=spans)


def _generation(answer: Any, return_logprob: bool, where: str) -> Generation:
    """Return one row of a /generate answer. Raises EngineError if ids and log-probs do not belong together."""
    try:
        meta, output_ids = answer["meta_info"], answer["output_ids"]
        reason = meta["finish_reason"]
        logprobs = None
        if return_logprob:
            entries = meta["output_token_logprobs"]
            logprobs = [float(entry[0]) for entry in entries]
            if [entry[1] for entry in entries] != output_ids or not all(
                map(math.isfinite, logprobs)
            ):
                raise EngineError(
                    f"{where}/generate: the log-probs are not finite ones of the output_ids"
                )
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
