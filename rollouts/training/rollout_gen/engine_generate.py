"""make_generate_fn: one group's samples from an inference engine, with the engine's own tokens and log-probs.

Nothing is re-encoded: tokens, log-probs, finish reason and weight version travel together from the engine.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel

from rollouts.training.datasets.chat import render_prompt
from rollouts.training.datasets.turn_end import end_of_turn_ids
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt, Sample


class GenerationError(RuntimeError):
    """An engine gave something that must not be trained on: an aborted or incomplete group."""


def make_generate_fn(
    engines: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = -1,
    stop_token_ids: Sequence[int] | None = None,
    apart: bool = False,
) -> Callable[..., Any]:
    """An async `generate_fn(prompts, *, seed)` for RolloutConfig: n copies of one prompt in, n Samples out.

    engines: clients such as `weight_sync.SGLangEngine`; groups go to them in turn, those of a round in one request, or
    each in its own (`apart`): a group is then scored as soon as it is there, while others are sampled.
    temperature > 0; top_k -1 samples among all tokens. stop_token_ids None: all that end a turn, `stop_ids`. Samples
    hold prompt and response ids, a mask that is 1.0 on the response with its end-of-turn token, one log-prob per
    response token, and metadata: weight_version, finish_reason ("stop" or "length"), prompt_id. Raises GenerationError
    for an aborted one.
    """
    if not engines:
        raise ValueError("make_generate_fn: engines is empty; needs at least one")
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": stop_ids(tokenizer, stop_token_ids),
    }
    turns = itertools.cycle([Together(engine) for engine in engines])

    async def generate_fn(prompts: list[Prompt], *, seed: int) -> list[Sample]:
        assert all(prompt == prompts[0] for prompt in prompts), "a group is one prompt's copies"
        together = Together(next(turns).engine) if apart else next(turns)
        input_ids = render_prompt(tokenizer, prompts[0])
        generations = await together.generate(input_ids, {**sampling, "sampling_seed": seed}, n=len(prompts))
        if len(generations) != len(prompts):
            raise GenerationError(f"{together.engine}: {len(generations)} generations for n={len(prompts)}")
        own_id = prompt_id(prompts[0])
        return [
            _sample(prompts[0], own_id, input_ids, generation, together.engine, tokenizer) for generation in generations
        ]

    return generate_fn


@dataclass
class _Ask:
    """One group's request, and what came of it."""

    input_ids: list[int]
    sampling_params: dict[str, Any]
    n: int
    answered: anyio.Event
    generations: list[Any] | None = None  # None once answered: the request that carried it failed


class Together:
    """Sends the groups that are asked for at the same moment to one engine as one batch request.

    A round's groups start together and are awaited together; with a small model, a request for each of them costs more
    than sampling does (32 groups of 8 x 8 tokens: 200 ms against 80 ms). The first group of a moment sends for all.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._asks: list[_Ask] = []

    async def generate(self, input_ids: list[int], sampling_params: dict[str, Any], *, n: int) -> list[Any]:
        """The group's generations. The group that sends raises what the engine raised, the others GenerationError."""
        ask = _Ask(input_ids, sampling_params, n, anyio.Event())
        if self._asks:
            self._asks.append(ask)
            await ask.answered.wait()
            if ask.generations is None:
                raise GenerationError(f"{self.engine}: the request that carried this group failed")
            return ask.generations
        asks = self._asks = [ask]
        try:
            await anyio.lowlevel.checkpoint()  # the others of this moment ask now
            self._asks = []
            await self._send(asks)
        finally:
            if self._asks is asks:  # cancelled before it was sent
                self._asks = []
            for one in asks:
                one.answered.set()
        assert ask.generations is not None
        return ask.generations

    async def _send(self, asks: Sequence[_Ask]) -> None:
        n = asks[0].n
        assert all(ask.n == n for ask in asks), "one RolloutConfig, one number of samples"
        groups = await self.engine.generate_batch(
            [ask.input_ids for ask in asks], [ask.sampling_params for ask in asks], n=n, return_logprob=True
        )
        if len(groups) != len(asks):
            raise GenerationError(f"{self.engine}: {len(groups)} groups for {len(asks)} prompts")
        for ask, generations in zip(asks, groups, strict=True):
            ask.generations = generations


def stop_ids(tokenizer: Tokenizer, given: Sequence[int] | None, model: Any = None) -> list[int]:
    """`given`, or else every token that ends a turn: `end_of_turn_ids`, of `model` in memory or as it was saved.

    Raises ValueError for a tokenizer without an eos_token: whoever serves such a model may know no end at all.
    """
    if given is not None:
        return list(given)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token; give stop_token_ids")
    return end_of_turn_ids(tokenizer, model)


def prompt_id(prompt: Prompt) -> str:
    """Short and stable: the same prompt row has the same id in every run."""
    text = json.dumps(prompt, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def refuse_abort(generation: Any, engine: Any) -> None:
    """Raise GenerationError for an answer that was cut off from outside: it says nothing about the policy."""
    if generation.finish_reason == "abort":
        count, why = len(generation.output_ids), generation.finish_detail.get("message")
        raise GenerationError(f"{engine}: generation aborted after {count} tokens: {why}")


def response_text(generation: Any, tokenizer: Tokenizer) -> str:
    """The engine's text, or what its tokens decode to where the engine has no tokenizer; without special tokens."""
    if generation.text is not None:
        return generation.text
    return tokenizer.decode(generation.output_ids, skip_special_tokens=True)


def version_spans(generation: Any) -> dict[str, Any]:
    """{"weight_versions": [{version, start, end}]}, by response token, where the weights changed midway; else {}."""
    spans = generation.weight_versions
    return {"weight_versions": [dict(span) for span in spans]} if len(spans) > 1 else {}


def _sample(  # noqa: PLR0917
    prompt: Prompt, own_id: str, input_ids: list[int], generation: Any, engine: Any, tokenizer: Tokenizer
) -> Sample:
    output_ids, logprobs = list(generation.output_ids), list(generation.logprobs or ())
    refuse_abort(generation, engine)
    if len(logprobs) != len(output_ids):
        raise GenerationError(f"{engine}: {len(logprobs)} log-probs for {len(output_ids)} tokens")
    return Sample(
        prompt=prompt,
        response=response_text(generation, tokenizer),
        tokens=[*input_ids, *output_ids],
        loss_mask=[0.0] * len(input_ids) + [1.0] * len(output_ids),
        rollout_log_probs=logprobs,
        metadata={
            "weight_version": generation.weight_version,
            "finish_reason": generation.finish_reason,
            "prompt_id": own_id,
            **version_spans(generation),
        },
        response_length=len(output_ids),
    )
