"""Rows of data as the model will see them, as text that is safe to print. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from rollouts.view.escape import escaped

BAR = 40  # columns of the longest bar
GREEN, PLAIN = "\x1b[32m", "\x1b[39m"


def mixtures_text(mixtures: Sequence[Mapping[str, Any]], *, colour: bool) -> str:
    """Return each mixture's counts, lengths and first rows, trained tokens in green, or in [brackets]."""
    lines = [line for mixture in mixtures for line in _mixture(mixture, colour=colour)]
    if any(mixture["rows"] for mixture in mixtures):
        marks = f"{GREEN}green{PLAIN}" if colour else "in [brackets]"
        lines += ["", f"trained tokens are {marks}"]
    return "\n".join(lines)


def _mixture(mixture: Mapping[str, Any], *, colour: bool) -> list[str]:
    lines = [escaped(f"{mixture['mixture']}: {mixture['summary']}")]
    lines += _bars(mixture["lengths"])
    for row in mixture["rows"]:
        lines += [
            escaped(f"  {row['where']}"),
            *(f"    {line}" for line in _spans(row["spans"], colour=colour)),
        ]
    return lines


def _bars(bins: Sequence[Mapping[str, int]]) -> list[str]:
    """Return a line a bin: tokens, samples, and a bar of their share of the largest bin."""
    most = max((part["count"] for part in bins), default=0)
    width = max((len(f"{part['start']}-{part['end']}") for part in bins), default=0)
    lines = []
    for part in bins:
        name = (
            f"{part['start']}" if part["start"] == part["end"] else f"{part['start']}-{part['end']}"
        )
        lines.append(
            f"  {name:>{width}} tokens {part['count']:>8} {'#' * -(-BAR * part['count'] // most)}".rstrip()
        )
    return lines


def _spans(spans: Sequence[Mapping[str, Any]], *, colour: bool) -> list[str]:
    marked = _green if colour else "[{}]".format
    parts = [(escaped(str(span["text"])), span["trained"]) for span in spans]
    return "".join(marked(text) if trained else text for text, trained in parts).splitlines()


def _green(text: str) -> str:
    """Return text whose every line is green: what is printed before a line keeps its own colour."""
    return "\n".join(f"{GREEN}{line}{PLAIN}" if line else "" for line in text.split("\n"))
