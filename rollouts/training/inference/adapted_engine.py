"""Take engines of the user's own: objects with some of the calls of `InferenceEngine`, adapted once."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rollouts.training.inference.http import EngineError, Generation
from rollouts.training.inference.inference_engine import InferenceEngine, PauseMode, ServerInfo
from rollouts.training.inference.sglang_client import SGLangEngine
from rollouts.training.inference.vllm_client import VLLMEngine
from rollouts.training.inference.weight_routes import WeightRoutes


def as_client(engine: object) -> InferenceEngine:
    """Return a client of ours as it is, and any other engine adapted."""
    return engine if isinstance(engine, SGLangEngine | VLLMEngine) else AdaptedEngine(engine)


class AdaptedEngine:
    """An `InferenceEngine` over an object that may have only `update_weights_from_checkpoint` or `generate_batch`.

    `abort` does nothing and `input_logprobs` returns None if the object lacks them. Other missing calls raise
    EngineError.
    """

    def __init__(self, given: object) -> None:
        self._given = given

    def __repr__(self) -> str:
        return repr(self._given)

    @property
    def base_url(self) -> str:
        return self._find("base_url") or repr(self._given)

    @property
    def weights(self) -> WeightRoutes | None:
        return cast(WeightRoutes | None, self._find("weights"))

    def _find(self, name: str) -> Any:
        return getattr(self._given, name, None)

    def _method(self, name: str) -> Any:
        method = self._find(name)
        if method is None:
            raise EngineError(f"{self.base_url}: this engine lacks {name}()")
        return method

    async def server(self) -> ServerInfo:
        return cast(ServerInfo, await self._method("server")())

    async def health(self) -> bool:
        return bool(await self._method("health")())

    async def wait_ready(self, timeout_s: float) -> None:
        await self._method("wait_ready")(timeout_s)

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[list[Generation]]:
        named = {} if rid is None else {"rid": rid}
        generate = self._method("generate_batch")
        groups = await generate(
            prompts, sampling_params, n=n, return_logprob=return_logprob, **named
        )
        return cast(list[list[Generation]], groups)

    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float] | None:
        score = self._find("input_logprobs")
        return None if score is None else list(await score(input_ids))

    async def pause(self, mode: PauseMode = "retract") -> None:
        await self._method("pause")(mode)

    async def resume(self) -> None:
        await self._method("resume")()

    async def flush_cache(self) -> None:
        await self._method("flush_cache")()

    async def abort(self, rid: str | None = None) -> None:
        abort = self._find("abort")
        if abort is not None:
            await (abort() if rid is None else abort(rid))

    async def model_info(self) -> dict[str, Any]:
        return cast(dict[str, Any], await self._method("model_info")())

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]:
        update = self._method("update_weights_from_checkpoint")
        takes_version = "weight_version" in inspect.signature(update).parameters
        named = (
            {"weight_version": weight_version}
            if takes_version and weight_version is not None
            else {}
        )
        return cast(dict[str, Any], await update(checkpoint_path, **named))

    async def aclose(self) -> None:
        close = self._find("aclose")
        if close is not None:
            await close()
