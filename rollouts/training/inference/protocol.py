"""What the RL loop, evaluation and agents need of an inference server, whichever it is, and the versions we know.

The clients meet it: `SGLangEngine` (SGLang and the embedded engine) and `VLLMEngine`. Where servers differ, the client
evens it out; what cannot be evened out is in docs/engines.md, and held to be true by tests/engines/contract_servers.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rollouts.training.inference.http import EngineError, Generation

ServerKind = Literal["embedded", "sglang", "vllm"]
PauseMode = Literal["abort", "retract", "in_place"]

# The one place. The contract suite (scripts/contract) ran on each of these; SGLang's and vLLM's on a CPU.
KNOWN_VERSIONS: Mapping[ServerKind, tuple[str, ...]] = {
    "embedded": ("1",),  # rollouts.engines.embedded.generate_request.VERSION
    "sglang": ("0.5.21",),
    "vllm": ("0.32.0",),
}


@dataclass(frozen=True)
class Server:
    """What a server says it is."""

    kind: ServerKind
    version: str
    seeds: bool  # whether a request's sampling_seed decides its tokens
    vocab_size: int | None  # None: not known
    tokens_max: int | None  # prompt and answer together; None: not known


class InferenceEngine(Protocol):
    """A client of one running server. Every call ends within the client's time limit, or raises EngineError."""

    base_url: str

    async def server(self) -> Server:
        """Kind and version, asked once. Raises EngineError for a version that is not in KNOWN_VERSIONS."""
        ...

    async def health(self) -> bool:
        """Whether it answers and says it can serve; never raises for one that is down."""
        ...

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once healthy. Raises EngineError after `timeout_s`."""
        ...

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        *,
        n: int = 1,
        return_logprob: bool = True,
        rid: str | None = None,
    ) -> list[Generation]:
        """`n` continuations of one prompt, in sampling order; `rid` is for `abort`.

        `sampling_params`, SGLang's names: temperature, top_p, top_k (-1: all), min_p, max_new_tokens, stop_token_ids,
        ignore_eos, sampling_seed: the n rows draw from different streams, the first from the seed's own.
        """
        ...

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
    ) -> list[list[Generation]]:
        """`n` continuations of each prompt; `sampling_params` for all, or a list with one for each."""
        ...

    async def input_logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """[T-1] natural log-probs of all but the first of T tokens, at temperature 1: what proves new weights."""
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
        """End one request, or all where `rid` is None; they answer with the tokens they have."""
        ...

    async def model_info(self) -> dict[str, Any]:
        """At least `model_path` and `weight_version`."""
        ...

    async def update_weights_from_checkpoint(
        self, checkpoint_path: str, weight_version: str | None = None
    ) -> dict[str, Any]:
        """Serve a Hugging Face directory's weights, proven; {"success": True, "weight_version": ...}."""
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...


def check_version(url: str, kind: ServerKind, version: object) -> str:
    """`version`, if it is one we know. Raises EngineError with what was found, what is known, and the fix."""
    known = KNOWN_VERSIONS[kind]
    plain = str(version).split("+")[0]  # a local build's suffix, as in 0.32.0+cpu
    if plain not in known:
        raise EngineError(
            f"{url}: {kind} {version} is not a version this client knows.\n"
            f"  known   {', '.join(known)}\n"
            "  fix     install one of these (requirements/ has the locks), or read the new version's routes, run "
            "scripts/contract on it, and add it to KNOWN_VERSIONS in rollouts/training/inference/protocol.py"
        )
    return plain
