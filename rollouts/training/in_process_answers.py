"""Answers of a model in this process: batches of rows of like length, left-padded, through `model.generate`."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rollouts.training.datasets.chat import render_prompt
from rollouts.training.model_limits import limits_of
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """Turn gradients, dropout and the model's own generation_config off within the context."""
    import torch
    from transformers import GenerationConfig

    was_training = model.training
    # adapters (peft) wrap a model, and both have a config
    unwrap = getattr(model, "get_base_model", None)
    models: list[Any] = [model] if unwrap is None else [model, unwrap()]
    own_configs = [each.generation_config for each in models]
    model.eval()
    for each, own_config in zip(models, own_configs, strict=True):
        each._own_generation_config = own_config  # a checkpoint may be written meanwhile
        each.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, own_config in zip(models, own_configs, strict=True):
            each.generation_config = own_config
            del each._own_generation_config
        model.train(was_training)


@contextmanager
def seeded(seed: int, model: "nn.Module") -> Iterator[None]:
    """Seed the global generators within the context, and restore them after."""
    import torch

    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def generate_answers(
    model: "nn.Module",
    tokenizer: Tokenizer,
    rows: Sequence[Prompt],
    limits: tuple[int, int],
    *,
    n: int,
    stops: list[int],
    max_new_tokens: int,
    **options: Any,
) -> list[list[str]]:
    """Return `n` answers to each row, in the order of the rows; rows of like length share a batch, for little padding.

    `limits` are the most rows of a batch and the most tokens. An answer ends where the
    model's learned positions do, if it has a table of them.
    """
    import torch

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    prompts = [render_prompt(tokenizer, row) for row in rows]
    room = limits_of(model)
    room.require(
        max(map(max, prompts)),
        max(map(len, prompts)) + 1,
        "a prompt and the first token of its answer",
    )
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    answers: list[list[str]] = [[] for _ in rows]
    # a method of transformers' models, which torch's types do not know
    generate: Any = model.generate
    device = next(model.parameters()).device
    for chosen in batches_of(order, lambda index: len(prompts[index]) + max_new_tokens, *limits):
        input_ids, attention_mask = _left_pad([prompts[index] for index in chosen], pad)
        output = generate(
            input_ids=torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(attention_mask, device=device),
            num_beams=1,
            num_return_sequences=n,
            eos_token_id=stops,
            max_new_tokens=room.left(max_new_tokens, len(input_ids[0])),
            pad_token_id=pad,
            **options,
        )
        texts = _decode(tokenizer, output[:, len(input_ids[0]) :].tolist(), stops)
        for place, index in enumerate(chosen):
            answers[index] = texts[place * n : (place + 1) * n]
    return answers


def batches_of(
    order: Sequence[int], tokens: Callable[[int], int], size_max: int, tokens_max: int
) -> Iterator[list[int]]:
    """Cut `order`, shortest first, into batches of at most `size_max` rows, and `tokens_max` tokens with padding."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == size_max or (len(batch) + 1) * tokens(index) > tokens_max):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _left_pad(prompts: list[list[int]], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    width = max(map(len, prompts))
    input_ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    attention_mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return input_ids, attention_mask


def _decode(tokenizer: Tokenizer, rows: list[list[int]], stops: list[int]) -> list[str]:
    """Return the text up to the first stop token; padding follows it."""
    cut = [list(itertools.takewhile(lambda token: token not in stops, row)) for row in rows]
    return tokenizer.batch_decode(cut, skip_special_tokens=True)
