"""Check a generation request before it is sent. Pure.

Servers differ in what they refuse, and some die instead: an id outside the vocabulary, an empty prompt, or min_p beside
a seed ends an SGLang 0.5.21 process.
"""

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

SEEDS = 2**63

# Those of SGLang's sampling_params that every server has. Each may be left out.
PARAMS = (
    *("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "sampling_seed"),
    *("stop_token_ids", "ignore_eos", "skip_special_tokens"),
)


def prompt_problems(prompts: Sequence[Sequence[int]], vocab_size: int | None) -> list[str]:
    """Return what is wrong with each bad prompt. `vocab_size` None: unknown, so only negative ids are found."""
    problems = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            problems.append(f"prompt {index}: empty; needs at least one token")
        elif not all(type(token) is int for token in prompt):
            problems.append(f"prompt {index}: needs integers")
        elif min(prompt) < 0 or (vocab_size is not None and max(prompt) >= vocab_size):
            bad = next(
                token
                for token in prompt
                if token < 0 or (vocab_size is not None and token >= vocab_size)
            )
            allowed = "ids >= 0" if vocab_size is None else f"0 to {vocab_size - 1}"
            problems.append(
                f"prompt {index}: token id {bad} is outside the vocabulary, needs {allowed}"
            )
    return problems


def param_problems(params: Mapping[str, Any], n: int) -> list[str]:
    """Return what is wrong with one prompt's sampling_params, or with `n`."""
    unknown = sorted(set(params) - set(PARAMS))
    problems = [f"{name}: not known; known are {', '.join(PARAMS)}" for name in unknown]
    if type(n) is not int or n < 1:
        problems.append(f"n={n!r}: needs >= 1")
    checks = {
        "temperature": (lambda value: _number(value) and value >= 0, "a finite number >= 0"),
        "top_p": (lambda value: _number(value) and 0 < value <= 1, "0 < top_p <= 1"),
        "top_k": (
            lambda value: type(value) is int and (value == -1 or value >= 1),
            "an integer >= 1, or -1 for all",
        ),
        "min_p": (lambda value: _number(value) and 0 <= value <= 1, "0 <= min_p <= 1"),
        "max_new_tokens": (lambda value: type(value) is int and value >= 1, "an integer >= 1"),
        "sampling_seed": (
            lambda value: type(value) is int and 0 <= value < SEEDS,
            "0 to 2**63 - 1",
        ),
        "stop_token_ids": (_ids, "a list of token ids"),
        "ignore_eos": (lambda value: type(value) is bool, "true or false"),
        "skip_special_tokens": (lambda value: type(value) is bool, "true or false"),
    }
    for name, (allowed, words) in checks.items():
        if params.get(name) is not None and not allowed(params[name]):
            problems.append(f"{name}={params[name]!r}: needs {words}")
    if params.get("ignore_eos") and params.get("stop_token_ids"):
        problems.append(
            "stop_token_ids beside ignore_eos: SGLang ignores both then, others do not; leave one out"
        )
    return problems


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        type(token) is int and token >= 0 for token in value
    )


def row_seed(seed: int | None, row: int) -> int:
    """Return the seed of one of a group's rows, for servers that give rows of one seed the same tokens.

    It has 63 bits. Row 0 gets `seed` itself; the seeds of neighbouring rows are independent. None: a random one.
    """
    if seed is None:
        return secrets.randbits(63)
    if row == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8], "big") >> 1


def per_prompt(
    sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]], count: int
) -> Sequence[Mapping[str, Any]]:
    """Return a set of params for each of `count` prompts. Raises ValueError if their numbers differ."""
    if isinstance(sampling_params, Mapping):
        return [sampling_params] * count
    if len(sampling_params) != count:
        raise ValueError(f"sampling_params: {len(sampling_params)} sets for {count} prompts")
    return sampling_params
