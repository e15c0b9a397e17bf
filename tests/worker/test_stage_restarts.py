"""Trainers that are killed or crash under the real supervisor: the stage goes on from its last checkpoint."""

import json
import os
import signal
from typing import Any

import pytest

from rollouts import run_dir
from rollouts.run_dir import RunDir
from rollouts.worker.supervise.causes import may_pass
from tests.ports import free_port
from tests.worker.stands import (
    Host,
    as_status,
    engine,
    events,
    process,
    recorded_pid,
    script,
    stage,
    survivors,
    wait_for,
    wait_for_end,
)

# Trains as a trainer does: a row a step, a checkpoint every second one, the last one before its row. Its argument says
# at which steps it holds, by life, until it is killed, and with which words it ends where it does not hold.
TRAINER = """
import json, os, pathlib, sys, time
from rollouts import run_dir
from rollouts.manifest import write_manifest
from rollouts.run_dir import RunDir, append_event, append_jsonl
run, stage, steps = RunDir(pathlib.Path(os.environ["ROLLOUTS_RUN_PATH"])), sys.argv[1], 6
ends = json.loads(sys.argv[2])
life = sum(1 for row in run_dir.iter_jsonl(run.events) if row["kind"] == "training_started")
found = run_dir.restart_from(run, stage)
first = int(found[-6:]) if found else 0
append_event(run, "training_started", stage=stage, step=first, steps_total=steps)
if first == 0:
    append_jsonl(run.eval, {"stage": "base", "step": 0, "metric": "loss", "value": 1.0})
for step in range(first + 1, steps + 1):
    append_jsonl(run.rollouts, {"step": step, "life": life}) if stage == "rl" else None
    at, how = ends[life] if life < len(ends) else (0, "")
    if step == at:
        print(how, flush=True)
        while how == "hold":
            time.sleep(0.02)
        sys.exit(3)
    append_jsonl(run.metrics, {"stage": stage, "step": step, "time": time.time(), "life": life})
    append_jsonl(run.eval, {"stage": stage, "step": step, "metric": "loss", "value": 1.0 / step})
    if step % 2 == 0 and not os.environ.get("NO_CHECKPOINTS"):
        directory = run.checkpoints / stage / f"step_{step:06d}"
        directory.mkdir(parents=True)
        (directory / "weights").write_text(str(step))
        write_manifest(directory)
        append_event(run, "checkpoint", stage=stage, step=step, path=str(directory.relative_to(run.path)))
"""
GLOO = """Traceback (most recent call last):
  File x
RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer"""


def start(host: Host, ends: list[tuple[int, str]], *, restarts_max: int = 2, **env: str) -> RunDir:
    """A run whose trainer ends at these (step, words), a life each."""
    argv = script(TRAINER, "sft", json.dumps(ends))
    return host.start(stage("sft", process("trainer", argv, env=env)), restarts_max=restarts_max)


def kill_at(run: RunDir, life: int) -> None:
    """Kill the trainer of this life, counted from 0, once it holds."""
    wait_for(
        lambda: run.log("trainer").exists() and run.log("trainer").read_text().count("hold") > life,
        "hold",
    )
    os.kill(recorded_pid(run, "trainer"), signal.SIGKILL)


def steps(run: RunDir, name: str = "metrics.jsonl") -> list[tuple[Any, ...]]:
    return [(row["step"], row.get("life")) for row in run_dir.read_jsonl(run.path / name)]


def test_a_killed_trainer_goes_on_from_its_last_checkpoint(host: Host) -> None:
    """Goal: two kills cost two restarts, and the curve is one: each step stands once, those after a checkpoint as they
    were done again. How often and why is in the events. Red with the rows left uncut."""
    run = start(host, [(4, "hold"), (6, "hold")])
    kill_at(run, 0)
    kill_at(run, 1)
    wait_for_end(run)
    assert as_status(run)["state"] == "done", as_status(run)
    assert steps(run) == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert [step for step, _ in steps(run, "eval.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    told = [
        (row["step"], row["checkpoint"], row["restarts_left"])
        for row in events(run, "stage_restarted")
    ]
    assert told == [
        (2, "checkpoints/sft/step_000002", 1),
        (4, "checkpoints/sft/step_000004", 0),
    ]
    assert all("SIGKILL" in row["reason"] for row in events(run, "stage_restarted"))
    records = [
        run_dir.read_exit(run, "sft", name)
        for name in ("trainer.life-1", "trainer.life-2", "trainer")
    ]
    assert [record and record.code for record in records] == [137, 137, 0]
    assert not survivors(run)


def test_without_a_checkpoint_the_stage_begins_anew(host: Host) -> None:
    """Goal: what was measured before the first step is measured again, and stands once. Red with base rows kept."""
    run = start(host, [(3, "hold")], NO_CHECKPOINTS="1")
    kill_at(run, 0)
    wait_for_end(run)
    assert as_status(run)["state"] == "done"
    assert steps(run) == [(step, 1) for step in range(1, 7)]
    assert [step for step, _ in steps(run, "eval.jsonl")] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("ends", "restarts_max", "restarts"),
    [
        pytest.param([(3, GLOO)], 1, 1, id="a lost rank"),
        pytest.param([(3, "error: the reward raised ValueError")], 1, 0, id="a mistake"),
        pytest.param([(3, "hold")], 0, 0, id="no restarts"),
    ],
)
def test_what_is_tried_again(
    host: Host, ends: list[tuple[int, str]], restarts_max: int, restarts: int
) -> None:
    """Goal: a mistake ends the run, as before, and so does everything where the config allows no restart."""
    run = start(host, ends, restarts_max=restarts_max)
    if ends[0][1] == "hold":
        kill_at(run, 0)
    wait_for_end(run)
    assert len(events(run, "stage_restarted")) == restarts
    assert as_status(run)["state"] == ("done" if restarts else "failed")


def test_engines_start_with_the_stage(host: Host) -> None:
    """Goal: a stage that restarts has engines that serve, and samples stand once; the record of each life is kept."""
    argv = script(TRAINER, "rl", json.dumps([(4, "hold")]))
    run = host.start(stage("rl", process("trainer", argv), engine(free_port())), restarts_max=1)
    kill_at(run, 0)
    wait_for_end(run)
    assert as_status(run)["state"] == "done", as_status(run)
    assert steps(run, "rollouts.jsonl") == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert len(events(run, "engine_ready")) == 2
    assert run.exit("rl", "engine-0.life-1").exists()


RANK_KILLED = (
    "E1130 10:00:00.1 77 torch/distributed/elastic/multiprocessing/api.py:9] "
    "failed (exitcode: -9) local_rank: 1 (pid: 8)"
)


@pytest.mark.parametrize(
    ("said", "again"),
    [
        (RANK_KILLED, True),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", True),
        ("torch.distributed.DistBackendError: NCCL error in: x", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", False),
        ("ValueError: my reward", False),
        ("error: data.rl_mixture is empty", False),
    ],
)
def test_what_may_pass(said: str, again: bool) -> None:
    """Goal: faults of machines may pass; mistakes, and memory that one step needs, come again."""
    lines = (
        [said]
        if said.startswith(("error", "E1130"))
        else ["Traceback (most recent call last):", "  x", said]
    )
    assert may_pass(lines) is again
