"""Every way in which a run is ended from outside: asked, killed in part, killed as a whole. Nothing may be left."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.run_dir import RunDir, observe
from rollouts.worker import tmux
from tests.ports import free_port
from tests.worker.stands import (
    ENGINE,
    Host,
    alive,
    as_status,
    engine,
    events,
    log,
    module,
    parent_of,
    recorded_pid,
    stage,
    survivors,
    tmux_sessions,
    trainer,
    wait_for,
    wait_for_end,
)

UP = "import subprocess, sys, time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    " print('up', flush=True); time.sleep(600)"
)
# A rank in its own session, as torchrun starts them; it says so in processes/, and ignores a polite end.
RANK = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True)
time.sleep(600)
"""


@pytest.fixture
def training(host: Host) -> Iterator[RunDir]:
    """A run in its RL stage: an engine that serves, a trainer with a stubborn rank outside its group."""
    run = host.start(stage("rl", trainer(RANK), engine(free_port(), ENGINE)))
    wait_for(lambda: "up" in log(run, "trainer"), "the trainer's rank")
    run.weights_in_memory.mkdir()
    (run.weights_in_memory / "model.safetensors").write_bytes(b"weights")
    bucket = Path(f"/dev/shm/rollouts-bucket-{run.memory_name}-{uuid.uuid4().hex}")
    bucket.write_bytes(b"weights")
    yield run
    shutil.rmtree(run.weights_in_memory, ignore_errors=True)
    bucket.unlink(missing_ok=True)
    for pid in [int(line.split(":")[0]) for line in survivors(run)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_survivors_can_see(training: RunDir) -> None:
    """Goal: the positive control of all "nothing is left" below: while the run lives, its scan sees every part of it.
    Red with the scan looking for another variable."""
    seen = "\n".join(survivors(training))
    for part in (
        "rollouts.worker.supervise.supervisor",
        "rollouts.worker.supervise.window",
        "serve_forever",
        "start_new_session",
        "SIG_IGN",
    ):
        assert part in seen
    assert module("stop", str(training.path)).returncode == 0


def in_memory(run: RunDir) -> list[Path]:
    """The run's weights that are left there."""
    return [*filter(Path.exists, [run.weights_in_memory]), *run.buckets_in_memory()]


def test_stop(training: RunDir) -> None:
    """Goal: stop ends everything, the run is `stopped` with 143, the session is gone, and a second stop changes
    nothing. Red with the supervisor's signal handler removed (state stays unfinished)."""
    done = module("stop", str(training.path))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"state": "stopped", "exit_code": 143}
    assert survivors(training) == [] and training.run_id not in tmux_sessions()
    ended = events(training, "run_ended")
    assert [(row["state"], row["exit_code"]) for row in ended] == [("stopped", 143)]
    assert "SIGTERM" in ended[0]["message"] and events(training, "error") == []
    before = training.status.read_bytes()
    assert json.loads(module("stop", str(training.path)).stdout) == {
        "state": "stopped",
        "exit_code": 143,
    }
    assert training.status.read_bytes() == before
    assert not training.secrets.exists() and in_memory(training) == []


def test_stop_of_a_run_that_is_done(host: Host) -> None:
    """Goal: stop leaves the state and exit code of an ended run alone. Red with `stopped` written in any case."""
    run = host.finish(stage("sft", trainer("raise SystemExit(4)")))
    assert json.loads(module("stop", str(run.path)).stdout) == {"state": "failed", "exit_code": 4}


def test_stop_where_no_run_is(host: Host) -> None:
    """Goal: a wrong path is one clear error, not a traceback. Red without the check."""
    done = module("stop", str(host.home / "runs" / "nothing"))
    assert (
        done.returncode == 1
        and "no run was launched there" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_stop_with_a_supervisor_that_does_not_answer(training: RunDir) -> None:
    """Goal: a stopped (SIGSTOP) supervisor is killed, the end is written and its weights are removed from memory in its
    place. Red with stop relying on the supervisor alone, and with weights left to it."""
    plan = json.loads(training.plan.read_text())
    # the wait for the supervisor shrinks to 2 s; the wrappers have read theirs already
    plan["stop_grace_s"] = -9.0
    training.plan.write_text(json.dumps(plan))
    os.kill(recorded_pid(training, "supervisor"), signal.SIGSTOP)
    done = module("stop", str(training.path))
    assert json.loads(done.stdout) == {"state": "stopped", "exit_code": 143}, done.stderr
    assert survivors(training) == [] and training.run_id not in tmux_sessions()
    assert as_status(training)["state"] == "stopped"
    assert in_memory(training) == []


def test_kill_9_of_the_supervisor(training: RunDir) -> None:
    """Goal: when the supervisor dies without a word, engine and trainer end by themselves, secrets and weights in
    memory go, and readers see `died`. Red without the threads that wait for its lock, and with weights left to it."""
    os.kill(recorded_pid(training, "supervisor"), signal.SIGKILL)
    wait_for_end(training)
    seen = observe(training)
    assert (seen.state, seen.exit_code, seen.live) == ("died", None, False)
    assert training.run_id not in tmux_sessions()
    assert not training.secrets.exists() and in_memory(training) == []
    record = run_dir.read_exit(training, "run", "supervisor")
    assert record is not None and record.signal == signal.SIGKILL
    for window in ("trainer", "engine-0"):  # each wrapper ended its own, and lived to say so
        record = run_dir.read_exit(training, "rl", window)
        assert record is not None and record.signal == signal.SIGTERM
    assert json.loads(module("stop", str(training.path)).stdout) == {
        "state": "died",
        "exit_code": None,
    }


@pytest.mark.parametrize("window", ["trainer", "engine-0"])
def test_kill_9_of_a_wrapper(training: RunDir, window: str) -> None:
    """Goal: a window that vanishes without an exit record is a failure that says so, and its orphans are ended. Red
    with a missing record waited for, or taken for success."""
    os.kill(parent_of(recorded_pid(training, window)), signal.SIGKILL)
    wait_for_end(training)
    status, (error,) = as_status(training), events(training, "error")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert error["window"] == window and "without an exit record" in error["message"]
    assert run_dir.read_exit(training, "rl", window) is None


def test_kill_9_of_the_supervisors_wrapper(training: RunDir) -> None:
    """Goal: stop ends a run whose supervisor lost its wrapper. Red with the supervisor's last words raising on a pipe
    that nobody reads."""
    os.kill(parent_of(recorded_pid(training, "supervisor")), signal.SIGKILL)
    done = module("stop", str(training.path))
    assert json.loads(done.stdout) == {"state": "stopped", "exit_code": 143}, done.stderr
    assert survivors(training) == []


def test_a_supervisor_without_its_wrapper_finishes_the_run(host: Host) -> None:
    """Goal: the supervisor's words have nowhere to go, and still the stage is waited for and the end written. Red with
    `print` in place of `say`: the run dies of a broken pipe."""
    go = host.home / "go"
    run = host.start(
        stage(
            "sft",
            trainer(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.05)"),
        )
    )
    pid = recorded_pid(run, "trainer")
    os.kill(parent_of(recorded_pid(run, "supervisor")), signal.SIGKILL)
    assert alive(pid)
    go.touch()
    wait_for_end(run)
    assert (as_status(run)["state"], as_status(run)["exit_code"]) == ("done", 0)


def test_tmux_kill_window(training: RunDir) -> None:
    """Goal: closing the trainer's window ends the run as failed by SIGHUP, never as success. Red with the wrapper
    ignoring SIGHUP."""
    subprocess.run(["tmux", "kill-window", "-t", f"={training.run_id}:=trainer"], check=True)
    wait_for_end(training)
    status, (error,) = as_status(training), events(training, "error")
    assert (status["state"], status["exit_code"]) == ("failed", 129)
    assert error["window"] == "trainer" and "SIGHUP" in error["message"]


@pytest.mark.parametrize("command", ["kill-session", "kill-server"])
def test_tmux_kill(host: Host, training: RunDir, command: str) -> None:
    """Goal: ending the session, or the whole server, is a stop: state `stopped`, 143, nothing left. Red with the
    supervisor's SIGHUP handler removed."""
    target = ["-t", f"={training.run_id}"] if command == "kill-session" else []
    subprocess.run(["tmux", command, *target], check=True)
    wait_for_end(training)
    status = as_status(training)
    assert (status["state"], status["exit_code"]) == ("stopped", 143), events(training)
    assert survivors(training) == []


def test_an_interrupt_in_the_trainers_pane(host: Host) -> None:
    """Goal: Ctrl-C in an attached pane reaches the process as SIGINT. Red with SIGINT not forwarded: the wrapper dies
    of it alone."""
    patient = (
        "import time\ntry:\n print('up', flush=True); time.sleep(600)\n"
        "except KeyboardInterrupt: raise SystemExit(21)"
    )
    run = host.start(stage("sft", trainer(patient)))
    wait_for(lambda: "up" in log(run, "trainer"), "the trainer")
    subprocess.run(["tmux", "send-keys", "-t", f"={run.run_id}:=trainer", "C-c"], check=True)
    wait_for_end(run)
    assert as_status(run)["exit_code"] == 21


@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_a_session_that_ends_just_before_it_is_killed(
    private_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by_itself: bool
) -> None:
    """Goal: a stop does not fail over a session that ended between the look and the kill; one that cannot be killed is
    told. Red with the error of kill-session passed on: a stop on a loaded machine failed with "no server running"."""
    real, shim = shutil.which("tmux"), tmp_path / "tmux"
    first = f'{real} "$@"' if ends_by_itself else "exit 1"
    shim.write_text(f'#!/bin/sh\nif [ "$1" = kill-session ]; then {first}; fi\nexec {real} "$@"\n')
    shim.chmod(0o755)
    run_id = f"t-{tmp_path.name[-20:]}"
    tmux.start_session(run_id, "window", ["sleep", "600"], cwd=tmp_path, hide=())
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        if ends_by_itself:
            tmux.kill_session(run_id)
        else:
            with pytest.raises(tmux.TmuxError, match="kill-session failed"):
                tmux.kill_session(run_id)
    assert tmux.has_session(run_id) is not ends_by_itself
    tmux.kill_session(run_id)


def test_a_stop_during_the_bootstrap(host: Host) -> None:
    """Goal: a stop ends the installer promptly with its children, and no environment counts as complete. Red with the
    installer ended neither by the bootstrap nor by the wrapper's sweep."""
    from rollouts.run_dir import EnvironmentSpec

    path = host.home / "envs" / "key"
    fake = host.home / "python"
    host.home.mkdir(parents=True)
    fake.write_text("#!/bin/sh\nmkdir -p $3\necho making\nsleep 600 & wait\n")
    fake.chmod(0o755)
    spec = EnvironmentSpec(
        name="trainer",
        path=str(path),
        installer="pip",
        base_python=str(fake),
        requirements=[],
        requirements_no_deps=[],
        constraints="",
    )
    run = host.start(stage("sft", trainer("pass")), environments=[spec])
    wait_for(lambda: "making" in log(run, "supervisor"), "the installer")
    assert json.loads(module("stop", str(run.path)).stdout) == {
        "state": "stopped",
        "exit_code": 143,
    }
    assert survivors(run) == []
    assert path.is_dir() and not (path / ".complete").exists()


def test_strangers_are_never_signalled(host: Host) -> None:
    """Goal: a recorded group whose processes do not carry the run's mark (a reused id) is left alone. Red with groups
    signalled by their number."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
        run = host.start(stage("sft", trainer(UP)))
        wait_for(lambda: "up" in log(run, "trainer"), "the trainer")
        for name in ("rank-0", "trainer"):
            record = run_dir.ProcessRecord(
                name=name, pid=stranger.pid, pgid=stranger.pid, started_at=0.0
            )
            run_dir.write_json_atomic(run.process(name), record)
        assert module("stop", str(run.path)).returncode == 0
        assert alive(stranger.pid)
        stranger.kill()
