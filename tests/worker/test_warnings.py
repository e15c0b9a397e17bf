"""The health rules while a run goes on: `warning` events, and output.on_warning."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rollouts.health.live_records import LiveRecords
from rollouts.health.rules import JUDGED, symptoms
from rollouts.run_dir import RunDir, append_jsonl
from rollouts.view.run_data import read_run
from rollouts.worker.supervise.health_watch import CLEAR_STEPS, HealthWatch
from tests.view.runs import write_run
from tests.worker.stands import Host, events, log, stage, trainer, wait_for_end

TRAINER = """
import os
from pathlib import Path
from rollouts.run_dir import RunDir, append_event, append_jsonl
run = RunDir(Path(os.environ["ROLLOUTS_RUN_PATH"]))
for step in range(1, 31):
    append_jsonl(run.metrics, {"stage": "rl", "step": step, "time": 1.0 + step, "tokens_per_s": 9.0,
                               "truncated_frac": 0.9})
append_event(run, "warning", stage="rl", step=30, cause="all_zero", message="nothing is learned")
"""
COMMAND = 'echo "$ROLLOUTS_RUN_ID $ROLLOUTS_STAGE $ROLLOUTS_RULE $ROLLOUTS_MESSAGE"'


def ended(host: Host, command: str | None) -> RunDir:
    job = host.job(stage("rl", trainer(TRAINER)))
    job["config"]["output"]["on_warning"] = command
    done = host.launch(job)
    assert done.returncode == 0, done.stderr
    run = RunDir(Path(job["plan"]["run_path"]))
    wait_for_end(run)
    assert events(run)[-1]["state"] == "done"
    return run


def test_a_rule_that_finds_something_is_an_event_and_a_command(host: Host) -> None:
    """Goal: one event with the stage, the step, the numbers and what to do; the command is told of it and of the
    trainer's own. Red without the last look, with an event a look, and with the rules' warnings alone."""
    run = ended(host, COMMAND)
    found = {row["cause"]: row for row in events(run, "warning")}
    assert set(found) == {"truncated", "all_zero"} and len(events(run, "warning")) == 2
    assert (found["truncated"]["stage"], found["truncated"]["step"]) == ("rl", 30)
    assert "90% of the responses were cut off" in found["truncated"]["message"]
    assert "What to do: Raise rl.max_new_tokens" in found["truncated"]["message"]
    told = log(run, "on_warning").splitlines()
    assert sorted(line.split()[2] for line in told) == ["all_zero", "truncated"]
    assert all(line.startswith(f"{run.run_id} rl ") for line in told)


def test_a_command_that_hangs_costs_the_run_nothing(host: Host) -> None:
    """Goal: the run is done all the same, and nothing of the command is left. Red with the command waited for."""
    run = ended(host, "echo begun; exec sleep 600")
    assert log(run, "on_warning") == "begun\n"


def metrics(run: RunDir, steps: range, **numbers: float) -> None:
    rows = ({"stage": "rl", "step": step, "time": float(step), **numbers} for step in steps)
    append_jsonl(run.metrics, *rows)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.path.mkdir()
    return made


def test_a_finding_is_told_again_once_it_cleared(run: RunDir) -> None:
    """Goal: a rule that goes on finding is told once; after enough steps without, a new finding is told. Red with the
    finding told in every look, and with none after the first."""
    told: list[dict[str, Any]] = []
    watch = HealthWatch(run, lambda kind, **fields: told.append(fields))
    metrics(run, range(1, 31), truncated_frac=0.9, tokens_per_s=1.0)
    watch.look(now=True)
    metrics(run, range(31, 40), truncated_frac=0.9, tokens_per_s=1.0)
    watch.look(now=True)
    assert [row["cause"] for row in told] == ["truncated"] and told[0]["step"] == 30
    metrics(run, range(40, 41 + 30 + CLEAR_STEPS), truncated_frac=0.0, tokens_per_s=1.0)
    watch.look(now=True)
    metrics(run, range(100, 120), truncated_frac=0.9, tokens_per_s=1.0)
    watch.look(now=True)
    assert [row["cause"] for row in told] == ["truncated"] * 2 and told[1]["step"] == 119


def test_looks_are_rare(run: RunDir) -> None:
    """Goal: between two looks nothing is read. Red without the interval."""
    told: list[dict[str, Any]] = []
    watch = HealthWatch(run, lambda kind, **fields: told.append(fields))
    watch.look()
    metrics(run, range(1, 31), truncated_frac=0.9, tokens_per_s=1.0)
    assert watch.look() == [] and told == []


@pytest.mark.parametrize("seed", range(3))
def test_growing_files_tell_what_the_whole_ones_do(tmp_path: Path, seed: int) -> None:
    """Goal: read piece by piece, torn lines among them, a run has the findings of `deploy report`. Red with a piece
    that ends within a line taken as it is, and with steps that a resumed run logs again kept twice."""
    whole = write_run(tmp_path / "whole", steps=60, seed=seed)
    rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    late = [{**row, "truncated_frac": 0.9, "entropy": 0.001} for row in rows[-40:]]
    append_jsonl(whole.metrics, *late)  # again, from the 21st step of rl on
    usage = {"stage": "rl", "gpus": [{"gpu": 0, "processes": ["trainer-0"], "use": 0.1}]}
    times = [row["time"] for row in late]
    append_jsonl(whole.gpu, *({"time": at, "processes": [], **usage} for at in times))
    growing = RunDir(tmp_path / "growing")
    growing.path.mkdir()
    records = LiveRecords(growing)
    for file in (whole.metrics, whole.eval, whole.events, whole.gpu):
        data = file.read_bytes() + b'{"torn'
        for begin in range(0, len(data), 1000 + seed):
            with (growing.path / file.name).open("ab") as stream:
                stream.write(data[begin : begin + 1000 + seed])
            records.look()
    found, read = symptoms(records), read_run(whole.path)
    assert found == symptoms(read)
    for part, name in itertools.product(("sft", "rl"), JUDGED):
        here, there = records.series(part, name), read.series(part, name)
        assert tuple(here.steps) == there.steps and tuple(here.values) == there.values
    assert {"truncated", "entropy_collapse", "gpu_idle"} <= {symptom.cause for symptom in found}
    idle = next(symptom for symptom in found if symptom.cause == "gpu_idle")
    assert "GPU 0 (trainer-0) was idle 90% of the time" in idle.detail
