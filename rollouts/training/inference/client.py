"""`EngineClient`: the base of all clients. It asks for the version, and checks requests before they are sent."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from rollouts.training import open_files
from rollouts.training.inference.http import EngineError, Generation, HTTPClient, WeightSyncError
from rollouts.training.inference.inference_engine import ServerInfo
from rollouts.training.inference.loop_lock import LoopLimiter, LoopLock
from rollouts.training.inference.requests import param_problems, prompt_problems
from rollouts.training.inference.weight_routes import WeightRoutes
from rollouts.training.inference.weights_on_disk import damage

# Limits the requests that sample, of all clients of this process: each holds a connection until it is answered.
# Requests that control an engine never wait here: a paused engine answers nothing until it is told to go on.
sampling = LoopLimiter(open_files.requests_max)


class RequestError(EngineError):
    """A request that was not sent, since no server can answer it correctly: the caller's mistake."""


class EngineClient(HTTPClient, ABC):
    """A client that knows its server's version and sends nothing that the server may die of. See `InferenceEngine`."""

    _server: ServerInfo | None = None

    @cached_property
    def weights(self) -> WeightRoutes | None:
        """Return its routes for weights sent piece by piece. None: it takes new weights from checkpoints alone."""
        return None

    @cached_property
    def _asking(self) -> LoopLock:
        return LoopLock()

    @cached_property
    def _row_rids(self) -> dict[str, list[str]]:
        """Return the names of the rows of each request in flight, by its rid."""
        return {}

    async def server(self) -> ServerInfo:
        """Return kind and version, asked once. Raises EngineError for a version that is not in KNOWN_VERSIONS."""
        if self._server is None:
            async with self._asking.here():  # one of many requests asks
                if self._server is None:
                    self._server = await self._ask_server()
        return self._server

    @abstractmethod
    async def _ask_server(self) -> ServerInfo:
        """Return what the server says about itself."""

    @abstractmethod
    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[list[Generation]]:
        """Return `n` continuations of each prompt: a list for each prompt, in order. `rid` names them for `abort`.

        `sampling_params` are for all prompts, or a list with one for each (a seed for each, say).
        """

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[Generation]:
        """Return `n` continuations of one prompt, in sampling order. `sampling_params` as SGLang names them."""
        (group,) = await self.generate_batch(
            [input_ids], [sampling_params], n=n, return_logprob=return_logprob, rid=rid
        )
        return group

    async def check(
        self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]], n: int
    ) -> None:
        """Raise RequestError for a request that this server cannot answer correctly. It names every reason."""
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
            problems.append(
                "min_p: SGLang cannot have it beside seeds (--enable-deterministic-inference)"
            )
        if problems:
            raise RequestError(f"{self.base_url}: not sent: {'; '.join(dict.fromkeys(problems))}")

    async def _require_readable(self, checkpoint_path: str) -> None:
        """Raise WeightSyncError for a damaged checkpoint, before the server reads it: the server serves on."""
        found = await anyio.to_thread.run_sync(damage, Path(checkpoint_path))
        if found is not None:
            version = (await self.model_info())["weight_version"]
            raise WeightSyncError(
                f"weight sync of {checkpoint_path} failed: {found}. "
                f"{self.base_url} was not told to load it, and serves on with version {version!r}"
            )

    @abstractmethod
    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Return [T-1] natural log-probs of all but the first of T tokens, at temperature 1."""

    @abstractmethod
    async def model_info(self) -> dict[str, Any]:
        """Return at least `model_path` and `weight_version` of the weights being served."""


async def read_vocab_size(model_path: str) -> int | None:
    """Return the vocabulary size of a model directory; None if it cannot be read, as for a server elsewhere."""
    try:
        config = json.loads(await anyio.Path(Path(model_path) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None
