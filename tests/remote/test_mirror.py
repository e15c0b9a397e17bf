"""The mirror and what is folded from it: bytes land once, checkpoints are whole or not there, tables tell the truth."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.manifest import manifest_problems, write_manifest
from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.run.checkpoints import pull_checkpoint
from rollouts.remote.run.connection import RetryPolicy, RunConnection
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.pull import final_pull
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import RunDir, append_jsonl
from rollouts.view.fold import (
    View,
    duration,
    eval_line,
    evaluation_table,
    event_line,
    fold,
    metrics_line,
)
from rollouts.view.tables import columns


def chunk(name: str, offset: int, data: bytes) -> dict[str, Any]:
    return {"file": name, "offset": offset, "data": base64.b64encode(data).decode()}


@given(
    data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=6), seed=st.randoms()
)
def test_chunks_in_any_repetition(
    data: bytes, cuts: list[int], seed: Any, tmp_path_factory: Any
) -> None:
    """Goal: chunks repeated or overlapping, as after reconnects, give the same file. Red with data appended."""
    mirror = Mirror(RunDir(tmp_path_factory.mktemp("m")))
    name, held = "logs/trainer.log", 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        back = seed.randint(0, held)  # the host goes on at what was held some time ago
        mirror.apply(chunk(name, back, data[back:cut]))
        held = max(held, cut)
    assert (mirror.run.path / name).read_bytes() == data
    assert mirror.offsets() == {name: len(data)}


def test_a_gap_is_refused(tmp_path: Path) -> None:
    """Goal: bytes that are missing in between end the connection, not the file. Red without the size check."""
    mirror = Mirror(RunDir(tmp_path))
    with pytest.raises(TransportError) as caught:
        mirror.apply(chunk("metrics.jsonl", 5, b"x"))
    assert caught.value.lost and mirror.offsets() == {"metrics.jsonl": 0}


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "logs/../../outside"])
def test_a_host_cannot_write_elsewhere(name: str, tmp_path: Path) -> None:
    """Goal: a name from the host stays inside the mirror. Red without the check."""
    with pytest.raises(DeployError, match="outside"):
        Mirror(RunDir(tmp_path / "m")).apply(chunk(name, 0, b"x"))


def test_rows_come_once_and_whole(tmp_path: Path) -> None:
    """Goal: a torn line waits for its end. Red with every read line parsed."""
    mirror = Mirror(RunDir(tmp_path))
    mirror.apply(chunk("metrics.jsonl", 0, b'{"step":1}\n{"ste'))
    assert list(mirror.rows("metrics.jsonl")) == [{"step": 1}]
    assert list(mirror.rows("metrics.jsonl")) == []
    mirror.apply(chunk("metrics.jsonl", 16, b'p":2}\n'))
    assert list(mirror.rows("metrics.jsonl")) == [{"step": 2}]
    assert list(mirror.rows("eval.jsonl")) == []


def make_checkpoint(run_path: Path, path: str) -> Path:
    directory = run_path / path
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights" * 1000)
    write_manifest(directory)
    return directory


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    """Goal: a damaged checkpoint gets no name; pulled again after repair it does. Red without manifest_problems."""
    host, mirror = tmp_path / "host", RunDir(tmp_path / "mirror")
    damaged = make_checkpoint(host, "checkpoints/sft/step_000010")
    good = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(b"x" + good[1:])
    with pytest.raises(DeployError, match="arrived damaged"):
        pull_checkpoint(LocalTransport(), str(host), mirror, "checkpoints/sft/step_000010")
    assert list((mirror.checkpoints / "sft").glob("step*")) == []
    (damaged / "model.safetensors").write_bytes(good)
    path = pull_checkpoint(LocalTransport(), str(host), mirror, "checkpoints/sft/step_000010")
    assert manifest_problems(path) == () and not list(path.parent.glob(".*"))
    with pytest.raises(DeployError, match="could not be pulled"):
        pull_checkpoint(LocalTransport(), str(host), mirror, "checkpoints/sft/step_000099")


def test_latest_is_the_highest_step(tmp_path: Path) -> None:
    """Goal: steps are numbers: 1000000 comes after 999999. Red with names compared as text."""
    host, mirror = tmp_path / "host", RunDir(tmp_path / "mirror")
    for step in ("step_1000000", "step_999999"):
        make_checkpoint(host, f"checkpoints/rl/{step}")
        pull_checkpoint(LocalTransport(), str(host), mirror, f"checkpoints/rl/{step}")
    assert mirror.latest_checkpoint("rl").resolve().name == "step_1000000"


def test_a_checkpoint_that_the_run_removed_is_not_waited_for(tmp_path: Path) -> None:
    """Goal: keep-last-n on the host does not make the last pull fail; what came before stays here.

    Red with the removal passed over in `fold` (step 1 could not be pulled), and with half of step 2 left behind.
    """
    host, mirror = tmp_path / "host", RunDir(tmp_path / "mirror")
    paths = [f"checkpoints/sft/step_00000{step}" for step in (0, 1, 2, 3)]
    for path in (paths[0], paths[3]):
        make_checkpoint(host, path)
    pull_checkpoint(LocalTransport(), str(host), mirror, paths[0])
    shutil.rmtree(host / paths[0])
    half = mirror.path / "checkpoints/sft/.step_000002.part"
    half.mkdir()
    rows = [{"kind": "checkpoint", "path": path} for path in paths]
    rows += [{"kind": "checkpoint_removed", "path": path} for path in paths[:3]]
    append_jsonl(mirror.events, *rows)
    entry = RunEntry(
        run_id="r",
        experiment_name="e",
        target="local",
        home=str(host),
        run_path=str(host),
        local_dir=str(mirror.path),
        repository="",
        created_at=0.0,
    )
    final_pull(RunConnection(entry, "python3", LocalTransport()))
    here = sorted(path.name for path in (mirror.checkpoints / "sft").iterdir())
    assert here == ["latest", "step_000000", "step_000003"]
    make_checkpoint(host, paths[1])
    # a resumed run wrote the step again
    append_jsonl(mirror.events, {"kind": "checkpoint", "path": paths[1]})
    final_pull(RunConnection(entry, "python3", LocalTransport()))
    assert manifest_problems(mirror.path / paths[1]) == ()


EVENTS: list[dict[str, Any]] = [
    {"kind": "run_started", "mode": "sft+rl"},
    {"kind": "environment", "name": "trainer", "action": "reused", "seconds": 0.0},
    {"kind": "stage_started", "stage": "sft"},
    {"kind": "training_started", "stage": "sft", "step": 0, "steps_total": 10},
    {"kind": "checkpoint", "stage": "sft", "step": 10, "path": "checkpoints/sft/step_000010"},
    {"kind": "stage_ended", "stage": "sft", "seconds": 61.4},
    {"kind": "stage_started", "stage": "rl"},
    {"kind": "engine_ready", "window": "engine-0", "url": "u", "seconds": 2.0},
    {"kind": "training_started", "stage": "rl", "step": 4, "steps_total": 54},
]


def folded(*rows: tuple[str, dict[str, Any]]) -> View:
    view = View()
    for file, row in rows:
        view = fold(view, file, row)
    return view


def test_the_view() -> None:
    """Goal: phases, totals and rate of the stage that runs. Red with a late row of sft taken for rl's progress."""
    rows = [("events.jsonl", event) for event in EVENTS]
    for step, time in ((5, 100.0), (6, 102.0), (14, 118.0)):
        rows.append(
            (
                "metrics.jsonl",
                {"stage": "rl", "step": step, "time": time, "loss": 0.03125, "reward_mean": 0.5},
            )
        )
    late = {"stage": "sft", "step": 10, "time": 90.0, "loss": 1.0}
    view = folded(*rows, ("metrics.jsonl", late))
    assert (view.state, view.stage, view.step, view.steps_total, view.eta_s) == (
        "running",
        "rl",
        14,
        54,
        80.0,
    )
    assert [name for name, _ in view.phases] == ["environment trainer", "sft", "engine-0", "rl"]
    assert dict(view.phases)["sft"] == "done after 61 s" and view.checkpoints == (
        "checkpoints/sft/step_000010",
    )
    assert (
        metrics_line(view, rows[-1][1])
        == "stage=rl step=14/54 loss=0.03125 reward_mean=0.5 eta=1m20s"
    )
    assert metrics_line(view, late) == "stage=sft step=10/10 loss=1"


def test_unknown_events_are_shown_and_change_nothing() -> None:
    """Goal: a newer worker's event does not stop an older deploy. Red with a KeyError on the kind."""
    row = {
        "time": 1.0,
        "kind": "from_the_future",
        "what": "x",
        "log_tail": ["secret"],
        "nothing": None,
    }
    assert (
        fold(View(), "events.jsonl", row) == View() and event_line(row) == "from_the_future what=x"
    )


def test_before_and_after() -> None:
    """Goal: the last value of each stage, per metric and split. Red with the first value of a stage."""

    def row(
        stage: str, step: int, value: float, split: str = "test", metric: str = "exact_match"
    ) -> dict[str, Any]:
        return {"stage": stage, "step": step, "split": split, "metric": metric, "value": value}

    evals = (row("base", 0, 0.1), row("sft", 9, 0.4), row("rl", 5, 0.5), row("rl", 9, 0.75))
    assert evaluation_table(evals) == [
        ["", "base", "sft", "rl"],
        ["exact_match", "0.1000", "0.4000", "0.7500"],
    ]
    two = evaluation_table((*evals, row("sft", 9, 1.5, "dev", "validation_loss")))
    assert two[1][0] == "exact_match (test)" and two[2] == [
        "validation_loss (dev)",
        "",
        "1.5000",
        "",
    ]
    assert evaluation_table(()) == [] and columns([]) == ""


def test_evaluations_by_task() -> None:
    """Goal: each task has its own line under the total. Red with the task left out of the name: the last one wins."""
    row = {"stage": "rl", "step": 5, "split": "test", "metric": "exact_match"}
    evals = ({**row, "task": "all", "value": 0.5}, {**row, "task": "arc", "value": 0.25})
    assert evaluation_table(evals) == [
        ["", "rl"],
        ["exact_match", "0.5000"],
        ["exact_match arc", "0.2500"],
    ]
    assert eval_line(evals[0]) == "eval stage=rl step=5 split=test exact_match=0.5"
    assert eval_line(evals[1]) == "eval stage=rl step=5 split=test task=arc exact_match=0.25"


def test_text_of_numbers() -> None:
    """Goal: columns of numbers are aligned right, durations read well. Red with ljust throughout."""
    assert columns([["a", "n"], ["x", "1.5"], ["y", "10.25"]]) == "a      n\nx    1.5\ny  10.25"
    assert [duration(s) for s in (5, 65, 3725)] == ["5s", "1m05s", "1h02m"]


def test_patience_grows_and_is_bounded() -> None:
    """Goal: pauses double up to a bound, spread by jitter. Red with no bound (2**60 s)."""
    low, high = RetryPolicy(jitter=lambda: 0.0), RetryPolicy(jitter=lambda: 0.999)
    assert [low.pause_s(n) for n in (1, 2, 3, 60)] == [0.5, 1.0, 2.0, 15.0]
    assert high.pause_s(60) < 45.0 and json.dumps(high.pause_s(1))
