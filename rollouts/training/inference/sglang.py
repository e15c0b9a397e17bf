"""Client of an SGLang server, and of the embedded engine, which speaks the same routes."""

import dataclasses
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.training.inference.client import EngineClient, read_vocab_size, sampling
from rollouts.training.inference.http import (
    EngineError,
    Generation,
    WeightSyncError,
    require,
)
from rollouts.training.inference.protocol import Server, ServerKind, check_version
from rollouts.training.inference.requests import row_seed
from rollouts.training.inference.weight_routes import WeightRoutes

SPARE_TOKENS = 2  # of its context, SGLang never fills the last ones: an answer that should is cut short, silently


class SGLangEngine(WeightRoutes, EngineClient):
    """Client of an SGLang server, and of the embedded engine, which speaks the same routes."""

    ready_route = "/ready"

    async def _ask_server(self) -> Server:
        info = await self._request("GET", "/server_info")
        require(isinstance(info, dict), f"{self.base_url}/server_info: needs an object, got {info!r}")
        if info.get("engine") == "embedded":
            version = check_version(self.base_url, "embedded", info.get("version"))
            return Server("embedded", version, True, info.get("vocab_size"), info.get("context_length"))
        version = check_version(self.base_url, "sglang", info.get("version"))
        seeds = info.get("enable_deterministic_inference") is True
        context = info.get("context_length")  # None: the model's own
        tokens_max = None if context is None else context - SPARE_TOKENS
        return Server("sglang", version, seeds, await read_vocab_size(info["model_path"]), tokens_max)

    async def health(self) -> bool:
        """Whether the engine answers and can serve, once it is resumed if it is paused. Never raises.

        Not by /health, for which SGLang generates a token: a paused server, or one in a long prefill, would seem dead.
        """
        try:
            ready = (await self._send("GET", "/ready")).status_code == 200
            return ready or (await self._send("GET", "/server_info")).status_code == 200
        except EngineError:
            return False

    async def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Mapping[str, Any]],
        n: int,
        return_logprob: bool,
        rid: str | None,
    ) -> list[list[Generation]]:
        """One request for all."""
        kind = (await self.server()).kind
        pairs = zip(prompts, params, strict=True)
        entries = [entry for prompt, item in pairs for entry in entries_of(kind, prompt, item, n, rid)]
        body: dict[str, Any] = {
            "input_ids": [entry.input_ids for entry in entries],
            "sampling_params": [entry.sampling_params for entry in entries],
            "return_logprob": return_logprob,
        }
        if rid is not None:
            body["rid"] = self._row_rids[rid] = [str(entry.rid) for entry in entries]
        try:
            async with sampling.here():
                answer = await self._generate(body, adapter := self.adapter)
        finally:
            if rid is not None:
                self._row_rids.pop(rid, None)
        flat = generations(answer, n * len(prompts), return_logprob, self.base_url)
        if adapter is not None:
            flat = [_sampled_with(adapter.version, row) for row in flat]
        return [flat[start : start + n] for start in range(0, len(flat), n)]

    async def pause(self, mode: str = "retract") -> None:
        """Stop sampling: "abort" ends what runs, "retract" re-queues it, "in_place" freezes it with its cache."""
        await self._request("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Sample again after `pause` (SGLang's /continue_generation)."""
        await self._request("POST", "/continue_generation", {})

    async def flush_cache(self) -> None:
        """Empty the prefix cache. Raises EngineError when the server refuses, which it does while requests run.

        Without SGLang's `timeout`, which waits until none is there at all: never, where some are held by a pause.
        """
        await self._request("POST", "/flush_cache")

    async def abort(self, rid: str | None = None) -> None:
        """End one request, or all of them when `rid` is None, with the tokens they have."""
        if rid is None:
            await self._request("POST", "/abort_request", {"abort_all": True})
            return
        for one in self._row_rids.get(rid, [rid]):
            await self._request("POST", "/abort_request", {"rid": one})

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
        await self._require_readable(path)
        try:
            await self.pause("retract")
        except EngineError as error:
            raise WeightSyncError(f"weight sync of {path} failed at pause: {error}") from error
        body = {"model_path": path, "weight_version": version, "flush_cache": False}
        try:
            answer = await self._request("POST", "/update_weights_from_disk", body)
            require(isinstance(answer, dict) and answer.get("success") is True, f"{self.base_url}: {answer!r}")
        except EngineError as error:
            raise WeightSyncError(
                f"weight sync of {path} failed at update: {error}. {await self._after_failed_update(version)}"
            ) from error
        try:
            await self.flush_cache()
            served = (await self.model_info()).get("weight_version")
            require(served == version, f"{self.base_url} serves version {served!r}, needs {version!r}")
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


@dataclass(frozen=True)
class Entry:
    """One of the prompts of a /generate request, which may be a request of its own; it answers `rows` continuations."""

    input_ids: list[int]
    sampling_params: dict[str, Any]
    rid: str | None
    rows: int


def entries_of(
    kind: ServerKind, prompt: Sequence[int], params: Mapping[str, Any], n: int, rid: str | None
) -> list[Entry]:
    """What a server is asked for n continuations of a prompt.

    The embedded engine is asked for n rows of it. SGLang gives rows with one seed the same tokens, rows without one too
    (once it heeds seeds), and prefills n-fold prompts one after another: it gets a prompt a row.
    """
    if kind == "embedded":
        return [Entry(list(prompt), {**params, "n": n}, rid, n)]
    rids = [None if rid is None else f"{rid}-{row}" for row in range(n)]
    seeds = [row_seed(params.get("sampling_seed"), row) for row in range(n)]
    return [Entry(list(prompt), {**params, "sampling_seed": seeds[row]}, rids[row], 1) for row in range(n)]


def generations(answers: Any, expected: int, return_logprob: bool, where: str) -> list[Generation]:
    """A /generate answer, which has to be a list of `expected`. Raises EngineError for anything else."""
    if not isinstance(answers, list) or len(answers) != expected:
        found = len(answers) if isinstance(answers, list) else type(answers).__name__
        raise EngineError(f"{where}/generate: asked for {expected} continuations, got {found}")
    return [_generation(answer, return_logprob, where) for answer in answers]


def _sampled_with(version: str, row: Generation) -> Generation:
    """The server reports the version of now for all adapters; a request has the one that it named to its end."""
    spans = [{"version": version, "start": 0, "end": len(row.output_ids)}]
    return dataclasses.replace(row, weight_version=version, weight_versions=spans)


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
