"""make_generate_fn: one group's samples from inference engines, with the engines' own tokens and log-probs.

Nothing is re-encoded: tokens, log-probs, finish reason and weight version travel together from the engine.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rollouts.training.datasets.chat import render_prompt
from rollouts.training.datasets.turn_end import end_of_turn_ids
from rollouts.training.inference.http import Generation
from rollouts.training.inference.pool.engine_pool import EnginePool
from rollouts.training.inference.pool.group_batcher import GenerationError, GroupBatcher
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt, Sample

if TYPE_CHECKING:
    from torch import nn


def make_generate_fn(
    engines: EnginePool | Sequence[object],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = -1,
    stop_token_ids: Sequence[int] | None = None,
    one_request_per_group: bool = False,
) -> Callable[..., Any]:
    """Return an async `generate_fn(prompts, *, seed)` for RolloutConfig: n copies of one prompt in, n Samples out.

    engines: a pool, or clients such as `weight_sync.SGLangEngine`. Groups go to them in turn, those of a round in one
    request, or each in its own (`one_request_per_group`): such a group is scored while others are still sampled.
    temperature > 0; top_k -1 samples among all tokens. stop_token_ids None: all that end a turn, `stop_ids`. Samples
    hold prompt and response ids, a mask that is 1.0 on the response with its end-of-turn token, one log-prob per
    response token, and metadata: weight_version, finish_reason ("stop" or "length"), prompt_id. Raises GenerationError
    for an aborted one.
    """
    pool = EnginePool.of(engines)
    if not pool:
        raise ValueError("make_generate_fn: engines is empty; needs at least one")
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": stop_ids(tokenizer, stop_token_ids),
    }
    batcher = GroupBatcher(pool, together=not one_request_per_group)

    async def generate_fn(prompts: list[Prompt], *, seed: int) -> list[Sample]:
        assert all(prompt == prompts[0] for prompt in prompts), "a group is one prompt's copies"
        input_ids = render_prompt(tokenizer, prompts[0])
        generations = await batcher.generate(
            input_ids, {**sampling, "sampling_seed": seed}, n=len(prompts)
        )
        if len(generations) != len(prompts):
            raise GenerationError(f"{pool}: {len(generations)} generations for n={len(prompts)}")
        own_id = prompt_id(prompts[0])
        return [
            _sample(prompts[0], own_id, input_ids, generation, pool, tokenizer)
            for generation in generations
        ]

    return generate_fn


def stop_ids(
    tokenizer: Tokenizer, given: Sequence[int] | None, model: "nn.Module | None" = None
) -> list[int]:
    """Return `given`, or else every token that ends a turn: `end_of_turn_ids`, of `model` in memory or as it was saved.

    Raises ValueError for a tokenizer without an eos_token: an engine may then never stop.
    """
    if given is not None:
        return list(given)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no eos_token; give stop_token_ids"
        )
    return end_of_turn_ids(tokenizer, model)


def prompt_id(prompt: Prompt) -> str:
    """Return a short and stable id: a prompt row has the same one in every run."""
    text = json.dumps(prompt, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def refuse_abort(generation: Generation, pool: EnginePool) -> None:
    """Raise GenerationError for an answer that was cut off from outside: it says nothing about the policy."""
    if generation.finish_reason == "abort":
        count, why = len(generation.output_ids), generation.finish_detail.get("message")
        raise GenerationError(f"{pool}: generation aborted after {count} tokens: {why}")


def response_text(generation: Generation, tokenizer: Tokenizer) -> str:
    """Return the engine's text, or the decoded tokens if it has no tokenizer; without special tokens."""
    if generation.text is not None:
        return generation.text
    return tokenizer.decode(generation.output_ids, skip_special_tokens=True)


def version_spans(generation: Generation) -> dict[str, Any]:
    """Return {"weight_versions": [{version, start, end}]}, by response token, if weights changed midway; else {}."""
    spans = generation.weight_versions
    return {"weight_versions": [dict(span) for span in spans]} if len(spans) > 1 else {}


def _sample(  # noqa: PLR0917
    prompt: Prompt,
    own_id: str,
    input_ids: list[int],
    generation: Generation,
    pool: EnginePool,
    tokenizer: Tokenizer,
) -> Sample:
    output_ids, logprobs = list(generation.output_ids), list(generation.logprobs or ())
    refuse_abort(generation, pool)
    if len(logprobs) != len(output_ids):
        raise GenerationError(f"{pool}: {len(logprobs)} log-probs for {len(output_ids)} tokens")
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
