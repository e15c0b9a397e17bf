"""make_generate_fn: one group's samples from an inference engine, with the engine's own tokens and log-probs.

Nothing is re-encoded: tokens, log-probs, finish reason and weight version travel together from the engine.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from rollouts.training.datasets.chat import render_prompt
from rollouts.training.types import Prompt, Sample


class GenerationError(RuntimeError):
    """An engine gave something that must not be trained on: an aborted or incomplete group."""


def make_generate_fn(
    engines: Sequence[Any],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = -1,
    stop_token_ids: Sequence[int] | None = None,
) -> Callable[..., Any]:
    """An async `generate_fn(prompts, *, seed)` for RolloutConfig: n copies of one prompt in, n Samples out.

    engines: clients such as `weight_sync.SGLangEngine`; groups go to them in turn, one request a group. temperature
    > 0; top_k -1 samples among all tokens. stop_token_ids None: the tokenizer's eos_token. Samples hold prompt and
    response ids, a mask that is 1.0 on the response with its end-of-turn token, one log-prob per response token, and
    metadata: weight_version, finish_reason ("stop" or "length"), prompt_id. Raises GenerationError for an aborted one.
    """
    if not engines:
        raise ValueError("make_generate_fn: engines is empty; needs at least one")
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": stop_ids(tokenizer, stop_token_ids),
    }
    turns = itertools.cycle(engines)

    async def generate_fn(prompts: list[Prompt], *, seed: int) -> list[Sample]:
        assert all(prompt == prompts[0] for prompt in prompts), "a group is one prompt's copies"
        engine = next(turns)
        input_ids = render_prompt(tokenizer, prompts[0])
        generations = await engine.generate(
            input_ids=input_ids,
            sampling_params={**sampling, "sampling_seed": seed},
            n=len(prompts),
            return_logprob=True,
        )
        if len(generations) != len(prompts):
            raise GenerationError(f"{engine}: {len(generations)} generations for n={len(prompts)}")
        return [_sample(prompts[0], input_ids, generation, engine, tokenizer) for generation in generations]

    return generate_fn


def stop_ids(tokenizer: Any, given: Sequence[int] | None) -> list[int]:
    """`given`, or else the tokenizer's end token. Raises ValueError where there is neither: nothing would ever stop."""
    if given is not None:
        return list(given)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token; give stop_token_ids")
    return [tokenizer.eos_token_id]


def prompt_id(prompt: Prompt) -> str:
    """Short and stable: the same prompt row has the same id in every run."""
    text = json.dumps(prompt, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def refuse_abort(generation: Any, engine: Any) -> None:
    """Raise GenerationError for an answer that was cut off from outside: it says nothing about the policy."""
    if generation.finish_reason == "abort":
        count, why = len(generation.output_ids), generation.finish_detail.get("message")
        raise GenerationError(f"{engine}: generation aborted after {count} tokens: {why}")


def response_text(generation: Any, tokenizer: Any) -> str:
    """The engine's text, or what its tokens decode to where the engine has no tokenizer; without special tokens."""
    if generation.text is not None:
        return generation.text
    return tokenizer.decode(generation.output_ids, skip_special_tokens=True)


def _sample(prompt: Prompt, input_ids: list[int], generation: Any, engine: Any, tokenizer: Any) -> Sample:
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
            "prompt_id": prompt_id(prompt),
        },
        response_length=len(output_ids),
    )
