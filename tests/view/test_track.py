"""`deploy track`: runs copied into the real trackers, each read back from its own files."""

import json
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rollouts.remote import report_verbs
from rollouts.remote.errors import DeployError
from rollouts.remote.package import clone_requirements
from rollouts.run_dir import RunDir, append_jsonl
from rollouts.view import track
from rollouts.view.trackers import TRACKERS, TrackedStage, columns
from tests.built_environments import interpreter_with
from tests.docs_blocks import ROOT
from tests.view.event_files import steps_of
from tests.view.runs import START, write_run
from tests.worker.stands import PATIENCE_S, wait_for

Steps = list[int]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that a tracker keeps under the test's own directory, and nothing sent anywhere."""
    for name in ("HOME", "ROLLOUTS_HOME", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def in_tensorboard(home: Path, stage: str) -> Steps:
    return steps_of(home / "tensorboard" / "example" / f"run-{stage}")


def in_mlflow(home: Path, stage: str) -> Steps:
    import mlflow

    client = mlflow.MlflowClient((home / "mlflow").as_uri())
    (experiment,) = [found for found in client.search_experiments() if found.name == "example"]
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [found for found in runs if found.info.run_name == f"run-{stage}"]
    assert run.data.params["rl.loss.kind"] == "grpo"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]


def in_trackio(home: Path, stage: str) -> Steps:
    import os

    with sqlite3.connect(f"{os.environ['TRACKIO_DIR']}/example.db") as database:
        rows = database.execute(
            "select step, metrics from metrics where run_name = ? order by id", (f"run-{stage}",)
        ).fetchall()
    return [step for step, numbers in rows if "loss" in json.loads(numbers)]


def in_wandb(home: Path, stage: str) -> Steps:
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((home / "wandb" / "wandb").glob("offline-run-*/*.wandb")):
        name, steps = "", []
        for data in leveldb_records(file.read_bytes()):
            record = Record.FromString(data)
            name = record.run.display_name or name
            items = {item.key or item.nested_key[0]: item for item in record.history.item}
            if "loss" in items:
                steps.append(int(json.loads(items["step"].value_json)))
        found += steps if name == f"run-{stage}" else []
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """W&B's file: a header of 7 bytes, then LevelDB's log: blocks of 32 KiB, records of 7 bytes of header each."""
    at, held = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, part = struct.unpack("<HB", data[at + 4 : at + 7])  # 1: whole, 2: first, 4: last
        held = (b"" if part in (1, 2) else held) + data[at + 7 : at + 7 + length]
        if part in (1, 4):
            yield held
        at += 7 + length


READERS: dict[str, Callable[[Path, str], Steps]] = {
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
    "wandb": in_wandb,
}


ROW = {"stage": "rl", "time": START + 900, "loss": 0.5, "note": "text", "lr": None}
COPY = (
    "import sys; from rollouts.view.track import track; from rollouts.view.run_data import read_run; "
    "from pathlib import Path; found = track(read_run(Path(sys.argv[1])), sys.argv[2], 'example'); "
    "print('steps', found.steps)"
)


def python_with(kind: str) -> str:
    """Trackio does not install beside verifiers, which is in dev: it has an environment of its own."""
    if kind != "trackio":
        return sys.executable
    return interpreter_with("tracker-trackio", clone_requirements(ROOT, ["trackio"]))


def sent(run: RunDir, kind: str) -> int:
    """Copy the run, and return how many steps were new."""
    if kind != "trackio":
        answer = report_verbs.track_runs([str(run.path)], kind=kind, project=None)
        (found,) = answer.document["runs"]
        assert (found["run"], found["project"]) == ("run", "example")
        return int(found["steps"])
    command = [python_with(kind), "-c", COPY, str(run.path), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_run_is_there_once(tmp_path: Path, kind: str) -> None:
    """Goal: every step of both stages, under its own number; a later copy brings the new steps alone, and one more
    brings none. Red with a copy that begins anew."""
    run = write_run(tmp_path / "run", steps=5)
    home = tmp_path / "rollouts_home" / "trackers"
    counts = [sent(run, kind)]
    append_jsonl(run.metrics, {**ROW, "step": 6}, {**ROW, "step": 7})
    counts += [sent(run, kind) for _ in range(2)]
    assert counts == [10, 2, 0]
    assert READERS[kind](home, "sft") == [1, 2, 3, 4, 5]
    assert READERS[kind](home, "rl") == [1, 2, 3, 4, 5, 6, 7]
    assert not [
        path for path in run.path.rglob("*") if "track" in path.name or "wandb" in path.name
    ]


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_run_that_goes_on_is_fed(tmp_path: Path, kind: str) -> None:
    """Goal: the process beside a run sends what comes while it runs, ends when it is asked to, and a later copy by hand
    finds nothing left, where both send to the same place."""
    run = write_run(tmp_path / "run", steps=5)
    home = tmp_path / "rollouts_home" / "trackers"
    argv = [python_with(kind), "-m", "rollouts.view.feed", str(run.path), kind, "example"]
    with (tmp_path / "said").open("w") as said:
        feed = subprocess.Popen([*argv, str(home / kind)], cwd=ROOT, stdout=said, stderr=said)
        wait_for(run.tracker(kind).exists, "the cursor")
        append_jsonl(run.metrics, {**ROW, "step": 6})
        wait_for(lambda: '"rl": 6' in run.tracker(kind).read_text(), "step 6")
        append_jsonl(run.metrics, {**ROW, "step": 7})
        run.trackers_end.write_text("done")
        assert feed.wait(PATIENCE_S) == 0, (tmp_path / "said").read_text()
    assert READERS[kind](home, "sft") == [1, 2, 3, 4, 5]
    assert READERS[kind](home, "rl") == [1, 2, 3, 4, 5, 6, 7]
    assert sent(run, kind) == 0


class Failing:
    """A tracker that takes some steps, and then no more."""

    def __init__(self, taken: list[tuple[str, int]], stage: TrackedStage) -> None:
        self.taken, self.stage, self.fails_at = taken, stage, 3

    def log(self, step: int, time_s: float, numbers: Any) -> None:
        if step == self.fails_at and (self.stage.name, -1) not in self.taken:
            self.taken.append((self.stage.name, -1))
            raise ConnectionError("the server is away")
        self.taken.append((self.stage.name, step))

    def table(self, name: str, step: int, rows: Sequence[Any]) -> None:
        assert rows

    def flush(self) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        self.taken.append((self.stage.name, 0))


def test_a_tracker_that_fails_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the error says what failed and what to do, the tracker is closed, and the next copy begins with the step
    that failed. Red with steps noted only at the end."""
    run, taken = write_run(tmp_path / "run", steps=5), list[tuple[str, int]]()
    monkeypatch.setattr(track, "open_tracker", lambda kind, stage: Failing(taken, stage))
    with pytest.raises(DeployError, match="the server is away") as failed:
        report_verbs.track_runs([str(run.path)], kind="mlflow", project="p")
    assert "goes on from the last step" in failed.value.problems[0].text()
    with pytest.raises(DeployError):  # rl fails in its turn
        report_verbs.track_runs([str(run.path)], kind="mlflow", project="p")
    report_verbs.track_runs([str(run.path)], kind="mlflow", project="p")
    for stage in ("run-sft", "run-rl"):
        assert [step for name, step in taken if name == stage and step > 0] == [1, 2, 3, 4, 5]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: an unknown tracker names those that are known, a missing package how to get it. Red with the bare error."""
    run = write_run(tmp_path / "run", steps=2)
    with pytest.raises(DeployError, match="'neptune' is not a tracker") as unknown:
        report_verbs.track_runs([str(run.path)], kind="neptune", project=None)
    assert "wandb, trackio, mlflow, tensorboard" in unknown.value.problems[0].text()
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(DeployError, match="tensorboardX is not installed") as missing:
        report_verbs.track_runs([str(run.path)], kind="tensorboard", project=None)
    assert "pip install 'rollouts[tensorboard]'" in missing.value.problems[0].text()


def test_a_column_has_one_type() -> None:
    """Goal: numbers stay numbers, a column of several types is text. Red with values as they are."""
    found = columns([{"a": 1, "b": "x", "c": {"q": 1}}, {"a": 2.5, "b": 3, "c": None}])
    assert found == {"a": [1, 2.5], "b": ["x", "3"], "c": ['{"q": 1}', "null"]}
