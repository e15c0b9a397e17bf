"""What the rollout browser is told, as JSON values: a list of samples, and one with its group."""

import time
from collections.abc import Mapping
from typing import Any

from rollouts.run_dir import RunDir
from rollouts.view.run_data import prompt_text
from rollouts.view.ui.desk import Desk, IndexedSamples
from rollouts.view.ui.run_source import PageError
from rollouts.view.ui.sample_query import brief, read_filter, read_lines, search
from rollouts.view.ui.sample_view import conversation, response_tokens
from rollouts.view.ui.token_texts import decoder, tokenizer_file

PAGE = 50
SIBLINGS_MAX = 64
PROMPT_STEPS_MAX = 2000


def progress(found: IndexedSamples) -> dict[str, Any]:
    """Return how far the index is."""
    return {
        "indexed": found.head.bytes,
        "total": found.total,
        "building": found.building,
        "failed": found.failed,
        "damaged": found.head.damaged,
        "count": found.samples.count,
    }


def sample_list(desk: Desk, run_id: str, asked: Mapping[str, str]) -> dict[str, Any]:
    """Return a page of the samples that fit, from the `begin`-th on. Raises PageError.

    With a text, `next` says where the search goes on: one answer looks for it for so long at most.
    """
    started = time.monotonic()
    wanted, begin = read_filter(asked), _count(asked.get("begin", "0"), "begin")
    found = desk.samples(run_id)
    chosen = found.samples.chosen(wanted)
    try:
        if wanted.text:
            part = search(found.file, found.samples, chosen, wanted.text, begin=begin, most=PAGE)
            positions, goes_on = part.positions, part.next
        else:
            positions = [int(at) for at in chosen[begin : begin + PAGE]]
            goes_on = begin + PAGE if begin + PAGE < len(chosen) else None
        rows = read_lines(found.file, found.samples, positions) if positions else []
    except OSError as error:
        raise PageError(
            f"rollouts.jsonl cannot be read any more: {error.strerror or error}"
        ) from None
    return {
        "index": progress(found),
        "fitting": len(chosen),
        "begin": begin,
        "next": goes_on,
        "bounds": found.samples.bounds(),
        "samples": [brief(row, found.samples, at) for row, at in zip(rows, positions, strict=True)],
        "ms": round(1000 * (time.monotonic() - started), 1),
    }


def _count(text: str, name: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise PageError(f"{name}={text!r}: needs a number from 0 on", status=400)
    return int(text)


def one_sample(desk: Desk, run_id: str, offset: str) -> dict[str, Any]:
    """Return the sample whose line begins at byte `offset`, with its group and its prompt's other steps.

    Raises PageError.
    """
    found = desk.samples(run_id)
    samples, position = found.samples, found.samples.at(_count(offset, "sample"))
    group = samples.group_of(position)
    near = group.index(position)
    begin = max(0, min(near - SIBLINGS_MAX // 2, len(group) - SIBLINGS_MAX))
    shown = group[begin : begin + SIBLINGS_MAX]
    try:
        rows = read_lines(found.file, samples, shown)
    except OSError as error:
        raise PageError(
            f"rollouts.jsonl cannot be read any more: {error.strerror or error}"
        ) from None
    row = rows[shown.index(position)]
    if row is None:
        raise PageError("this sample's line cannot be read any more: the file was changed")
    run = desk.run(run_id)
    file = tokenizer_file(RunDir(run.path), _model_name(run.config))
    history = samples.through_training(position)
    return {
        **brief(row, samples, position),
        "prompt": prompt_text(row.get("prompt")),
        "prompt_id": str(row.get("prompt_id", "")),
        "response": str(row.get("response", "")),
        "parts": conversation(row),
        "tokens": response_tokens(row, decoder(file) if file else None),
        "weight_version": row.get("weight_version"),
        "temperature": row.get("temperature"),
        "metadata": _others(row.get("metadata")),
        "group_size": len(group),
        "siblings": [
            brief(other, samples, at) | _response(other)
            for other, at in zip(rows, shown, strict=True)
        ],
        "history": history[:: max(1, len(history) // PROMPT_STEPS_MAX)],
    }


def _response(row: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"response": str(row.get("response", ""))[:4000]} if row else {}


def _others(metadata: Any) -> list[list[str]]:
    """Return what else is recorded of a sample, but its messages, which are the conversation."""
    if not isinstance(metadata, Mapping):
        return []
    return [
        [str(name), str(value)[:2000]] for name, value in metadata.items() if name != "messages"
    ][:50]


def _model_name(config: Mapping[str, Any] | None) -> str:
    model = (config or {}).get("model")
    name = model.get("name") if isinstance(model, Mapping) else None
    return name if isinstance(name, str) else ""
