"""Exact match on held-out rows, through an engine or in process. Validation loss: loops/evaluation.py.

Both ways to exact match decode greedily and count the same thing, so the same weights give the same number. Every row
and every last partial batch counts.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from rollouts.training import rewards
from rollouts.training.datasets.chat import render_prompt
from rollouts.training.rollout_gen.concurrency import gather_in_order
from rollouts.training.rollout_gen.engine_generate import refuse_abort, response_text, stop_ids
from rollouts.training.types import Prompt, Sample

if TYPE_CHECKING:
    pass

ScoreFn = Callable[[Sample], float]


@dataclass(frozen=True)
class Evaluation:
    exact_match: float  # share of rows answered right, 0 to 1
    num_rows: int
    responses: list[str]  # in the order of the rows


def exact_match(responses: Sequence[str], answers: Sequence[str]) -> float:
    """Share of responses equal to their answer, white space around them apart. Raises ValueError on no rows."""
    if len(responses) != len(answers) or not responses:
        raise ValueError(
            f"exact_match: {len(responses)} responses for {len(answers)} answers; needs as many, at least one"
        )
    return sum(a.strip() == b.strip() for a, b in zip(responses, answers, strict=True)) / len(responses)


async def evaluate_with_engine(
    engines: Sequence[Any],
    tokenizer: Any,
    rows: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] | None = None,
    score_fn: ScoreFn = rewards.is_correct,
    rows_per_request: int = 128,
) -> Evaluation:
    """Greedy exact match through engine clients (`weight_sync.SGLangEngine`), chunks of rows in turn over them.

    A row counts as right when score_fn gives 1.0. Each engine has one request in flight.
    """
    _require_rows(rows, engines=engines)
    sampling = {
        "temperature": 0.0,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": stop_ids(tokenizer, stop_token_ids),
    }
    chunks = [rows[start : start + rows_per_request] for start in range(0, len(rows), rows_per_request)]
    limiters = [anyio.CapacityLimiter(1) for _ in engines]

    async def answer(index: int) -> list[str]:
        engine = engines[index % len(engines)]
        prompts = [render_prompt(tokenizer, row) for row in chunks[index]]
        async with limiters[index % len(engines)]:
            groups = await engine.generate_batch(prompts, sampling, return_logprob=False)
        for group in groups:
            refuse_abort(group[0], engine)
        return [response_text(group[0], tokenizer) for group in groups]

    answers = await gather_in_order([partial(answer, index) for index in range(len(chunks))])
    responses = [text for chunk in answers for text in chunk]
    return _evaluation(rows, responses, score_fn)


def evaluate_with_model(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] | None = None,
    score_fn: ScoreFn = rewards.is_correct,
    batch_size: int = 256,
) -> Evaluation:
    """Greedy exact match in process: left-padded `model.generate`. The model's training mode stays."""
    import torch

    _require_rows(rows)
    stops = stop_ids(tokenizer, stop_token_ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    prompts = [render_prompt(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))  # little padding
    responses = [""] * len(rows)
    device = next(model.parameters()).device
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            input_ids, attention_mask = _left_pad([prompts[index] for index in chosen], pad)
            output = model.generate(
                input_ids=torch.tensor(input_ids, device=device),
                attention_mask=torch.tensor(attention_mask, device=device),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_new_tokens,
                eos_token_id=stops,
                pad_token_id=pad,
            )
            texts = _decode(tokenizer, output[:, len(input_ids[0]) :].tolist(), stops)
            for index, text in zip(chosen, texts, strict=True):
                responses[index] = text
    return _evaluation(rows, responses, score_fn)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradients and dropout; the training mode comes back after."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _require_rows(rows: Sequence[Prompt], engines: Sequence[Any] | None = None) -> None:
    if not rows:
        raise ValueError("evaluation: no rows; needs at least one")
    if engines is not None and not engines:
        raise ValueError("evaluation: engines is empty; needs at least one")


def _evaluation(rows: Sequence[Prompt], responses: list[str], score_fn: ScoreFn) -> Evaluation:
    right = sum(score_fn(Sample(prompt=row, response=text)) == 1.0 for row, text in zip(rows, responses, strict=True))
    return Evaluation(right / len(rows), len(rows), responses)


def _left_pad(prompts: list[list[int]], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    width = max(map(len, prompts))
    input_ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    attention_mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return input_ids, attention_mask


def _decode(tokenizer: Any, rows: list[list[int]], stops: list[int]) -> list[str]:
    """Text up to the first stop token; what follows it is padding."""
    cut = [list(itertools.takewhile(lambda token: token not in stops, row)) for row in rows]
    return tokenizer.batch_decode(cut, skip_special_tokens=True)
