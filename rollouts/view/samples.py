"""Rows of data as the model will see them, as text. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

BAR = 40  # columns of the longest bar


def mixtures_text(mixtures: Sequence[Mapping[str, Any]]) -> str:
    """Return each mixture's counts, lengths and first rows, trained tokens in [brackets]."""
    parts = [line for mixture in mixtures for line in _mixture(mixture)]
    return "\n".join([*parts, "", "trained tokens are in [brackets]"])


def _mixture(mixture: Mapping[str, Any]) -> list[str]:
    lines = [f"{mixture['mixture']}: {mixture['summary']}"]
    lines += _bars(mixture["lengths"])
    for row in mixture["rows"]:
        lines += [f"  {row['where']}", *(f"    {line}" for line in _spans(row["spans"]))]
    return lines


def _bars(bins: Sequence[Mapping[str, int]]) -> list[str]:
    """Return a line a bin: tokens, samples, and a bar of their share of the largest bin."""
    most = max((part["count"] for part in bins), default=0)
    width = max((len(f"{part['start']}-{part['end']}") for part in bins), default=0)
    lines = []
    for part in bins:
        name = f"{part['start']}" if part["start"] == part["end"] else f"{part['start']}-{part['end']}"
        lines.append(f"  {name:>{width}} tokens {part['count']:>8} {'#' * -(-BAR * part['count'] // most)}".rstrip())
    return lines


def _spans(spans: Sequence[Mapping[str, Any]]) -> list[str]:
    text = "".join(f"[{span['text']}]" if span["trained"] else span["text"] for span in spans)
    return text.splitlines()
