"""The supervisor over whole runs: real tmux, real processes, small scripts for trainer and engine."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollouts import run_dir
from rollouts.manifest import write_manifest
from rollouts.run_dir import LaunchPlan, RunDir
from rollouts.worker.supervise import pulse
from rollouts.worker.supervise.journal import Journal
from rollouts.worker.supervise.peers import NoPeers
from tests.ports import free_port
from tests.worker.stands import (
    ENGINE,
    Host,
    as_status,
    engine,
    events,
    log,
    process,
    recorded_pid,
    script,
    stage,
    survivors,
    tmux_sessions,
    trainer,
    wait_for,
    wait_for_end,
)

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
SHELL_SLEEP = [
    "/bin/sh",
    "-c",
    "echo up; exec sleep 600",
]  # says so at once, also on a slow machine
ASK_ENGINE = """
import sys, urllib.request
print("engine said", urllib.request.urlopen(sys.argv[1]).status, flush=True)
"""


def assert_failed(run: RunDir, code: int, window: str, *parts: str) -> dict:
    """The run failed with this code, and its error event names the window and says all of `parts`."""
    status, (error,) = as_status(run), events(run, "error")
    assert (status["state"], status["exit_code"]) == ("failed", code), status
    assert error["window"] == window
    for part in parts:
        assert part in error["message"], error["message"]
    ended = events(run, "run_ended")[-1]
    assert (ended["state"], ended["exit_code"]) == ("failed", code)
    record = run_dir.read_exit(run, "run", "supervisor")
    assert record is not None and record.exit_code == code
    return error


@pytest.fixture
def two_stages(host: Host) -> RunDir:
    port = free_port()
    asking = process("trainer", script(ASK_ENGINE, f"http://127.0.0.1:{port}/ready"))
    return host.finish(
        stage("sft", trainer("print('sft trained')")), stage("rl", asking, engine(port))
    )


def test_two_stages_with_an_engine(two_stages: RunDir) -> None:
    """Goal: stages run in order, the engine answers before the RL trainer starts, the run ends done with 0, its session
    and its secrets are gone. Red with the wait for the ready URL removed, and with secrets kept."""
    run = two_stages
    status = as_status(run)
    assert (status["state"], status["exit_code"], status["stage"]) == ("done", 0, "rl")
    assert log(run, "trainer") == "sft trained\nengine said 200\n"
    kinds = [row["kind"] for row in events(run)]
    assert kinds == [
        *("run_started", "stage_started", "process_ended", "stage_ended"),
        *(
            "stage_started",
            "engine_ready",
            "process_ended",
            "process_ended",
            "stage_ended",
            "run_ended",
        ),
    ]
    ended = [
        (row["stage"], row["window"], row["exit_code"], row["signal"])
        for row in events(run, "process_ended")
    ]
    assert ended == [
        ("sft", "trainer", 0, None),
        ("rl", "trainer", 0, None),
        ("rl", "engine-0", None, signal.SIGTERM),
    ]
    assert events(run, "run_started")[0]["mode"] == "sft+rl"
    assert run.run_id not in tmux_sessions()
    assert not run.secrets.exists()
    assert not run_dir.is_live(run)


def test_a_failing_trainer_gives_its_code_and_last_lines(host: Host) -> None:
    """Goal: the trainer's exit code is the run's, its last 50 log lines reach event and supervisor log, and the next
    stage does not start. Red with the log tail left empty, and with the failed stage passed over."""
    noisy = "for i in range(200): print('line', i)\nraise SystemExit(7)"
    run = host.finish(stage("sft", trainer(noisy)), stage("rl", trainer("print('never')")))
    error = assert_failed(run, 7, "trainer", "stage sft", "exit code 7")
    assert error["log_tail"] == [f"line {i}" for i in range(150, 200)]
    assert "line 199" in log(run, "supervisor") and "line 149\n" not in log(run, "supervisor")
    assert "never" not in log(run, "trainer")
    assert events(run, "stage_ended") == []


def test_a_trainer_ended_by_a_signal(host: Host) -> None:
    """Goal: a trainer that a signal ended is a failure with 128 + signal, as the kernel's OOM killer would leave it.
    Red with the exit record's code taken for 0 where it is None."""
    run = host.finish(stage("sft", trainer("import os; os.kill(os.getpid(), 9)")))
    assert_failed(run, 137, "trainer", "SIGKILL")
    assert run_dir.read_exit(run, "sft", "trainer").signal == signal.SIGKILL


def test_an_engine_that_dies_before_it_is_ready(host: Host) -> None:
    """Goal: the engine's code and words reach the user at once, not at its deadline; no trainer starts. Red with only
    the ready URL looked at (the run then waits for its deadline)."""
    dying = "import sys; print('no such model'); sys.exit(3)"
    run = host.finish(stage("rl", trainer("print('never')"), engine(free_port(), dying)))
    error = assert_failed(run, 3, "engine-0", "engine-0 ended with exit code 3")
    assert error["log_tail"] == ["no such model"]
    assert not run.log("trainer").exists()


@pytest.mark.parametrize(
    ("ending", "code"), [("os._exit(5)", 5), ("os._exit(0)", 1), ("os.kill(os.getpid(), 11)", 139)]
)
def test_an_engine_that_dies_during_the_stage(host: Host, ending: str, code: int) -> None:
    """Goal: an engine's end, with 0 too, ends the stage and its trainer, and never counts as success. Red with the
    engines left out of the check, and with the engine's 0 passed on."""
    waiting = """
import os, pathlib
server.handle_request()
log = pathlib.Path(os.environ["ROLLOUTS_RUN_PATH"], "logs", "trainer.log")
while not (log.exists() and "up" in log.read_text()): time.sleep(0.02)
"""
    dying = ENGINE.replace("server.serve_forever()", waiting + ending)
    run = host.finish(stage("rl", trainer(SLEEP), engine(free_port(), dying)))
    assert_failed(run, code, "engine-0")
    assert run_dir.read_exit(run, "rl", "trainer").signal == signal.SIGTERM


def test_the_first_failure_is_the_one_reported(host: Host) -> None:
    """Goal: when the trainer falls over the dead engine, the engine is blamed. Red with the first in window order
    reversed, or without waiting for what ends at the same moment."""
    port = free_port()
    dying = ENGINE.replace(
        "server.serve_forever()", "import os; server.handle_request(); time.sleep(2); os._exit(5)"
    )
    waiting = f"""
import socket, sys, time
connection = socket.create_connection(("127.0.0.1", {port}))
try:
    connection.recv(1)
finally:
    time.sleep(0.2)  # a torchrun takes longer to fall
    sys.exit(9)
"""
    run = host.finish(stage("rl", trainer(waiting), engine(port, dying)))
    assert_failed(run, 5, "engine-0")


def test_an_engine_that_never_gets_ready(host: Host) -> None:
    """Goal: the engine's own time limit ends the run, naming the limit; the process is gone. Red without the limit."""
    spec = engine(free_port(), ready_timeout_s=5.0)
    run = host.finish(
        stage("rl", trainer("print('never')"), dataclasses.replace(spec, argv=SHELL_SLEEP))
    )
    error = assert_failed(run, 1, "engine-0", "limits.engine_ready_timeout_s=5", "/ready")
    assert error["log_tail"] == ["up"]


def test_an_engine_that_answers_with_an_error(host: Host) -> None:
    """Goal: only 200 is ready. Red with any answer taken for readiness."""
    loading = ENGINE.replace("send_response(200)", "send_response(503)")
    run = host.finish(
        stage("rl", trainer("print('never')"), engine(free_port(), loading, ready_timeout_s=0.7))
    )
    assert_failed(run, 1, "engine-0", "did not answer 200")


def test_a_port_in_use(host: Host) -> None:
    """Goal: a stranger on the engine's port fails the run before anything starts, naming the port. Red without the
    check: the stranger's 200 is taken for the engine's."""
    import subprocess

    port = free_port()
    with subprocess.Popen(script(ENGINE, str(port)), stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None and stranger.stdout.readline()
        run = host.finish(stage("rl", trainer("print('never')"), engine(port, SLEEP)))
        assert_failed(run, 1, "supervisor", f"127.0.0.1:{port}", "another process listens there")
        assert stranger.poll() is None, "the stranger is not ours to end"
        stranger.kill()
    assert not run.log("engine-0").exists()


def test_a_strangers_answer_does_not_make_a_dead_engine_ready(host: Host) -> None:
    """Goal: an engine that lost its port to a stranger after the check, and dies of it slowly, fails the stage although
    the URL answers 200. Red when any process's answer counted: the trainer started."""
    port = free_port()
    losing = "import sys, time; print('checked', flush=True); sys.stdin.read(); time.sleep(3.0); sys.exit(98)"
    run = host.start(stage("rl", trainer("print('never')"), engine(port, losing)))
    wait_for(lambda: "checked" in log(run, "engine-0"), "the engine's start")
    with subprocess.Popen([sys.executable, "-c", ENGINE, str(port)]) as stranger:
        try:
            wait_for_end(run)
        finally:
            stranger.kill()
    assert_failed(run, 98, "engine-0")
    assert not run.log("trainer").exists()


def test_the_stage_time_limit(host: Host) -> None:
    """Goal: a stage that takes too long is ended, naming the limit. Red without the check: it goes on."""
    run = host.finish(stage("sft", trainer(SLEEP), timeout_s=0.6))
    assert_failed(run, 1, "trainer", "limits.stage_timeout_s=0.6")


def test_a_command_that_does_not_exist(host: Host) -> None:
    """Goal: a missing program is a failure with 127 and the reason, as in a shell. Red with the error not caught."""
    run = host.finish(stage("sft", process("trainer", ["/nowhere/python"])))
    error = assert_failed(run, 127, "trainer", "exit code 127")
    assert "/nowhere/python" in error["log_tail"][-1]


def test_needs_checkpoint(host: Host) -> None:
    """Goal: a stage starts only from a directory that its manifest confirms, through the `latest` link too. Red with
    the problems ignored."""
    good = host.home / "checkpoints" / "step_000001"
    good.mkdir(parents=True)
    (good / "model.safetensors").write_bytes(b"weights")
    write_manifest(good)
    (good.parent / "latest").symlink_to(good.name)
    latest = str(good.parent / "latest")
    run = host.finish(stage("rl", trainer("print('trained')"), needs_checkpoint=latest))
    assert as_status(run)["state"] == "done"
    (good / "model.safetensors").write_bytes(b"weighed")
    run = host.finish(stage("rl", trainer("print('trained')"), needs_checkpoint=latest))
    assert_failed(run, 1, "supervisor", latest, "no completed checkpoint", "model.safetensors")
    run = host.finish(
        stage("rl", trainer("print('trained')"), needs_checkpoint=str(host.home / "missing"))
    )
    assert_failed(run, 1, "supervisor", "missing")


def test_processes_that_left_their_group_are_ended_with_the_stage(host: Host) -> None:
    """Goal: ranks in sessions of their own (as torchrun starts them), recorded or not, end with the trainer that left
    them behind, also when they ignore SIGTERM. Red with only the trainer's own group ended."""
    leaving = """
import subprocess, sys
rank = '''
import signal, sys, time
from pathlib import Path
from rollouts import run_dir
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "recorded":
    run_dir.record_process(run_dir.RunDir(Path(sys.argv[2])), "rank-0")
print("up", flush=True)
time.sleep(600)
'''
for kind in ("recorded", "silent"):
    child = subprocess.Popen([sys.executable, "-c", rank, kind, sys.argv[1]], start_new_session=True,
                             stdout=subprocess.PIPE)
    child.stdout.readline()
    print(kind, child.pid, flush=True)
"""
    job = host.job(stage("sft", trainer("pass")))
    run = host.launched[-1]
    job["plan"]["stages"][0]["trainer"]["argv"] = script(leaving, str(run.path))
    assert host.launch(job).returncode == 0
    wait_for_end(run)
    assert as_status(run)["state"] == "done"
    assert "recorded" in log(run, "trainer") and "silent" in log(run, "trainer")
    assert run.process("rank-0").exists()
    assert survivors(run) == []


def test_weights_that_a_killed_trainer_left_in_memory(host: Host) -> None:
    """Goal: what a trainer had on tmpfs (weight_sync.on_tmpfs) goes with its stage, also when SIGKILL kept it from
    removing it: memory that nothing else gives back. Red with the supervisor's removal left out."""
    leaving = """
import os, pathlib, sys
version = pathlib.Path(sys.argv[1], "version_000001")
version.mkdir(parents=True)
(version / "model.safetensors").write_bytes(b"weights")
print("left", flush=True)
os.kill(os.getpid(), 9)
"""
    job = host.job(stage("rl", trainer("pass")))
    run = host.launched[-1]
    job["plan"]["stages"][0]["trainer"]["argv"] = script(leaving, str(run.weights_in_memory))
    assert host.launch(job).returncode == 0
    wait_for_end(run)
    assert_failed(run, 137, "trainer", "SIGKILL")
    assert log(run, "trainer") == "left\n"
    assert not run.weights_in_memory.exists()


def test_the_heartbeat(host: Host) -> None:
    """Goal: status.json is rewritten while a trainer works in silence. Red with it written only on changes."""
    run = host.start(stage("sft", trainer(SLEEP)))
    recorded_pid(run, "trainer")
    wait_for(lambda: as_status(run)["message"].startswith("sft: the trainer runs"), "training")
    first = as_status(run)["updated_at"]
    wait_for(lambda: as_status(run)["updated_at"] > first, "a beat")
    os.kill(recorded_pid(run, "supervisor"), signal.SIGTERM)
    wait_for_end(run)


def test_the_beat_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: with a look every POLL_S, no two rewritings of status.json lie more than HEARTBEAT_S apart. Red with a beat
    every 2 * HEARTBEAT_S."""
    run = RunDir(tmp_path)
    plan = LaunchPlan.from_json(Host(tmp_path).job(stage("sft", trainer(SLEEP)))["plan"])
    lock = run_dir.hold_lock(run)
    assert lock is not None
    now, written = 1000.0, []
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: now, time=lambda: now))
    with lock:
        beating = pulse.Pulse(run, plan, Journal(run, lock), NoPeers())
        for _ in range(200):
            beating.tick()
            written.append(as_status(run)["updated_at"])
            now += pulse.POLL_S
    ages = [1000.0 + number * pulse.POLL_S - at for number, at in enumerate(written)]
    assert max(ages) <= run_dir.HEARTBEAT_S and len(set(written)) > 1


def test_environment_of_the_processes(host: Host) -> None:
    """Goal: a process gets the launcher's environment, the plan's, the secrets and the run's mark, unbuffered, and
    writes files for this user alone; secrets stand in no command line, log or file afterwards. Red with the secrets
    left out, with secrets.json kept, and without the umask."""
    show = "import json, os; print(json.dumps({**os.environ, 'umask': oct(os.umask(0))}))"
    os.environ["FROM_LAUNCHER"] = "yes"
    try:
        run = host.finish(
            stage("sft", trainer(show, env={"FROM_PLAN": "1"})),
            secrets={"API_TOKEN": "hunter2-in-secret"},
        )
    finally:
        del os.environ["FROM_LAUNCHER"]
    seen = json.loads(log(run, "trainer"))
    expected = {
        "FROM_LAUNCHER": "yes",
        "FROM_PLAN": "1",
        "API_TOKEN": "hunter2-in-secret",
        "PYTHONUNBUFFERED": "1",
        "ROLLOUTS_RUN_ID": run.run_id,
        "umask": "0o77",
    }
    assert {name: seen.get(name) for name in expected} == expected
    assert "TMUX" not in seen
    run.log("trainer").unlink()
    for path in run.path.rglob("*"):
        if path.is_file() and run.code_tree not in path.parents:
            assert b"hunter2" not in path.read_bytes(), path


def test_a_second_supervisor_keeps_out(host: Host) -> None:
    """Goal: the lock admits one supervisor a run. Red with the lock not looked at."""
    import subprocess
    import sys

    began = time.time()
    run = host.start(stage("sft", trainer(SLEEP)))
    done = subprocess.run(
        [sys.executable, "-m", "rollouts.worker.supervise.supervisor", str(run.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "has a supervisor already" in done.stderr
    assert run_dir.is_live(run)
    os.kill(recorded_pid(run, "supervisor"), signal.SIGTERM)
    wait_for_end(run)
    assert as_status(run)["updated_at"] >= began


def test_events_that_cannot_be_written(host: Host) -> None:
    """Goal: a full disk under events.jsonl is said in the supervisor's log and keeps it from nothing: stages run, the
    final status stands. Red with the error let through: the run dies without one."""
    job = host.job(stage("sft", trainer("print('trained')")))
    run = host.launched[-1]
    run.events.symlink_to("/dev/full")
    assert host.launch(job).returncode == 0
    wait_for_end(run)
    assert (as_status(run)["state"], as_status(run)["exit_code"]) == ("done", 0)
    assert "No space left on device" in log(run, "supervisor")
