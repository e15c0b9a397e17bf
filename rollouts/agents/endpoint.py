"""Where an agent's policy answers: an engine, its tokenizer, and how it is sampled. Tokens in, tokens out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from rollouts.training.datasets.turn_end import TurnEnds, end_of_turn_ids
from rollouts.training.inference.http import Generation
from rollouts.training.inference.sglang_client import SGLangEngine
from rollouts.training.seams import Tokenizer


class Sampler(Protocol):
    """The one method that an endpoint calls of an engine's client, or of a pool."""

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        return_logprob: bool = True,
    ) -> list[list[Generation]]:
        """Return `n` continuations of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """`engine`: the URL of an SGLang (or embedded) server, or a client such as `weight_sync.SGLangEngine`.

    `max_new_tokens` bounds one turn. `tool_format`: how the model writes its tool calls (`tool_calls.FORMATS`).
    """

    engine: str | Sampler
    tokenizer: Tokenizer
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    tool_format: str = "hermes"
    stop_token_ids: Sequence[int] | None = None  # None: every token that ends a turn

    @cached_property
    def client(self) -> Sampler:
        return SGLangEngine(self.engine) if isinstance(self.engine, str) else self.engine

    @cached_property
    def stops(self) -> list[int]:
        if self.stop_token_ids is not None:
            return list(self.stop_token_ids)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no eos_token; give stop_token_ids"
            )
        return end_of_turn_ids(self.tokenizer)

    @cached_property
    def turn_ends(self) -> TurnEnds:
        return TurnEnds.from_tokenizer(self.tokenizer)

    async def sample(
        self, token_ids: Sequence[int], *, seed: int, max_new_tokens: int | None = None
    ) -> Generation:
        """Sample one continuation of `token_ids`; `max_new_tokens` None: the endpoint's."""
        params = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "max_new_tokens": self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            "stop_token_ids": self.stops,
            "sampling_seed": seed,
        }
        [[generation]] = await self.client.generate_batch(
            [list(token_ids)], [params], n=1, return_logprob=True
        )
        return generation
