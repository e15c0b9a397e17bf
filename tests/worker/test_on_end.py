"""output.on_end: the user's command at a run's end, whatever the end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollouts.engines.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from rollouts.run_dir import RunDir
from tests.worker.stands import (
    REPOSITORY,
    Host,
    alive,
    as_status,
    events,
    log,
    module,
    stage,
    survivors,
    trainer,
    wait_for,
    wait_for_end,
)

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
# What it was told, and a process that drops its environment and its session
COMMAND = """
echo "$ROLLOUTS_RUN_ID $ROLLOUTS_STATE $ROLLOUTS_EXIT_CODE $ROLLOUTS_RUN_DIR" >> "$ROLLOUTS_RUN_DIR/told"
env > "$ROLLOUTS_RUN_DIR/environment"; pwd -P > "$ROLLOUTS_RUN_DIR/directory"
env -i setsid sleep 600 & echo $! > "$ROLLOUTS_RUN_DIR/left"
echo said; exit 3
"""


def start(host: Host, text: str, command: str | None) -> RunDir:
    job = host.job(stage("sft", trainer(text)), secrets={"WEBHOOK_TOKEN": "a token"})
    job["config"]["output"]["on_end"] = command
    done = host.launch(job)
    assert done.returncode == 0, done.stderr
    return RunDir(Path(job["plan"]["run_path"]))


@pytest.mark.parametrize(
    ("text", "state", "code"),
    [("print('ok')", "done", 0), ("raise SystemExit(7)", "failed", 7), (SLEEP, "stopped", 143)],
)
def test_it_runs_once_at_every_end(host: Host, text: str, state: str, code: int) -> None:
    """Goal: it is told how the run ended, has the run's secrets and not the engines' keys, its failure changes
    nothing, nothing of it is left, and its event is the last but the run's end. Red with it run for `done` alone, with
    the supervisor's whole environment, and with its exit code as the run's."""
    run = start(host, text, COMMAND)
    if state == "stopped":
        wait_for(lambda: "up" in log(run, "trainer"), "the trainer")
        done = module("stop", str(run.path))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"state": "stopped", "exit_code": 143}
    wait_for_end(run)
    status = as_status(run)
    assert (status["state"], status["exit_code"]) == (state, code)
    assert (run.path / "told").read_text() == f"{run.run_id} {state} {code} {run.path}\n"
    environment = (run.path / "environment").read_text()
    assert "WEBHOOK_TOKEN=a token" in environment
    assert API_KEY_VARIABLE not in environment and ADMIN_KEY_VARIABLE not in environment
    assert Path((run.path / "directory").read_text().strip()) == REPOSITORY
    assert log(run, "on_end") == "said\n"
    last = events(run)[-2:]
    assert [row["kind"] for row in last] == ["on_end", "run_ended"] and last[0]["exit_code"] == 3
    assert "output.on_end ended with 3: logs/on_end.log" in last[0]["message"]
    left = int((run.path / "left").read_text())
    wait_for(lambda: not alive(left), "the end of what it left")
    assert survivors(run) == []


def at_end(run: RunDir, command: str) -> dict[str, Any]:
    """Run it in a process of its own, for three seconds at most: it ends all that descends from that process."""
    program = f"""
import json, pathlib, sys
from rollouts.run_dir import RunDir
from rollouts.worker.supervise import at_end
at_end.ON_END_S = 3.0
run = RunDir(pathlib.Path({str(run.path)!r}))
fields = at_end.run_at_end(run, {command!r}, "done", 0, beat=lambda: None)
print(json.dumps(fields), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return dict(json.loads(done.stderr))


def test_it_is_bounded_in_time(tmp_path: Path) -> None:
    """Goal: a command that does not end is ended with what it started, though that ignores SIGTERM, has a group of its
    own and no mark; one that cannot start is told. Red with its process group alone killed, and without a limit."""
    run = RunDir(tmp_path / "run")
    run.code_tree.mkdir(parents=True)
    run.plan.write_text("{}")
    left = tmp_path / "left"
    found = at_end(
        run,
        f"trap '' TERM; env -i setsid sleep 600 & echo $! > {left}; echo begun; while :; do sleep 1; done",
    )
    assert found["exit_code"] is None and "still ran after 3 s, and was ended" in found["message"]
    assert log(run, "on_end") == "begun\n"
    assert not alive(int(left.read_text()))
    run.code_tree.rmdir()
    found = at_end(run, "true")
    assert found["exit_code"] is None and "output.on_end did not start" in found["message"]
