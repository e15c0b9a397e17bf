"""Conversations and texts to SFT Samples, with a report of what was left out and why."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rollouts.data_formats.examples import Example
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat import Conversation, Rendering
from rollouts.training.datasets.plain_text import encode_texts, text_samples
from rollouts.training.datasets.render_workers import render_chunks
from rollouts.training.datasets.report import SFTReport
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Sample

__all__ = ["SFTReport", "build_sft_samples"]
EXAMPLES_PER_CALL = 256  # rendered together: the tokenizer works on them in parallel


def build_sft_samples(
    examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, num_workers: int = 0
) -> tuple[list[Sample], SFTReport]:
    """Return samples with tokens and mask, in the order of the examples; `max_length` in tokens, -1 for no limit.

    A conversation is one Sample, or several where the chat template renders earlier turns differently than they were
    spoken; together those train each assistant turn once. Samples are never cut: a longer one, or one without a trained
    token, is left out and counted. A plain text becomes as many samples as it needs. Raises DataError when none is
    left, and for a conversation that the template cannot render. num_workers: see `render_chunks`.
    """
    samples: list[Sample] = []
    report = SFTReport()
    for example, rendered in _rendered(examples, tokenizer, num_workers):
        if example.text is None:
            report.see_turns(example)
            own = _conversation_samples(example, rendered, max_length, report)
        else:
            own = text_samples(example, rendered, max_length=max_length)
            if not own:
                report.leave_out("no trained token (empty text)", example.where)
            if len(own) > 1:
                report.texts_split += 1
                report.pieces += len(own)
        report.see_columns([example])
        report.keep(own)
        samples += own
    if not samples:
        raise DataError(f"no example is left to train on: {report}")
    return samples, report


def _rendered(
    examples: Iterable[Example], tokenizer: Tokenizer, num_workers: int
) -> Iterator[tuple[Example, Any]]:
    """Yield each example with a conversation's list of Renderings, or a plain text's token ids."""
    remaining = iter(examples)
    chunks, again = itertools.tee(
        iter(lambda: list(itertools.islice(remaining, EXAMPLES_PER_CALL)), [])
    )
    rendered_chunks = render_chunks(tokenizer, map(_conversations, again), num_workers=num_workers)
    for chunk, rendered in zip(chunks, rendered_chunks, strict=True):
        texts = [one.text for one in chunk if one.text is not None]
        renderings, token_ids = (
            iter(rendered),
            iter(encode_texts(tokenizer, texts) if texts else []),
        )
        yield from ((one, next(renderings if one.text is None else token_ids)) for one in chunk)


def _conversations(chunk: Sequence[Example]) -> list[Conversation]:
    return [
        Conversation(one.messages, one.where, one.prompt.get("tools"))
        for one in chunk
        if one.text is None
    ]


def _conversation_samples(
    example: Example, renderings: Sequence[Rendering], max_length: int, report: SFTReport
) -> list[Sample]:
    if len(renderings) > 1:
        report.split += 1
        report.split_samples += len(renderings)
    samples = []
    for rendering in renderings:
        if max_length != -1 and len(rendering.token_ids) > max_length:
            report.leave_out(f"longer than max_length={max_length} tokens", example.where)
        elif not any(rendering.mask[1:]):  # the first token is never predicted
            speaks = any(message["role"] == "assistant" for message in example.messages)
            why = (
                "every assistant turn is empty or marked as not to be trained"
                if speaks
                else "no assistant turn"
            )
            report.leave_out(f"no trained token ({why})", example.where)
        else:
            samples.append(_sample(example, rendering))
    return samples


def _sample(example: Example, rendering: Rendering) -> Sample:
    last = rendering.turns[-1]
    is_whole = last == len(example.messages) - 1
    return Sample(
        prompt=example.prompt
        if is_whole
        else {**example.prompt, "messages": example.messages[:last]},
        response=example.messages[last].get("content", ""),
        tokens=rendering.token_ids,
        loss_mask=rendering.mask,
        metadata={"where": example.where, "turns": list(rendering.turns)},
        response_length=len(rendering.token_ids)
        - rendering.mask.index(1.0),  # all from the first trained token on
    )
