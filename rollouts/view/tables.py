"""Runs and tables as text for people. Pure, but for the local time zone."""

import time
from collections.abc import Sequence
from typing import Any

from rollouts.run_dir import FINAL_STATES
from rollouts.view.escape import escaped, one_line

ELLIPSIS = "…"
REASONS_MAX = 40  # runs in a table of a terminal with more lines than one each
NAME_CHARS_MIN, TARGET_CHARS = 20, 14
MESSAGE_CHARS_MAX = 1200  # 15 lines of 80 columns


def columns(table: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as aligned text, columns of numbers to the right; "" for no rows."""
    if not table:
        return ""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [i > 0 and all(_is_number(row[i]) for row in table[1:]) for i in range(len(widths))]
    lines = []
    for row in table:
        cells = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(".", "", 1).removeprefix("-").isdigit()


def cell(name: str, value: Any) -> str:
    """Return a field of a run as shown in tables; times in this machine's zone."""
    if value is None:
        return "-"
    if name.endswith("_at") and isinstance(value, int | float):
        try:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
        except (ValueError, OverflowError, OSError):
            return one_line(value)
    return one_line(value)


def runs_text(rows: Sequence[dict[str, Any]], *, width: int | None = None) -> str:
    """Return a table, and under it why runs failed, were not launched, or wait, or on which other machine they are.

    On a terminal of `width` columns (None: no terminal) no line of the table wraps: it is made narrower, and long names
    lose their middle. Of more than REASONS_MAX runs each is one line there.
    """
    if not rows:
        return "no runs"
    header = ["run_id", "target", "state", "stage", "step", "started_at", "exit_code"]
    header += ["tags"] if any(row.get("tags") for row in rows) else []
    cells = [header, *([cell(name, _shown(row, name)) for name in header] for row in rows)]
    heading, *lines = columns(cells).splitlines()
    same_target = ""
    if width is not None and max(map(len, (heading, *lines))) > width:
        same_target = cells[1][1] if len({_shown(row, "target") for row in rows}) == 1 else ""
        heading, *lines = _narrow(rows, width, with_target=not same_target)
    if width is not None and len(rows) > REASONS_MAX:
        failed = sum(bool(_reason(row)) for row in rows)
        why = f"; {failed} with a note: `deploy status RUN` says it" if failed else ""
        return "\n".join(
            [heading, *lines, f"{len(rows)} runs{same_target and f', all on {same_target}'}{why}"]
        )
    table = [heading, *(f"{line}{_reason(row)}" for line, row in zip(lines, rows, strict=True))]
    return "\n".join([*table, f"all on {same_target}"] if same_target else table)


def _shown(row: dict[str, Any], name: str) -> Any:
    if name == "tags":
        return " ".join(row.get("tags", ()))
    more = len(row.get("hosts", ())) - 1
    return f"{row[name]} +{more}" if name == "target" and more > 0 else row[name]


def _narrow(rows: Sequence[dict[str, Any]], width: int, *, with_target: bool) -> list[str]:
    """Return the table's lines for a terminal: what matters most of each run, and as much of its name as fits."""
    with_tags = any(row.get("tags") for row in rows)
    header = [
        "state",
        "at",
        "started",
        *(["target"] if with_target else []),
        *(["tags"] if with_tags else []),
    ]
    cells = [header]
    for row in rows:
        at = " ".join(str(row[name]) for name in ("stage", "step") if row[name] is not None) or "-"
        started = cell("started_at", row["started_at"])
        target = (
            [elided(cell("target", _shown(row, "target")), TARGET_CHARS)] if with_target else []
        )
        cells.append([cell("state", row["state"]), one_line(at), started[5:16] or "-", *target])
        cells[-1] += [elided(cell("tags", _shown(row, "tags")), TARGET_CHARS)] if with_tags else []
    others = max(map(len, columns([["", *line] for line in cells]).splitlines()))
    room = max(NAME_CHARS_MIN, width - others)
    names = ["run_id", *(elided(cell("run_id", row["run_id"]), room) for row in rows)]
    return columns([[name, *line] for name, line in zip(names, cells, strict=True)]).splitlines()


def elided(text: str, width: int) -> str:
    """Return `text`, or its beginning and its end around `…`: runs of one experiment differ at the end."""
    if len(text) <= width:
        return text
    begin = (width - 1) // 3
    return f"{text[:begin]}{ELLIPSIS}{text[len(text) - (width - 1 - begin) :]}"


def _reason(row: dict[str, Any]) -> str:
    """Return why a run failed, was not launched or waits, or where it is, as a line under its own; "" for another."""
    message = row.get("message") or ""
    if row["state"] in ("failed", "died", "not launched", "interrupted") and message:
        return f"\n  error: {one_line(message)}"
    told = row["state"] == "queued" or (row.get("host") and row["state"] not in FINAL_STATES)
    return f"\n  note: {one_line(message)}" if told and message else ""


def run_text(row: dict[str, Any]) -> str:
    """Return a line a field, the message last: that is what one looks for."""
    width = max(map(len, row))
    names = sorted(row, key=lambda name: name == "message")
    return "\n".join(f"{name:<{width}}  {cell(name, row[name])}" for name in names)


def cause(error: dict[str, Any]) -> str:
    """Return an error event's message; with the process's own `error:` line where the message lacks it."""
    message, lines = str(error.get("message")), error.get("log_tail")
    said = (
        [str(line) for line in lines if str(line).startswith("error: ")]
        if isinstance(lines, list)
        else []
    )
    own = said[-1].removeprefix("error: ").strip() if said else ""
    return message if not own or own in message else f"{message}: {own}"


def cut_text(text: str) -> str:
    """Return it escaped, and no more of it than a small screen holds."""
    shown = escaped(text).strip()
    return (
        shown
        if len(shown) <= MESSAGE_CHARS_MAX
        else f"{shown[:MESSAGE_CHARS_MAX]}… (all of it: events.jsonl)"
    )
