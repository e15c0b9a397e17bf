"""`InferenceEngine`: what a pool needs of a client, whichever server it speaks to.

`SGLangEngine` (SGLang and the embedded engine) and `VLLMEngine` meet it. Where servers differ, the client evens it out.
docs/reference/engines.md lists the remaining differences, and tests/engines/contract_servers.py tests them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rollouts.training.inference.http import Generation, WeightSyncError
from rollouts.training.inference.weight_routes import WeightRoutes

ServerKind = Literal["embedded", "sglang", "vllm"]
PauseMode = Literal["abort", "retract", "in_place"]


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself."""

    kind: ServerKind
    version: str
    seeds: bool  # a request's sampling_seed decides its tokens
    vocab_size: int | None  # None: unknown
    tokens_max: int | None  # prompt and answer together; None: unknown


class InferenceEngine(Protocol):
    """A client of one running server. Every call ends within the client's time limit, or raises EngineError."""

    @property
    def base_url(self) -> str: ...

    @property
    def weights(self) -> WeightRoutes | None:
        """Return its routes for weights sent piece by piece. None: it takes new weights from checkpoints alone."""
        ...

    async def server(self) -> ServerInfo:
        """Return kind and version, asked once. Raises EngineError for a version that is not in KNOWN_VERSIONS."""
        ...

    async def health(self) -> bool:
        """Return whether it answers and says it can serve. Never raises for one that is down."""
        ...

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once healthy. Raises EngineError after `timeout_s`."""
        ...

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[list[Generation]]:
        """Return `n` continuations of each prompt, in sampling order. `rid` names the request for `abort`.

        `sampling_params` are for all prompts, or a list with one for each. They have SGLang's names: temperature,
        top_p, top_k (-1: all), min_p, max_new_tokens, stop_token_ids, ignore_eos, sampling_seed. The n rows of a prompt
        draw from different streams; the first row draws from the seed's own.
        """
        ...

    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float] | None:
        """Return [T-1] natural log-probs of all but the first of T tokens, at temperature 1: they prove new weights.

        None: this engine cannot score.
        """
        ...

    async def pause(self, mode: PauseMode = "retract") -> None:
        """Stop sampling: "abort" ends what runs, "retract" re-queues it, "in_place" freezes it with its cache."""
        ...

    async def resume(self) -> None:
        """Sample again after `pause`."""
        ...

    async def flush_cache(self) -> None:
        """Empty the prefix cache. Raises EngineError when the server refuses."""
        ...

    async def abort(self, rid: str | None = None) -> None:
        """End one request, or all if `rid` is None. They answer with the tokens sampled so far."""
        ...

    async def model_info(self) -> dict[str, Any]:
        """Return at least `model_path` and `weight_version`."""
        ...

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]:
        """Serve a Hugging Face directory's weights, and prove it. Return {"success": True, "weight_version": ...}."""
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...


def routes_of(client: InferenceEngine) -> WeightRoutes:
    """Return the client's routes for weights. Raises WeightSyncError if its server lacks them."""
    if client.weights is None:
        raise WeightSyncError(
            f"{client.base_url}: takes new weights from a checkpoint alone: set engine.weight_sync=DiskSync(...)"
        )
    return client.weights
