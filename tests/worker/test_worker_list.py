"""The list of a host's runs: states as they are, whatever their files look like."""

import json
import time
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.run_dir import RunDir, Status
from rollouts.worker.list import list_runs
from tests.worker.stands import Host, module, recorded_pid, stage, trainer


def made(home: Path, run_id: str, state: Any, started_at: float, *, exit_code: int | None = None) -> RunDir:
    run = RunDir(run_dir.run_path(home, run_id))
    status = Status(
        run_id=run_id,
        experiment_name="exp",
        state=state,
        stage="rl",
        message="",
        started_at=started_at,
        updated_at=started_at,
        exit_code=exit_code,
    )
    run_dir.write_json_atomic(run.status, status)
    return run


def test_states(tmp_path: Path) -> None:
    """Goal: every state, with `died` for an unfinished run that nobody supervises; oldest first. Red with the status
    believed, and with the rows in the file system's order."""
    made(tmp_path, "b-done", "done", 20.0, exit_code=0)
    run_dir.append_jsonl(made(tmp_path, "a-failed", "failed", 30.0, exit_code=7).metrics, {"step": 3}, {"step": 12})
    made(tmp_path, "c-died", "running", 10.0).lock.touch()
    running = made(tmp_path, "d-running", "running", 40.0)
    made(tmp_path, "e-starting", "starting", time.time())
    made(tmp_path, "f-never-started", "starting", 50.0)
    (tmp_path / "runs" / "only-synced" / "code" / "tree").mkdir(parents=True)
    with run_dir.hold_lock(running):
        rows = list_runs(tmp_path)
    assert [(row["run_id"], row["state"], row["exit_code"], row["live"]) for row in rows] == [
        ("c-died", "died", None, False),
        ("b-done", "done", 0, False),
        ("a-failed", "failed", 7, False),
        ("d-running", "running", None, True),
        ("f-never-started", "died", None, False),
        ("e-starting", "starting", None, True),
    ]
    failed = rows[2]
    assert failed == {
        "run_id": "a-failed",
        "experiment_name": "exp",
        "state": "failed",
        "stage": "rl",
        "step": 12,
        "started_at": 30.0,
        "exit_code": 7,
        "live": False,
    }


def test_damaged_files_do_not_hide_a_run(tmp_path: Path) -> None:
    """Goal: one damaged status.json or metrics.jsonl neither hides its run nor the others. Red with the errors let
    through."""
    made(tmp_path, "good", "done", 1.0, exit_code=0).metrics.write_text("not json\n")
    made(tmp_path, "bad", "done", 2.0).status.write_text("{")
    rows = {row["run_id"]: row for row in list_runs(tmp_path)}
    assert rows["good"]["state"] == "done" and rows["good"]["step"] is None
    assert rows["bad"]["state"] == "died" and rows["bad"]["experiment_name"] is None


def test_the_command(host: Host) -> None:
    """Goal: one JSON list on stdout, also where no run ever was; a live run is live in it. Red with a missing
    directory raised."""
    assert json.loads(module("list", str(host.home)).stdout) == []
    run = host.start(stage("sft", trainer("import time; time.sleep(600)")))
    recorded_pid(run, "trainer")
    (row,) = json.loads(module("list", str(host.home)).stdout)
    assert (row["run_id"], row["state"], row["live"], row["stage"]) == (run.run_id, "running", True, "sft")
    assert module("stop", str(run.path)).returncode == 0
    (row,) = json.loads(module("list", str(host.home)).stdout)
    assert (row["state"], row["exit_code"], row["live"]) == ("stopped", 143, False)
