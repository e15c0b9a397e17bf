"""Reading run directories for people: what there is, and what is damaged, old, half-written or no run at all."""

import json
import os
from pathlib import Path

import pandas
import pytest

from rollouts.view import rollout_samples
from rollouts.view.rollout_samples import digest_samples
from rollouts.view.run_data import NotARunError, prompt_text, read_run
from tests.view.runs import rollout_row, write_run


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    """Goal: series, answers, events, packages and commit are those of the files, compared with pandas; nothing is
    written."""
    run = write_run(tmp_path / "a")
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    data = read_run(run.path)
    rows = pandas.DataFrame([json.loads(line) for line in run.metrics.read_text().splitlines()])
    rl = rows[rows.stage == "rl"]
    series = data.series("rl", "reward_mean")
    assert list(series.steps) == list(rl.step) and list(series.values) == list(rl.reward_mean)
    assert data.stages == ("sft", "rl") and "entropy" in data.metric_names("rl")
    assert "entropy" not in data.metric_names("sft") and data.series("sft", "entropy").values == ()
    assert len(data.answers) == 300 and data.answers[0].expected == "A0"
    assert (
        data.commit == "0123abcd" and not data.uncommitted and data.packages[0] == "torch==2.13.0"
    )
    assert data.damage == {} and data.remarks == () and data.events[-1]["kind"] == "run_ended"
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    """Goal: a torn line, a row of wrong types and a number that is none cost themselves alone, and are counted; a last
    line that is still being written is neither."""
    run = write_run(tmp_path / "a", steps=5)
    with run.metrics.open("a") as file:
        file.write('{"stage": "rl", "st\n[1, 2]\n{"stage": "rl", "step": true, "time": 1}\n')
        file.write('{"stage": "rl", "step": 6, "time": 1.0, "loss": null, "reward_mean": 1e400}\n')
        file.write('{"stage": "rl", "step": 7, "ti')
    with run.eval_samples.open("a") as file:
        file.write('{"stage": "rl", "step": 5, "row": 0}\n')
    run.config.write_text("{")
    data = read_run(run.path)
    assert data.damage == {"metrics.jsonl": 3, "eval_samples.jsonl": 1}
    assert len(data.metrics["rl"]) == 6 and len(data.series("rl", "reward_mean").values) == 5
    assert data.config is None and data.remarks == ("config.json is damaged: not JSON",)


def test_a_step_that_was_logged_again_counts_once(tmp_path: Path) -> None:
    """Goal: of a step that a restarted trainer logged again the later row stands. Red with both in the curve."""
    run = write_run(tmp_path / "a", steps=3)
    with run.metrics.open("a") as file:
        file.write('{"stage": "rl", "step": 2, "time": 9.0, "reward_mean": 0.5}\n')
    series = read_run(run.path).series("rl", "reward_mean")
    assert series.steps == (1, 2, 3) and series.values[1] == 0.5


def test_an_early_or_old_run_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """Goal: a run without any results yet, and with fields that later versions have, is read; a pipe in a file's place
    never hangs. Red with KeyError where eval_samples.jsonl lacks `prompt_id`."""
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "config.json").write_text("{}")
    early = read_run(tmp_path / "early")
    assert early.stages == () and early.status is None and early.answers == ()
    run = write_run(tmp_path / "old", steps=3)
    run.eval_samples.write_text('{"stage": "rl", "step": 3, "row": 4, "correct": true}\n')
    run.events.unlink()
    os.mkfifo(run.events)
    old = read_run(run.path)
    assert old.answers[0].prompt_id == "4" and old.answers[0].answer == ""
    assert len(old.remarks) == 1 and "events.jsonl" in old.remarks[0]


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")]
)
def test_what_is_no_run_is_said(tmp_path: Path, make: object) -> None:
    """Goal: a directory without a run, a file, and nothing at all are errors that name the path. Red with an empty run
    returned."""
    make(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(NotARunError, match="x: "):
        read_run(tmp_path / "x")


def test_samples_are_digested(tmp_path: Path) -> None:
    """Goal: best and worst are those that pandas finds, points are evenly taken, lines that are no samples are counted.
    Red with a heap that keeps the worst of the best."""
    run = write_run(tmp_path / "a")
    with run.rollouts.open("a") as file:
        file.write('{"step": 1}\nnot json\n')
    frame = pandas.DataFrame(
        [json.loads(line) for line in run.rollouts.read_text().splitlines()[:-2]]
    )
    digest = digest_samples(run.rollouts, shown=5, points=100)
    assert [sample.reward for sample in digest.best] == list(frame.reward.nlargest(5))
    assert [sample.reward for sample in digest.worst] == list(frame.reward.nsmallest(5))
    assert digest.count == len(frame) == 320 and digest.damaged == 2
    assert (
        digest.points
        == tuple(zip(frame.step, frame.response_length, frame.reward, strict=True))[::4]
    )
    assert digest_samples(tmp_path / "none", shown=5, points=100).count == 0


def test_a_step_that_was_sampled_again_replaces_the_earlier(tmp_path: Path) -> None:
    """Goal: what a resumed run writes again stands alone. Red with both kept."""
    run = write_run(tmp_path / "a", steps=3)
    import random

    with run.rollouts.open("a") as file:
        file.write(json.dumps({**rollout_row(2, 0, random.Random(1), 4), "reward": 0.5}) + "\n")
    digest = digest_samples(run.rollouts, shown=100, points=100)
    assert [sample.step for sample in digest.best].count(2) == 1
    assert (
        {sample.step for sample in digest.best} == {1, 2} == {step for step, _, _ in digest.points}
    )


def test_a_large_file_is_read_in_parts(tmp_path: Path) -> None:
    """Goal: of more bytes than allowed only whole lines of evenly spread parts are read, and it is said how many. Red
    with the line in which a part begins read as a damaged one."""
    run = write_run(tmp_path / "a")
    total = run.rollouts.stat().st_size
    digest = digest_samples(run.rollouts, shown=5, points=10_000, bytes_max=total // 2)
    assert digest.damaged == 0 and digest.bytes_total == total
    assert digest.bytes_read <= total // 2 + rollout_samples.PARTS
    steps = {step for step, _, _ in digest.points}
    assert 100 < digest.count < 320 and len(steps) > 30


def test_prompts_as_text() -> None:
    """Goal: a question, a conversation and any other row are shown as one would read them. Red with JSON for all."""
    assert prompt_text({"question": "2+2?", "answer": "4"}) == "2+2?"
    assert prompt_text({"messages": [{"role": "user", "content": "hi"}]}) == "user: hi"
    assert (
        prompt_text([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]) == "user: hi"
    )
    assert prompt_text({"x": 1}) == '{"x": 1}'
