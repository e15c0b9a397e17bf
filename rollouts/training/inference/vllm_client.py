"""Client of a vLLM server, started with VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs.

Read from vllm 0.32.0: entrypoints/scale_out/token_in_token_out (/inference/v1/generate), entrypoints/rl/online (pauses,
aborts, versions), entrypoints/serve/dev (collective_rpc, reset_prefix_cache).
"""

import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from rollouts.training.inference.client import EngineClient, RequestError, read_vocab_size, sampling
from rollouts.training.inference.http import EngineError, Generation, WeightSyncError, require
from rollouts.training.inference.inference_engine import ServerInfo
from rollouts.training.inference.known_versions import check_version
from rollouts.training.inference.requests import per_prompt, row_seed

PAUSE_MODES = {"abort": "abort", "retract": "keep", "in_place": "keep"}
NEW_TOKENS_DEFAULT = 128  # SGLang's; vLLM's own is 16
REQUEST_ID_PREFIX = "generate-tokens-"  # what the server puts before a request_id


class VLLMEngine(EngineClient):
    """Client of a vLLM server: token ids in and out, and the same calls as `SGLangEngine` has.

    vLLM's log-probs are of the distribution that it samples from. So it refuses them beside top_k, top_p or min_p,
    where other servers' log-probs are of the whole distribution.
    """

    def __init__(self, base_url: str, **options: Any) -> None:
        """Take `options` as HTTPClient does: timeout_s, api_key, admin_key."""
        super().__init__(base_url, **options)
        self._given = ("", "")  # the newest version that this client gave, and its directory

    async def _ask_server(self) -> ServerInfo:
        answer = await self.request("GET", "/version")
        version = answer.get("version") if isinstance(answer, dict) else answer
        known = check_version(self.base_url, "vllm", version)
        started = await self._started_with()
        return ServerInfo(
            "vllm",
            known,
            True,
            await read_vocab_size(started["root"]),
            started.get("max_model_len"),
        )

    async def _started_with(self) -> dict[str, Any]:
        """Return {root, the model that the server was started with, max_model_len, ...}: it never changes."""
        answer = await self.request("GET", "/v1/models")
        try:
            found: dict[str, Any] = answer["data"][0]
            require(
                isinstance(found["root"], str), f"{self.base_url}/v1/models: root={found['root']!r}"
            )
            return found
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{self.base_url}/v1/models: an answer without {error}: {answer!r:.200}"
            ) from error

    # --- sampling ---

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[list[Generation]]:
        """Return `n` continuations of each prompt, by an HTTP request for each row: it takes a single prompt, and no
        more rows than the server runs. See `EngineClient`.
        """
        if not prompts:
            return []
        params = per_prompt(sampling_params, len(prompts))
        await self.check(prompts, params, n)
        if return_logprob and any(_filters(item) for item in params):
            raise RequestError(
                f"{self.base_url}: not sent: vLLM's log-probs beside top_k, top_p or min_p are of the filtered "
                "distribution, not of the model's: leave them out, or return_logprob=False"
            )
        name = rid or uuid.uuid4().hex
        rows = [
            (prompt, item, row)
            for prompt, item in zip(prompts, params, strict=True)
            for row in range(n)
        ]
        rids = [f"{name}-{index}" for index in range(len(rows))]
        found: dict[int, Generation] = {}
        errors: list[EngineError] = []

        async def ask(index: int) -> None:
            prompt, item, row = rows[index]
            try:
                found[index] = await self._ask(
                    prompt, vllm_params(item, row, return_logprob), rids[index]
                )
            except EngineError as error:  # raised below as it is, not in an exception group
                errors.append(error)
                tasks.cancel_scope.cancel()

        self._row_rids[name] = rids
        try:
            async with anyio.create_task_group() as tasks:
                for index in range(len(rows)):
                    tasks.start_soon(ask, index)
        finally:
            self._row_rids.pop(name, None)
        if errors:
            raise errors[0]
        return [
            [found[index] for index in range(start, start + n)] for start in range(0, len(rows), n)
        ]

    async def _ask(self, prompt: Sequence[int], params: Mapping[str, Any], rid: str) -> Generation:
        body = {"request_id": rid, "token_ids": list(prompt), "sampling_params": params}
        async with sampling.here():
            answer = await self.request("POST", "/inference/v1/generate", body)
        try:
            (choice,) = answer["choices"]
            return _generation(
                choice, answer["usage"], params["logprobs"] is not None, self.base_url
            )
        except (KeyError, TypeError, ValueError) as error:
            shown = f"{answer!r:.200}"
            raise EngineError(
                f"{self.base_url}/inference/v1/generate: an answer without {error}: {shown}"
            ) from error

    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Return [T-1] natural log-probs of all but the first of T tokens, at temperature 1. It samples a token too."""
        params = {**vllm_params({"max_new_tokens": 1}, 0, False), "prompt_logprobs": 0}
        body = {"token_ids": list(input_ids), "sampling_params": params}
        answer = await self.request("POST", "/inference/v1/generate", body)
        try:
            entries = answer["prompt_logprobs"]
            pairs = zip(input_ids[1:], entries[1:], strict=True)
            return [float(entry[str(token)]["logprob"]) for token, entry in pairs]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self.base_url}/inference/v1/generate: an answer without {error}"
            ) from error

    async def pause(self, mode: str = "retract") -> None:
        """Stop sampling: "abort" ends what runs, "in_place" freezes it with its cache, "retract" drops that."""
        await self.request("POST", f"/pause?mode={PAUSE_MODES[mode]}&clear_cache=false")
        if mode == "retract":
            await self._reset_prefix_cache(running=True)

    async def resume(self) -> None:
        """Sample again after `pause`."""
        await self.request("POST", "/resume")

    async def flush_cache(self) -> None:
        """Empty the prefix cache. Raises EngineError when the server refuses, which it does while requests hold it."""
        await self._reset_prefix_cache(running=False)

    async def _reset_prefix_cache(self, *, running: bool) -> None:
        flag = str(running).lower()
        answer = await self.request("POST", f"/reset_prefix_cache?reset_running_requests={flag}")
        done = isinstance(answer, dict) and answer.get("success") is True
        require(
            done,
            f"{self.base_url}/reset_prefix_cache: refused to flush: requests hold it ({answer!r})",
        )

    async def abort(self, rid: str | None = None) -> None:
        """End one request, or all if `rid` is None. They answer with the tokens sampled so far."""
        ids = (
            []
            if rid is None
            else [REQUEST_ID_PREFIX + one for one in self._row_rids.get(rid, [rid])]
        )
        await self.request("POST", "/abort_requests", {"request_ids": ids})

    # --- weights ---

    async def model_info(self) -> dict[str, Any]:
        """Return `model_path`, started with or given last by this client, and `weight_version`."""
        version = await self._weight_version()
        given, path = self._given
        return {
            "model_path": path if given == version else (await self._started_with())["root"],
            "weight_version": version,
        }

    async def _weight_version(self) -> str:
        info = await self.request("GET", "/weight_info")
        require(
            isinstance(info, dict) and bool(info.get("weight_version")),
            f"{self.base_url}/weight_info: {info!r}",
        )
        return str(info["weight_version"])

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]:
        """Serve a checkpoint's weights, as `SGLangEngine` does. vLLM lacks a disk route: its workers reload, and then
        get the version's name.

        Raises WeightSyncError. The engine is then left paused, unless the checkpoint is damaged, which is checked
        first. The proof is that every worker's reload returned, and that the version is read back.
        """
        path = str(Path(checkpoint_path).absolute())
        version = weight_version or f"{Path(path).name}-{uuid.uuid4().hex[:8]}"
        await self._require_readable(path)
        reload = {
            "method": "reload_weights",
            "kwargs": {"weights_path": path},
            "timeout": self.timeout_s,
        }
        try:
            await self.pause("retract")
            await self.request("POST", "/collective_rpc", reload)
            await self.flush_cache()
            await self.request("POST", "/update_weight_version", {"new_version": version})
            served = await self._weight_version()
            require(
                served == version, f"{self.base_url} serves version {served!r}, needs {version!r}"
            )
            await self.resume()
        except EngineError as error:
            raise WeightSyncError(
                f"weight sync of {path} failed: {error}. The engine is left paused"
            ) from error
        self._given = (version, path)
        return {"success": True, "message": f"reloaded from {path}", "weight_version": version}


def vllm_params(params: Mapping[str, Any], row: int, return_logprob: bool) -> dict[str, Any]:
    """Translate SGLang's sampling_params into vLLM's, for one row of n.

    It sets every field that the model's generation_config would otherwise override.
    """
    given = {name: value for name, value in params.items() if value is not None}
    top_k = given.get("top_k", -1)
    return {
        "n": 1,
        "temperature": given.get("temperature", 1.0),
        "top_p": given.get("top_p", 1.0),
        "top_k": 0 if top_k == -1 else top_k,
        "min_p": given.get("min_p", 0.0),
        "repetition_penalty": 1.0,
        "max_tokens": given.get("max_new_tokens", NEW_TOKENS_DEFAULT),
        "seed": row_seed(given.get("sampling_seed"), row),
        "stop_token_ids": list(given.get("stop_token_ids", ())),
        "ignore_eos": given.get("ignore_eos", False),
        "skip_special_tokens": given.get("skip_special_tokens", True),
        "logprobs": 0 if return_logprob else None,  # of the sampled token alone
    }


def _filters(params: Mapping[str, Any]) -> bool:
    return (
        params.get("top_k", -1) != -1
        or params.get("top_p", 1.0) != 1.0
        or bool(params.get("min_p"))
    )


def _generation(
    choice: Mapping[str, Any], usage: Mapping[str, Any], return_logprob: bool, where: str
) -> Generation:
    """Return one choice of an answer. Raises EngineError if ids and log-probs do not belong together."""
    output_ids = list(choice["token_ids"] or ())
    logprobs = None
    if return_logprob:
        entries = (choice["logprobs"] or {}).get("content") or []
        logprobs = [float(entry["logprob"]) for entry in entries]
        same = [entry["token_id"] for entry in entries] == output_ids
        require(
            same and all(map(math.isfinite, logprobs)),
            f"{where}: the log-probs are not finite ones of the ids",
        )
    reason = choice["finish_reason"]
    detail: dict[str, Any] = {"type": reason}
    if reason == "stop":
        detail["matched"] = output_ids[-1]
    elif reason == "length":
        detail["length"] = len(output_ids)
    else:
        detail["message"] = "aborted"
    spans = [dict(span) for span in choice.get("weight_versions") or ()]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Generation(
        output_ids=output_ids,
        logprobs=logprobs,
        finish_reason=reason,
        finish_detail=detail,
        weight_version=str(spans[-1]["version"]) if spans else "",
        weight_versions=spans,
        text=None,  # the route speaks tokens alone; the caller may decode them
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=cached,
    )
