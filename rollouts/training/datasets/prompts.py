"""Prompt rows that fit: each is rendered before training, and left out if it leaves no room for an answer."""

from collections.abc import Callable, Sequence
from typing import Any

from rollouts.data_formats.examples import Example
from rollouts.data_formats.row import DataError
from rollouts.training.datasets.chat import render_prompts
from rollouts.training.datasets.lost_text import LostTool
from rollouts.training.datasets.report import PromptReport
from rollouts.training.datasets.turn_end import end_of_turn_ids, template_end_ids
from rollouts.training.seams import Tokenizer
from rollouts.training.types import Prompt

PROMPTS_PER_CALL = 256  # tokenized together
OWN_TOOLS: list[dict[str, Any]] = []  # as `tools`: those of each row


def fitting_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    tokens_max: int = -1,
    tools: Any = OWN_TOOLS,
    row_problem: Callable[[Prompt], str | None] | None = None,
) -> tuple[list[dict[str, Any]], PromptReport]:
    """Return the prompt rows of at most `tokens_max` tokens (-1: all), in order, and the report over all of them.

    `tools`: those of an environment, in place of a row's. A template without tools is then only reported, since a
    system message may describe them. `row_problem`: why the reward cannot use a row. Raises DataError, naming the row,
    where the chat template refuses it or leaves out a part, and when no row is left.
    """
    report = PromptReport()
    report.see_columns(examples)
    distinct = {id(example): example for example in examples}
    try:
        measures = _measures(distinct, tokenizer, tools)
    except LostTool as error:
        if tools is OWN_TOOLS:
            raise
        report.tools_lost = str(error)
        measures = _measures(distinct, tokenizer, None)
    unusable = (
        {}
        if row_problem is None
        else {key: row_problem(example.prompt) for key, example in distinct.items()}
    )
    kept = []
    for example in examples:
        length, largest_id = measures[id(example)]
        if tokens_max != -1 and length > tokens_max:
            report.leave_out(f"prompt longer than {tokens_max} tokens", example.where)
        elif reason := unusable.get(id(example)):
            report.leave_out(reason, example.where)
        else:
            kept.append(example.prompt)
            report.longest = max(report.longest, length)
            report.largest_id = max(report.largest_id, largest_id)
    report.kept = len(kept)
    ends = end_of_turn_ids(tokenizer)
    if not template_end_ids(tokenizer, frozenset(ends)):
        report.ends = (
            ", ".join(map(str, tokenizer.convert_ids_to_tokens(ends))) or "max_new_tokens alone"
        )
    if not kept:
        longest = max((length for length, _ in measures.values()), default=0)
        what = "can be used" if any(unusable.values()) else "leaves room for an answer"
        raise DataError(
            f"no prompt is left that {what}: {report}; the longest has {longest} tokens"
        )
    return kept, report


def _measures(
    examples: dict[int, Example], tokenizer: Tokenizer, tools: Any
) -> dict[int, tuple[int, int]]:
    """Return (tokens, largest token id) of each distinct example's prompt; a repeated one is rendered once."""
    items = list(examples.items())
    found = {}
    for start in range(0, len(items), PROMPTS_PER_CALL):
        chunk = items[start : start + PROMPTS_PER_CALL]
        rows: list[tuple[Prompt, str]] = [
            (_offering(one.prompt, tools), one.where) for _, one in chunk
        ]
        for (key, _), ids in zip(chunk, render_prompts(tokenizer, rows), strict=True):
            found[key] = len(ids), max(ids, default=0)
    return found


def _offering(prompt: dict[str, Any], tools: Any) -> dict[str, Any]:
    return prompt if tools is OWN_TOOLS else {**prompt, "tools": tools}
