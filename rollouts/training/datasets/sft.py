"""Conversations and texts to SFT Samples, with a report of what was left out and why."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rollouts.training.datasets.chat import render_conversation
from rollouts.training.datasets.examples import Example
from rollouts.training.datasets.rows import DataError
from rollouts.training.types import Sample

EXAMPLES_SHOWN = 3  # rows named per reason; the report counts the rest


@dataclass
class SFTReport:
    """How many examples were kept, and which were left out, by reason."""

    kept: int = 0  # samples; a long text makes several
    trained_tokens: int = 0
    total_tokens: int = 0
    texts_split: int = 0  # plain texts longer than max_length
    pieces: int = 0  # that those were split into, without loss
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> how many
    left_out_where: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few rows

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        rows = self.left_out_where.setdefault(reason, [])
        if len(rows) < EXAMPLES_SHOWN:
            rows.append(where)

    def count(self, sample: Sample) -> None:
        self.kept += 1
        self.trained_tokens += int(sum(sample.loss_mask))
        self.total_tokens += len(sample.tokens)

    def __str__(self) -> str:
        text = f"{self.kept} examples, {self.trained_tokens} of {self.total_tokens} tokens trained"
        if self.texts_split:
            text += f"; {self.texts_split} long texts split into {self.pieces} pieces"
        for reason, count in self.left_out.items():
            text += f"; left out {count}: {reason} ({', '.join(self.left_out_where[reason])}, ...)"
        return text


def build_sft_samples(
    examples: Iterable[Example], tokenizer: Any, *, max_length: int
) -> tuple[list[Sample], SFTReport]:
    """Samples with tokens and mask, in the examples' order; `max_length` in tokens, -1 for no limit.

    A conversation becomes one sample. Nothing of it is cut: one that is longer, or has no trained token, is left out
    and counted. A plain text becomes as many as it takes. Raises DataError when none is left, and for a conversation
    that the chat template cannot render.
    """
    samples: list[Sample] = []
    report = SFTReport()
    for example in examples:
        if example.text is not None:
            samples += _text_samples(example, example.text, tokenizer, max_length, report)
            continue
        tokens, mask = render_conversation(tokenizer, example.messages, example.where)
        if max_length != -1 and len(tokens) > max_length:
            report.leave_out(f"longer than max_length={max_length} tokens", example.where)
            continue
        if not any(mask[1:]):  # the first token is never predicted
            report.leave_out("no trained token (no assistant turn)", example.where)
            continue
        samples.append(_sample(example, tokens, mask))
        report.count(samples[-1])
    if not samples:
        raise DataError(f"no example is left to train on: {report}")
    return samples, report


def _sample(example: Example, tokens: list[int], mask: list[float]) -> Sample:
    return Sample(
        prompt=example.prompt,
        response=example.messages[-1]["content"] if example.messages[-1]["role"] == "assistant" else "",
        tokens=tokens,
        loss_mask=mask,
        metadata={"where": example.where},
        response_length=len(tokens) - mask.index(1.0),  # all from the first trained token on
    )


# --- plain text -----------------------------------------------------------------------------------------------------


def _text_samples(example: Example, text: str, tokenizer: Any, max_length: int, report: SFTReport) -> Iterator[Sample]:
    """Every token after a text's first is trained exactly once, the EOS after its last among them."""
    tokens = text_tokens(tokenizer, text)
    if not text.strip() or len(tokens) < 2:
        report.leave_out("no trained token (empty text)", example.where)
        return
    pieces = list(split_tokens(tokens, max_length))
    if len(pieces) > 1:
        report.texts_split += 1
        report.pieces += len(pieces)
    for number, piece in enumerate(pieces, start=1):
        where = example.where if len(pieces) == 1 else f"{example.where} piece {number} of {len(pieces)}"
        sample = Sample(
            prompt=example.prompt,
            tokens=piece,
            loss_mask=[0.0] + [1.0] * (len(piece) - 1),
            metadata={"where": where},
            response_length=len(piece) - 1,
        )
        report.count(sample)
        yield sample


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of a plain text with whatever the tokenizer puts before it, and one EOS at its end."""
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token, and plain text needs one at its end")
    tokens = list(tokenizer(text, verbose=False)["input_ids"])  # verbose would warn of every long text
    return tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]


def split_tokens(tokens: list[int], max_length: int) -> Iterator[list[int]]:
    """Pieces of at most `max_length` tokens (-1: one piece). Each begins with the last token of the one before.

    A piece's first token is read, not predicted, so that overlap lets every token but the very first be predicted once.
    """
    if max_length == -1 or len(tokens) <= max_length:
        yield tokens
        return
    for start in range(0, len(tokens) - 1, max_length - 1):
        yield tokens[start : start + max_length]
