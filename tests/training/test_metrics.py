"""Metrics files: one whole JSON object a line, whatever is logged and however the last writer ended."""

import json
import math
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import anyio
import numpy as np
import pytest
import torch

from rollouts.run_dir import RunDir, append_event, append_jsonl
from rollouts.training.metrics import CompositeLogger, JSONLLogger, WandbLogger
from tests.training.tiny import tiny_backend


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_logger_writes_a_line_a_step(tmp_path):
    """Goal: the snippet users know. Red with the file written only at finish(): the first read finds nothing."""
    logger = JSONLLogger(tmp_path / "logs" / "x", stage="rl")
    logger.log({"loss": 0.5}, step=42)
    (record,) = lines(tmp_path / "logs" / "x" / "metrics.jsonl")
    assert record.pop("time") > 1.7e9
    assert record == {"step": 42, "stage": "rl", "loss": 0.5}
    assert list(lines(logger.path)[0])[:3] == ["step", "time", "stage"]
    logger.finish()
    with pytest.raises(ValueError, match="after finish"):
        logger.log({"loss": 0.4}, step=43)


def test_path_may_be_the_file_and_is_appended_to(tmp_path):
    """Goal: a resumed run goes on in the same file. Red with mode "w"."""
    for step in (1, 2):
        logger = JSONLLogger(tmp_path / "rollouts.jsonl")
        logger.log({"step": 99, "reward": 1.0}, step=step)  # the argument decides
        logger.finish()
    assert [record["step"] for record in lines(tmp_path / "rollouts.jsonl")] == [1, 2]


def test_a_torn_last_line_is_closed_off(tmp_path):
    """Goal: what a killed writer left costs one line, not the next one too. Red without the newline."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    logger = JSONLLogger(path)
    logger.log({"loss": 0.1}, step=3)
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 3


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    """Goal: a full disk, here a file at its limit, costs the line that did not fit, and none after it. Red with a
    buffered file: half a line stayed, and the next one was glued to it."""
    logger = JSONLLogger(tmp_path)
    logger.log({"loss": 0.5}, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (logger.path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            logger.log({"loss": 0.4, "text": "x" * 200}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    logger.log({"loss": 0.3}, step=3)
    logger.finish()
    assert [record["step"] for record in lines(logger.path)] == [1, 3]


def test_values_of_other_libraries_and_numbers_json_lacks(tmp_path):
    """Goal: every line is strict JSON. Red with plain json.dumps: it writes NaN, and refuses tensors."""
    logger = JSONLLogger(tmp_path)
    values = {
        "a": torch.tensor(1.5),
        "b": np.float32(0.5),
        "c": float("nan"),
        "d": [1, float("inf")],
        "e": tmp_path,
    }
    logger.log({**values, "f": {"g": np.int64(3)}}, step=1)
    text = logger.path.read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [record[key] for key in "abcdef"] == [1.5, 0.5, None, [1, None], str(tmp_path), {"g": 3}]
    logger.log({"loss": float("nan")}, step=2)  # plain numbers alone take the quick way
    assert (
        json.loads(logger.path.read_text().splitlines()[1], parse_constant=pytest.fail)["loss"]
        is None
    )
    with pytest.raises(TypeError, match=r"metric bad=<object .* \(object\): needs a number"):
        logger.log({"bad": object()}, step=3)
    assert len(logger.path.read_text().splitlines()) == 2


def test_composite_finishes_all_and_raises_what_failed(tmp_path):
    """Goal: one failing logger does not keep the others open. Red with a plain loop: the file stays open."""

    class Failing:
        def log(self, metrics, step):
            pass

        def finish(self):
            raise OSError("disk full")

    file = JSONLLogger(tmp_path)
    both = CompositeLogger([Failing(), file])
    both.log({"loss": 1.0}, step=1)
    with pytest.raises(ExceptionGroup) as caught:
        both.finish()
    assert "disk full" in str(caught.value.exceptions[0])
    assert lines(file.path)[0]["loss"] == 1.0
    with pytest.raises(ValueError, match="after finish"):
        file.log({}, step=2)


def test_wandb_is_imported_only_when_used(monkeypatch):
    """Goal: without wandb the error says how to get it or do without. Red with the import at the module's top."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"rollouts\[wandb\].*use_wandb=False"):
        WandbLogger("project")


def test_numbers_that_json_lacks_are_null_wherever_they_are_written(tmp_path):
    """Goal: jq and browsers read every file of a run. Red with json.dumps as it comes: NaN, Infinity."""
    run = RunDir(tmp_path)
    append_event(run, "warning", value=math.nan, nested={"a": [math.inf, 1.0]})
    append_jsonl(run.eval, {"value": -math.inf})
    strict = {"parse_constant": lambda text: pytest.fail(f"{text} is not JSON")}
    (event,) = [json.loads(line, **strict) for line in run.events.read_text().splitlines()]
    assert (event["value"], event["nested"]) == (None, {"a": [None, 1.0]})
    assert json.loads(run.eval.read_text(), **strict) == {"value": None}
    backend = tiny_backend(tmp_path / "sft")
    path = anyio.run(lambda: backend.save_checkpoint(1, {"loss": math.nan, "lr": 0.5}))
    assert json.loads((path / "metadata.json").read_text(), **strict)["metrics"] == {
        "loss": None,
        "lr": 0.5,
    }


def test_a_table_of_samples(monkeypatch, tmp_path):
    """Goal: rows as W&B's table, what is no cell as JSON. Red with the dict handed over as it is."""
    logged, tables = [], []
    run = SimpleNamespace(log=lambda data, step: logged.append((data, step)), finish=lambda: None)
    stand_in = SimpleNamespace(
        init=lambda **_: run,
        Table=lambda columns, data: tables.append((columns, data)) or "the table",
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_DIR", "")
    logger = WandbLogger("project", directory=tmp_path)
    logger.log_table("samples", [{"prompt": {"answer": "4"}, "reward": 1.0}], step=3)
    logger.log_table("samples", [], step=4)
    logger.log({"step": 6, "loss": 1.0}, step=4)
    assert tables == [(["prompt", "reward"], [['{"answer": "4"}', 1.0]])]
    assert logged == [({"samples": "the table"}, 3), ({"step": 4, "loss": 1.0}, 4)]
