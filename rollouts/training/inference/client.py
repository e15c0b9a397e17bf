"""What the clients of all servers share: the version handshake, and requests that are checked before they are sent."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from rollouts.training import open_files
from rollouts.training.inference.http import EngineError, Generation, HTTPEngine, WeightSyncError
from rollouts.training.inference.loop_lock import LoopLimiter, LoopLock
from rollouts.training.inference.protocol import Server
from rollouts.training.inference.requests import param_problems, per_prompt, prompt_problems
from rollouts.training.inference.weights_on_disk import damage

# Requests that sample, of all clients of this process: each holds a connection until it is answered, and others wait in
# line. What controls an engine never waits here: a paused engine answers nothing until it is told to go on.
sampling = LoopLimiter(open_files.requests_max)


class RequestError(EngineError):
    """A request that was not sent, since no server would answer it rightly: the caller's mistake."""


class EngineClient(HTTPEngine, ABC):
    """An HTTP engine that is asked once what it is, and sent nothing that it may die of. See `InferenceEngine`."""

    _server: Server | None = None

    @cached_property
    def _asking(self) -> LoopLock:
        return LoopLock()

    @cached_property
    def _row_rids(self) -> dict[str, list[str]]:
        """Of the requests in flight that have a rid: what the server knows their rows by."""
        return {}

    async def server(self) -> Server:
        """Kind and version, asked once. Raises EngineError for a version that is not in KNOWN_VERSIONS."""
        if self._server is None:
            async with self._asking.here():  # of many requests at once, one asks
                if self._server is None:
                    self._server = await self._ask_server()
        return self._server

    @abstractmethod
    async def _ask_server(self) -> Server:
        """What the server says it is."""

    @abstractmethod
    async def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Mapping[str, Any]],
        n: int,
        return_logprob: bool,
        rid: str | None,
    ) -> list[list[Generation]]:
        """`n` continuations of each prompt, at least one, with its own params. `rid`: of a single prompt's request."""

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
        await self.check([input_ids], [sampling_params], n)
        (group,) = await self._sample([input_ids], [sampling_params], n, return_logprob, rid)
        return group

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
    ) -> list[list[Generation]]:
        """`n` continuations of each prompt: a list for each prompt, in order.

        `sampling_params` is for all prompts, or a list with one for each (a seed for each, say).
        """
        if not prompts:
            return []
        params = per_prompt(sampling_params, len(prompts))
        await self.check(prompts, params, n)
        return await self._sample(prompts, params, n, return_logprob, None)

    async def check(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]], n: int) -> None:
        """Raise RequestError for what this server would not answer rightly, with all that is wrong."""
        server = await self.server()
        problems = prompt_problems(prompts, server.vocab_size)
        problems += [problem for item in params for problem in param_problems(item, n)]
        problems += [
            f"{len(prompt)} tokens of prompt and max_new_tokens={item['max_new_tokens']}: {server.kind} has room for "
            f"{server.tokens_max} together"
            for prompt, item in zip(prompts, params, strict=True)
            if server.tokens_max is not None
            and isinstance(item.get("max_new_tokens"), int)
            and len(prompt) + item["max_new_tokens"] > server.tokens_max
        ]
        if server.kind == "sglang" and server.seeds and any(item.get("min_p") for item in params):
            problems.append("min_p: SGLang cannot have it beside seeds (--enable-deterministic-inference)")
        if problems:
            raise RequestError(f"{self.base_url}: not sent: {'; '.join(dict.fromkeys(problems))}")

    async def _require_readable(self, checkpoint_path: str) -> None:
        """Raise WeightSyncError for a damaged checkpoint before any server is sent there; it serves on."""
        found = await anyio.to_thread.run_sync(damage, Path(checkpoint_path))
        if found is not None:
            version = (await self.model_info())["weight_version"]
            raise WeightSyncError(
                f"weight sync of {checkpoint_path} failed: {found}. "
                f"{self.base_url} was not sent there, and serves on with version {version!r}"
            )

    @abstractmethod
    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """[T-1] natural log-probs of all but the first of T tokens, at temperature 1."""

    @abstractmethod
    async def model_info(self) -> dict[str, Any]:
        """At least `model_path` and `weight_version` of what is being served."""


async def read_vocab_size(model_path: str) -> int | None:
    """Of a model directory on this machine; None where it cannot be read, as for a server on another one."""
    try:
        config = json.loads(await anyio.Path(Path(model_path) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None
