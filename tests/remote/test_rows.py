"""Rows in the order of time, and the table of what evaluation gave before and after each stage."""

from typing import Any

import pytest

from rollouts.remote.rows import Row, in_order
from rollouts.remote.view import evaluation_table

STARTED: Row = ("events.jsonl", {"time": 1.0, "kind": "training_started", "stage": "rl"})
STEP_1: Row = ("metrics.jsonl", {"time": 2.0, "stage": "rl", "step": 1})
NOTE: Row = ("events.jsonl", {"time": 3.0, "kind": "note"})
STEP_2: Row = ("metrics.jsonl", {"time": 4.0, "stage": "rl", "step": 2})


def measured(stage: str, step: int, value: float = 0.5) -> dict[str, Any]:
    return {"metric": "exact_match", "split": "test", "task": "all", "stage": stage, "step": step, "value": value}


@pytest.mark.parametrize(
    ("evaluation", "place"),
    [(measured("base", 0), 1), (measured("rl", 0), 1), (measured("rl", 1), 2), (measured("rl", 2), 4)],
    ids=["base", "at step 0", "at step 1", "at the end"],
)
def test_rows_of_several_files_come_in_the_order_of_time(evaluation: dict[str, Any], place: int) -> None:
    """Goal: events and metrics by time; an evaluation, which has none, after the step that it was made at. Red with the
    rows as they were read, file by file."""
    shown = in_order([STARTED, NOTE, STEP_1, STEP_2, ("eval.jsonl", evaluation)])
    timed = [STARTED, STEP_1, NOTE, STEP_2]
    assert shown == [*timed[:place], ("eval.jsonl", evaluation), *timed[place:]]


@pytest.mark.parametrize(
    ("evals", "header", "values"),
    [
        ([measured("rl", 0, 0.25), measured("rl", 10, 0.75)], ["", "before", "rl"], ["0.2500", "0.7500"]),
        ([measured("rl", 0, 0.25)], ["", "before"], ["0.2500"]),  # stopped before the next evaluation
        ([measured("base", 0, 0.0), measured("sft", 5, 0.5)], ["", "base", "sft"], ["0.0000", "0.5000"]),
        (
            [measured("sft", 0, 0.1), measured("sft", 5, 0.5), measured("rl", 0, 0.6)],
            ["", "before", "sft"],
            ["0.1000", "0.6000"],
        ),
    ],
    ids=["rl alone", "rl stopped", "stopped in sft", "from a checkpoint"],
)
def test_the_table_keeps_what_was_before(evals: list[dict[str, Any]], header: list[str], values: list[str]) -> None:
    """Goal: values of a stage's step 0 are of what came before it. Red with the last value of each stage alone."""
    table = evaluation_table(tuple(evals))
    assert table[0] == header and table[1][1:] == values
