"""A stage's answers in its own process stay within the config's limits: rows, tokens of an answer, tokens at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rollouts.config import Config
from rollouts.config.answer_limits import answer_limits
from rollouts.run_dir import RunDir, read_jsonl
from rollouts.training.alarms import Alarms
from rollouts.worker.stages.held_out import answers_in_process, rows_in_process
from rollouts.worker.stages.log import StageLog
from rollouts.worker.stages.parts import StageParts
from tests.example_config import example_config, replace_at
from tests.training.tiny import tiny_backend
from tests.training.tiny_task import tiny_model, tiny_tokenizer

QUESTIONS = [
    {"messages": [{"role": "user", "content": "abcdef"[: 1 + index % 6]}], "answer": "x"}
    for index in range(12)
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def parts_of(directory: Path, model: Any, **changes: Any) -> StageParts:
    config: Config = example_config()
    for path, value in changes.items():
        config = replace_at(config, f"eval.{path}", value)
    backend = tiny_backend(directory, model=model)
    run = RunDir(directory)
    log = StageLog(config, run, "sft", Alarms(1))
    return StageParts(config, run, "sft", tiny_tokenizer(), backend, 1, None, log)


def batches_of(
    parts: StageParts, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[tuple[int, int, int]]]:
    """The evaluation, and of each batch its answers, the tokens of a prompt, and those of an answer at most."""
    assert parts.backend is not None
    model, seen = parts.backend.model, []
    generate: Any = model.generate

    def watched(**options: Any) -> torch.Tensor:
        output = generate(**options)
        seen.append((len(output), options["input_ids"].shape[1], options["max_new_tokens"]))
        return output

    monkeypatch.setattr(model, "generate", watched)
    rows = rows_in_process(parts, QUESTIONS)
    return answers_in_process(parts, rows), seen


@pytest.mark.parametrize("samples", [0, 3])
def test_answers_stay_within_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, samples: int
) -> None:
    """Goal: as many rows, tokens an answer and tokens at once as the config allows, also for sampled answers; the rest
    of the rows is named. Red with each of the three limits not handed on.
    """
    limits = {"in_process_rows": 7, "in_process_new_tokens": 2, "in_process_batch_tokens": 64}
    parts = parts_of(tmp_path, model, **limits, num_samples=samples, pass_at=[1] if samples else [])
    found, batches = batches_of(parts, monkeypatch)
    assert found.num_rows == 7 and found.num_samples == samples
    assert (
        all(new == 2 and count * (prompt + new) <= 64 for count, prompt, new in batches)
        and len(batches) > 1
    )
    own = answer_limits(parts.config, "sft")
    assert own is not None and own.new_tokens_max(len(QUESTIONS)) == 7 * (1 + samples) * 2
    assert sum(count for count, _, _ in batches) * 2 == own.new_tokens_max(len(QUESTIONS))
    notes = [event["message"] for event in read_jsonl(parts.run.events)]
    assert notes == ["7 of 12 held-out rows are answered in the sft stage: eval.in_process_rows=7"]


def test_no_row_is_answered_where_the_config_says_none(tmp_path: Path, model: Any) -> None:
    """Goal: 0 rows are none. Red with 0 taken for all."""
    parts = parts_of(tmp_path, model, in_process_rows=0)
    assert list(rows_in_process(parts, QUESTIONS)) == []
