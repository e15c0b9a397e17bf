"""Trackers beside a run: real windows, with a stand-in for the tracker's package that fails in every way."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollouts.remote import report_verbs
from rollouts.run_dir import (
    EnvironmentSpec,
    LaunchPlan,
    ProcessSpec,
    RunDir,
    TrackerSpec,
    append_jsonl,
)
from rollouts.worker.supervise import tracker_windows
from tests.worker.stands import (
    PATIENCE_S,
    Host,
    as_status,
    events,
    log,
    stage,
    trainer,
    wait_for_end,
)

STEPS = 6
# W&B's calls. What it is given goes to a file; FAULT says how it fails at step 3, or at its start
STAND_IN = """
import json, os, signal, sys, time

def _fault(where):
    fault = os.environ.get("FAULT", "")
    if not fault.startswith(where):
        return
    how = fault.partition("-")[2]
    print("the stand-in:", how, flush=True)
    if how == "blocks":
        while True:
            time.sleep(1)
    elif how == "raises":
        raise RuntimeError("the tracker's server is away")
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exits":
        os._exit(0)
    elif how == "nokey":
        raise ValueError("api_key not configured (no-tty)")
    elif how == "full":  # from now on nothing more fits into a file
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

def _write(**record):
    descriptor = os.open(os.environ["TAKEN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(record) + "\\n").encode())
    os.close(descriptor)

class Settings:
    def __init__(self, **_): pass

class Table:
    def __init__(self, columns, data):
        self.data = data

class Run:
    def log(self, data, step):
        if step == 3 and "loss" in data:
            _fault("step")
        tables = [name for name, value in data.items() if isinstance(value, Table)]
        _write(step=step, **({"tables": tables} if tables else {"loss": data["loss"]}))
    def finish(self, exit_code=None):
        _fault("end")
        _write(finished=exit_code)

def init(**options):
    _fault("start")
    _write(**{name: options[name] for name in ("project", "name", "id", "group")})
    return Run()
"""
TRAINER = f"""
import os, sys, time
from pathlib import Path
from rollouts.run_dir import RunDir, append_jsonl
run = RunDir(Path(os.environ["ROLLOUTS_RUN_PATH"]))
name = os.environ.get("STAGE", "rl")
for step in range(1, {STEPS} + 1):
    append_jsonl(run.rollouts, {{"step": step, "prompt": "p", "response": "r", "reward": 1.0, "advantage": 0.0}})
    append_jsonl(run.metrics, {{"stage": name, "step": step, "time": 1.0 + step, "loss": 0.5}})
wanted, deadline = os.environ.get("AWAITED", ""), time.monotonic() + {PATIENCE_S / 2}
cursor = run.tracker("wandb")  # a machine that is busy starts the tracker late
while wanted and not (cursor.exists() and wanted in cursor.read_text()) and time.monotonic() < deadline:
    time.sleep(0.05)
print(sorted(name for name in sys.modules if name.startswith(("wandb", "rollouts.view"))))
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(STAND_IN)
    return tmp_path / "packages"


@pytest.fixture
def job(host: Host, tmp_path: Path, quick_python: str, packages: Path) -> Any:
    """A function that makes a job with a tracker. Its environment is a real one, without packages."""

    def make(fault: str, *, base_python: str = quick_python, **env: str) -> tuple[Any, RunDir]:
        environment = EnvironmentSpec(
            name="tracker-wandb",
            path=str(tmp_path / "envs" / "tracker"),
            installer="pip",
            base_python=base_python,
            requirements=[],
            requirements_no_deps=[],
            constraints="",
        )
        # one that blocks is given up soon, any other has the time that a busy machine takes
        blocks = AWAITED.get(fault, "")
        env, grace_s = {**env, "AWAITED": blocks}, 1.0 if blocks else 0.6 * PATIENCE_S
        made = host.job(stage("rl", trainer(TRAINER, env=env)), stop_grace_s=grace_s)
        run = RunDir(Path(made["plan"]["run_path"]))
        feed = [f"{environment.path}/bin/python", "-m", "rollouts.view.feed", str(run.path)]
        process = ProcessSpec(
            window="tracker-wandb",
            argv=[*feed, "wandb", "letters", str(run.path)],
            env={
                "PYTHONPATH": "" if fault == "absent" else str(packages),
                "TAKEN": str(tmp_path / "taken.jsonl"),
                "FAULT": fault,
            },
            ready_url=None,
            ready_timeout_s=0.0,
        )
        spec = TrackerSpec(
            kind="wandb", project="letters", environment=environment, process=process
        )
        plan = host_plan(made, spec)
        made["config"]["output"] |= {"trackers": [{"kind": "wandb"}], "experiment_name": "e"}
        return {**made, "plan": plan}, run

    return make


def host_plan(job: dict[str, Any], spec: TrackerSpec) -> dict[str, Any]:
    return replace(LaunchPlan.from_json(job["plan"]), trackers=[spec]).to_json()


def taken(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "taken.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(tmp_path: Path) -> list[int]:
    return [row["step"] for row in taken(tmp_path) if "loss" in row]


def told(run: RunDir) -> list[str]:
    return [row["message"] for row in events(run, "warning") if row["cause"] == "tracker_wandb"]


def ended(host: Host, job: Any) -> None:
    done = host.launch(job)
    assert done.returncode == 0, done.stderr
    wait_for_end(RunDir(Path(job["plan"]["run_path"])))


def send_later(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command that the event names, with a tracker that is well again."""
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("TAKEN", str(tmp_path / "taken.jsonl"))
    monkeypatch.setenv("FAULT", "")
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "later"))
    report_verbs.track_runs([str(run.path)], kind="wandb", project="letters")
    sys.modules.pop("wandb", None)


# what is in the cursor once the fault is there
AWAITED = {"start-blocks": "steps", "step-blocks": '"rl": 2', "end-blocks": '"rl": 6'}
FAULTS = {
    "start-blocks": "lacks 6 of 6 steps",
    "start-raises": "RuntimeError: the tracker's server is away",
    "start-nokey": "api_key not configured",
    "start-exits": "lacks 6 of 6 steps",
    "absent": "No module named 'wandb'",
    "step-blocks": "lacks 4 of 6 steps",
    "step-raises": "RuntimeError: the tracker's server is away",
    "step-killed": "was ended by SIGKILL",
    "step-full": "File too large",
    "end-blocks": "did not end within 1 s",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tracker_that_fails_costs_nothing(
    host: Host, job: Any, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the run is done with every step, the stage ends before anybody waits for the tracker, what is wrong and
    the command that mends it are told, and by that command the tracker has each step once."""
    made, run = job(fault)
    ended(host, made)
    assert (as_status(run)["state"], as_status(run)["exit_code"]) == ("done", 0)
    assert len(run.metrics.read_text().splitlines()) == STEPS
    assert log(run, "trainer").splitlines()[-1] == "[]"  # the trainer has nothing of a tracker
    kinds = [row["kind"] for row in events(run)]
    messages = told(run)
    assert any(FAULTS[fault] in message for message in messages), messages
    assert kinds.index("stage_ended") < len(kinds) - 1 - kinds[::-1].index("warning")
    assert f"deploy track {run.run_id} --to wandb --project letters" in messages[-1]
    assert len(messages) <= 2
    send_later(run, tmp_path, monkeypatch)
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    assert len({row["id"] for row in taken(tmp_path) if "id" in row}) == 1


def test_a_tracker_is_fed(host: Host, job: Any, tmp_path: Path) -> None:
    """Goal: every step in order, the samples of the last one, the run's name and group, and a note that all is there.
    Nothing of the process is left."""
    made, run = job("")
    ended(host, made)
    assert steps(tmp_path) == list(range(1, STEPS + 1)) and told(run) == []
    rows = taken(tmp_path)
    assert (rows[0]["project"], rows[0]["name"], rows[0]["group"]) == (
        "letters",
        f"{run.run_id}-rl",
        "e",
    )
    assert rows[-2:] == [{"step": STEPS, "tables": ["samples"]}, {"finished": 0}]
    assert "it has all 6 steps" in events(run, "note")[-1]["message"]
    assert not run.trackers_end.exists()


def test_a_failed_run_is_failed_there(host: Host, job: Any, tmp_path: Path) -> None:
    """Goal: a trainer that fails is no finished run in the tracker, which has all of its steps. Red with the state not
    passed on."""
    made, run = job("", ENDS_WITH="3")
    ended(host, made)
    assert as_status(run)["exit_code"] == 3
    assert steps(tmp_path) == list(range(1, STEPS + 1)) and taken(tmp_path)[-1] == {"finished": 1}


def test_a_resumed_run_goes_on_in_the_same_one(host: Host, job: Any, tmp_path: Path) -> None:
    """Goal: a run that begins with another's rows and its cursor is the same run in the tracker, without a step
    doubled. Red with the cursor not looked at."""
    made, first = job("")
    ended(host, made)
    again, _ = job("")
    rows = "".join(first.metrics.read_text().splitlines(keepends=True)[:4])
    again["begins"] = {
        "metrics.jsonl": rows,
        "trackers/wandb.json": first.tracker("wandb").read_text(),
    }
    again["plan"]["stages"][0]["trainer"]["argv"][2] = TRAINER.replace(
        "range(1, 6 + 1)", "range(5, 9 + 1)"
    )
    ended(host, again)
    assert steps(tmp_path) == list(range(1, 10))
    opened = [(row["name"], row["id"]) for row in taken(tmp_path) if "id" in row]
    assert opened[0] == opened[1] and opened[0][0] == f"{first.run_id}-rl"


def test_an_environment_that_cannot_be_made(host: Host, job: Any, tmp_path: Path) -> None:
    """Goal: an installer that fails costs the run its tracker alone. Red with the error passed on."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    broken.chmod(0o755)
    made, run = job("", base_python=str(broken))
    ended(host, made)
    assert as_status(run)["state"] == "done"
    messages = told(run)
    assert "gets nothing of this run" in messages[0] and "lacks 6 of 6 steps" in messages[1]


def test_a_tracker_that_takes_nothing_is_noticed(tmp_path: Path) -> None:
    """Goal: steps that wait for long, with a cursor that does not move, are a stall; a slow trainer is none."""
    run = RunDir(tmp_path / "run")
    spec: Any = type("Spec", (), {"kind": "wandb"})()
    now = time.time()
    fed = tracker_windows._Fed(spec, since=now - 1000)
    assert not tracker_windows._stalls(run, fed)  # nothing is logged yet
    append_jsonl(run.metrics, {"stage": "rl", "step": 1})
    run.tracker("wandb").parent.mkdir()
    run.tracker("wandb").write_text("{}")
    os.utime(run.tracker("wandb"), (now - 500, now - 500))
    os.utime(run.metrics, (now - 600, now - 600))
    assert not tracker_windows._stalls(run, fed)  # all is taken, and the trainer is slow
    os.utime(run.metrics, (now, now))
    assert tracker_windows._stalls(run, fed)
    assert not tracker_windows._stalls(run, tracker_windows._Fed(spec, since=now))
