"""Conversations to SFT Samples, with a report of what was left out and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rollouts.training.datasets.chat import render_conversation
from rollouts.training.datasets.formats import Example
from rollouts.training.datasets.rows import DataError
from rollouts.training.types import Sample

EXAMPLES_SHOWN = 3  # rows named per reason; the report counts the rest


@dataclass
class SFTReport:
    """How many examples were kept, and which were left out, by reason."""

    kept: int = 0
    trained_tokens: int = 0
    total_tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> how many
    left_out_where: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few rows

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        rows = self.left_out_where.setdefault(reason, [])
        if len(rows) < EXAMPLES_SHOWN:
            rows.append(where)

    def __str__(self) -> str:
        text = f"{self.kept} examples, {self.trained_tokens} of {self.total_tokens} tokens trained"
        for reason, count in self.left_out.items():
            text += f"; left out {count}: {reason} ({', '.join(self.left_out_where[reason])}, ...)"
        return text


def build_sft_samples(
    examples: Iterable[Example], tokenizer: Any, *, max_length: int
) -> tuple[list[Sample], SFTReport]:
    """One Sample per example with tokens and mask; `max_length` in tokens, -1 for no limit.

    Nothing is cut: an example that is longer, or has no trained token, is left out and counted. Raises DataError when
    none is left, and for a conversation that the chat template cannot render.
    """
    samples, report = [], SFTReport()
    for example in examples:
        tokens, mask = render_conversation(tokenizer, example.messages, example.where)
        if max_length != -1 and len(tokens) > max_length:
            report.leave_out(f"longer than max_length={max_length} tokens", example.where)
            continue
        if not any(mask[1:]):  # the first token is never predicted
            report.leave_out("no trained token (no assistant turn)", example.where)
            continue
        samples.append(_sample(example, tokens, mask))
        report.kept += 1
        report.trained_tokens += int(sum(mask))
        report.total_tokens += len(tokens)
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
