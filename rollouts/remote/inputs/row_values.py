"""What the rows of a .jsonl file here lack of their format: found before anything is sent. Standard library.

The trainer's own reader checks more, with the tokenizer; this finds what its first look would end a run with.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config import DatasetSpec
from rollouts.data_formats import DataFormat, format_named
from rollouts.data_formats.declared import text_needed
from rollouts.data_formats.examples import ROLES
from rollouts.plain_files import reading
from rollouts.remote.errors import Problem
from rollouts.remote.inputs.paths import SentFiles, pointer_problem

READ_BYTES_MAX = 128 * 2**20  # of one file; rows of a larger one are checked by the trainer
SHOWN_MAX = 3  # wrong rows of one file that are named
LETTERS_MAX = 60  # of a value that is shown


@dataclass(frozen=True)
class WrongRow:
    """A row that its format cannot read."""

    line: int
    # among the rows; None: the line is not a row at all, so that the file cannot be read
    index: int | None
    why: str


def row_problem(row_format: str, row: Any) -> str:
    """Return what is wrong with a row of this format; "" if nothing that shows without its tokenizer."""
    declared = format_named(row_format)
    if declared.made_here:  # no row of a file is read
        return ""
    if declared.is_array:
        return (
            _messages_problem(row)
            if isinstance(row, list)
            else f"is {_named(row)}; needs an array of messages"
        )
    if not isinstance(row, dict):
        return f"is {_named(row)}; needs an object, one a line"
    problems = (_column_problem(declared, row, column) for column in declared.columns)
    return next(filter(None, problems), "")


def _column_problem(declared: DataFormat, row: Mapping[str, Any], column: str) -> str:
    kind = declared.columns[column]
    if kind == "messages":
        return (
            _messages_problem(row[column]) if column in row else _lacks(row, column, "needs a list")
        )
    if kind == "choices" and not isinstance(row.get(column), dict):
        return _lacks(row, column, "needs {'text': [...], 'label': [...]}")
    if need := text_needed(kind, row.get(column), "text"):
        return _lacks(row, column, f"format {declared.name!r} needs {need}")
    return ""


def _messages_problem(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        return f"messages={_shown(messages)}; needs a list of {{'role', 'content'}}"
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"messages[{at}]={_shown(message)}; needs an object with 'role' and 'content'"
        if message.get("role") not in ROLES:
            return f"messages[{at}].role={_shown(message.get('role'))}; needs one of {', '.join(ROLES)}"
        calls = message["role"] == "assistant" and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not (
            calls and message.get("content") is None
        ):
            return f"messages[{at}].content={_shown(message.get('content'))}; needs a text"
    return ""


def _lacks(row: Mapping[str, Any], key: str, need: str) -> str:
    found = (
        f"{key}={_shown(row[key])}"
        if key in row
        else f"has no {key!r} (it has {', '.join(map(str, row)) or '-'})"
    )
    return f"{found}; {need}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LETTERS_MAX else f"{text[:LETTERS_MAX]}…"


def _named(value: Any) -> str:
    return {list: "an array", dict: "an object", str: "a text", type(None): "null"}.get(
        type(value), "a number"
    )


def wrong_rows(file: Path, row_format: str) -> tuple[list[WrongRow], int]:
    """Return (rows that the format cannot read, all rows) of a .jsonl file. Raises OSError."""
    found, rows = list[WrongRow](), 0
    with reading(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                return [
                    WrongRow(number, None, "is not UTF-8 text; convert it: iconv -t UTF-8")
                ], rows
            except (ValueError, RecursionError) as error:
                found.append(WrongRow(number, None, f"is not JSON: {error}"))
            else:
                if why := row_problem(row_format, row):
                    is_row = isinstance(row, list if format_named(row_format).is_array else dict)
                    found.append(WrongRow(number, rows if is_row else None, why))
            rows += 1
    return found, rows


def row_problems(
    mixtures: Sequence[tuple[str, Sequence[DatasetSpec]]], sent: SentFiles
) -> Iterator[Problem]:
    """Name the wrong rows of .jsonl files that are sent, as far as the mixtures read them."""
    specs = [spec for _, own in mixtures for spec in own if spec.name.endswith(".jsonl")]
    for name, row_format in dict.fromkeys((spec.name, str(spec.format)) for spec in specs):
        where = sent.locate(name)
        file = sent.root / where.file
        try:
            if where.file not in sent.files or file.stat().st_size > READ_BYTES_MAX:
                continue
            if where.state != "sent" or pointer_problem(sent.root, where.file):  # told already
                continue
            found, rows = wrong_rows(file, row_format)
        except OSError:  # reading it for the digest tells
            continue
        readers = [spec for spec in specs if (spec.name, str(spec.format)) == (name, row_format)]
        if found and (read := [row for row in found if _is_read(row, readers, rows)]):
            yield _problem(name, row_format, read)


def _is_read(row: WrongRow, readers: Sequence[DatasetSpec], rows: int) -> bool:
    """Return whether a data set reads this row for certain: one that is shuffled may leave it out."""
    if row.index is None:
        return True
    taken = dict[int | None, set[int]]()
    for spec in readers:
        chosen = range(rows)[spec.start : None if spec.stop == -1 else spec.stop : spec.step]
        chosen = chosen if spec.max_samples == -1 else chosen[: spec.max_samples]
        taken.setdefault(spec.shuffle_seed, set()).update(chosen)
    return any(
        len(own) == rows or (seed is None and row.index in own) for seed, own in taken.items()
    )


def _problem(name: str, row_format: str, wrong: Sequence[WrongRow]) -> Problem:
    first, *others = wrong
    more = [f"and {len(wrong) - SHOWN_MAX} more"] if len(wrong) > SHOWN_MAX else []
    return Problem(
        f"{name}:{first.line}: {first.why}.",
        found="\n".join(
            [*(f"{name}:{row.line}: {row.why}" for row in others[: SHOWN_MAX - 1]), *more]
        ),
        fix=f"mend the rows, or give another format than {row_format!r}; docs/reference/data-formats.md has the keys",
    )
