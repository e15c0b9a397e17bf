"""Rows that are kept from one look to the next: always those of the file as it is now."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rollouts.run_dir import new_rows, parse_row
from rollouts.view.growing_rows import GrowingRows
from rollouts.view.run_data import read_run
from tests.view.runs import START, rl_row, write_run


def usable(row: dict[str, Any]) -> bool:
    return "n" in row


def rows_of(text: str) -> tuple[list[dict[str, Any]], int]:
    lines = text.split("\n")[:-1]
    rows = [row for row in map(parse_row, map(str.encode, lines)) if row and usable(row)]
    return rows, len(lines) - len(rows)


@pytest.mark.parametrize("at_once", [50, 4 << 20])
def test_any_change_gives_what_a_new_look_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Goal: whatever happens between two looks (lines, damage, half a line, a cut, other lines of the same length, an
    empty file, no file), the rows are those of a first look, and of lines longer than what is read at once too. Red
    without the comparison of the file's tail, and (for ever) with more to read after half a long line."""
    monkeypatch.setattr(new_rows, "READ_BYTES_MAX", at_once)
    file, kept, draw = tmp_path / "rows.jsonl", GrowingRows(), random.Random(0)

    def line(n: int) -> str:
        return json.dumps({"n": n, "text": "x" * draw.choice([3, 300])}) + "\n"

    def changed(text: str) -> str:
        kind = draw.choice(["add", "add", "half", "damage", "cut", "other", "empty", "gone"])
        if kind == "add":
            return text + "".join(line(draw.randrange(10)) for _ in range(draw.randint(1, 4)))
        if kind in ("half", "damage"):
            end = "\n" if kind == "damage" else ""
            return text + draw.choice(['{"n": ', "[1]", '{"m": 1}', "7"]) + end
        if kind == "cut":
            return text[: draw.randint(0, len(text))]
        return {"other": "".join(map(line, range(6))), "empty": "", "gone": ""}[kind]

    text = ""
    for _ in range(400):
        text = changed(text)
        if text or draw.random() < 0.5:
            file.write_text(text)
        else:
            file.unlink(missing_ok=True)
        assert kept.read(file, usable) == GrowingRows().read(file, usable) == rows_of(text), text


def test_what_was_read_is_not_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a look after a step parses that step alone. Red with files read from their beginning."""
    run, kept = write_run(tmp_path / "a"), GrowingRows()
    before = read_run(run.path, kept)
    parsed = []

    def noted(data: bytes) -> Any:
        parsed.append(data)
        return json.loads(data)

    monkeypatch.setattr(new_rows, "parse_row", noted)
    with run.metrics.open("a") as file:
        file.write(json.dumps(rl_row(41, 40, 0.5, random.Random(0))) + "\n")
    after = read_run(run.path, kept)
    assert len(parsed) == 1 and after.answers == before.answers
    assert after.series("rl", "loss").steps == tuple(range(1, 42))
    assert len(before.metrics["rl"]) == 40 and after.metrics["rl"][-1]["time"] > START
