"""Environments: real interpreters and a real pip, offline; most over a copy of one prepared virtual environment."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.environments.installer import BootstrapError
from rollouts.worker.environments.virtual_environment import ensure_environment, is_complete
from tests.worker.environments import actions, deadline, version_in, write_wheel
from tests.worker.stands import (
    Host,
    alive,
    as_status,
    events,
    log,
    parent_of,
    process,
    recorded_pid,
    stage,
    trainer,
    wait_for,
)


def times_made(tmp_path: Path) -> int:
    return (tmp_path / "made").read_text().count("made")


def test_what_is_marked_comes_without_its_dependencies(
    spec: EnvironmentSpec, run: RunDir, wheels: Path, tmp_path: Path
) -> None:
    """Goal: a requirement of the second list is installed as it is, at its version, though what it requires is not to
    be had. Red with `--no-deps` left out (pip finds no nowhere-to-be-found)."""
    write_wheel(tmp_path, "needy", "1.0", requires="nowhere-to-be-found")
    own = replace(
        spec, requirements_no_deps=["--no-index", f"--find-links {tmp_path}", "needy==1.0"]
    )
    ensure_environment(own, run, deadline())
    subprocess.run([f"{spec.path}/bin/python", "-c", "import needy, tiny_thing"], check=True)
    marker = json.loads((Path(spec.path) / ".complete").read_text())
    assert marker["requirements_no_deps"] == own.requirements_no_deps


def test_built_once_then_reused(spec: EnvironmentSpec, run: RunDir, tmp_path: Path) -> None:
    """Goal: the constraint decides the version; the second time nothing is run. Red with `-c` left out (2.0), and with
    the marker not looked at (made twice)."""
    ensure_environment(spec, run, deadline())
    assert version_in(spec) == "1.0"
    assert actions(run) == ["building", "ready"]
    marker = json.loads((Path(spec.path) / ".complete").read_text())
    assert marker["requirements"] == spec.requirements and marker["constraints"] == spec.constraints
    ensure_environment(spec, run, deadline())
    assert actions(run) == ["building", "ready", "reused"]
    assert events(run, "environment")[1]["seconds"] >= 0.3  # quick_python sleeps so long
    assert times_made(tmp_path) == 1


def test_a_real_virtual_environment(prepared: Path) -> None:
    """Goal: made by the machine's own Python, with no stand-in: its interpreter is of its own, and has pip. Red with a
    wrong `-m venv` line."""
    assert actions(RunDir(prepared.parent / "run")) == ["building", "ready"]
    assert json.loads((prepared.parent / "marker").read_text())["base_python"] == sys.executable
    command = [str(prepared / "bin" / "python"), "-c", "import sys, pip; print(sys.prefix)"]
    assert subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip() == str(prepared)


def test_uv(
    run: RunDir,
    tmp_path: Path,
    wheels: Path,
    spec: EnvironmentSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: the same through uv, which the dev extra brings. Red with uv's `--python` left out."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    spec = replace(spec, installer="uv", base_python=sys.executable)
    ensure_environment(spec, run, deadline())
    assert version_in(spec) == "1.0"


def test_half_built_is_rebuilt(spec: EnvironmentSpec, run: RunDir, tmp_path: Path) -> None:
    """Goal: without the marker, which is written last, everything is made anew and old files go. Red with an existing
    directory taken for complete."""
    ensure_environment(spec, run, deadline())
    (Path(spec.path) / ".complete").unlink()
    (Path(spec.path) / "stale").touch()
    ensure_environment(spec, run, deadline())
    assert actions(run) == ["building", "ready"] * 2
    assert not (Path(spec.path) / "stale").exists() and is_complete(Path(spec.path))
    assert times_made(tmp_path) == 2


def test_an_environment_whose_base_python_went_is_rebuilt(
    spec: EnvironmentSpec, run: RunDir
) -> None:
    """Goal: bin/python is a link to the host's Python; where that was removed, the marker does not count. Red with the
    marker alone looked at."""
    ensure_environment(spec, run, deadline())
    python = Path(spec.path) / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3.11")
    ensure_environment(spec, run, deadline())
    assert version_in(spec) == "1.0"


def test_two_runs_at_once_build_it_once(spec: EnvironmentSpec, run: RunDir, tmp_path: Path) -> None:
    """Goal: one builds, the other waits and reuses. Red without the lock, and without the second look under it."""
    other = RunDir(tmp_path / "runs" / "r2")
    threads = [
        threading.Thread(target=ensure_environment, args=(spec, each, deadline()))
        for each in (run, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(actions(run) + actions(other)) == ["building", "ready", "reused"]
    assert times_made(tmp_path) == 1


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("trainer", "check host.constraints_file, host.requirements, and that the host"),
        ("engine", "check engine.requirements_file, and that the host"),
    ],
)
def test_a_failing_installation(spec: EnvironmentSpec, run: RunDir, name: str, inputs: str) -> None:
    """Goal: what pip said last, its command and the fix are in the error; nothing counts as built. Red with the exit
    code not looked at: an environment without its packages would be complete; and with the trainer's inputs named for
    the engine's environment."""
    spec = replace(spec, name=name, requirements=["--no-index", "tiny-thing"])
    with pytest.raises(
        BootstrapError, match=rf"pip install .* failed with exit code 1.*{re.escape(inputs)}"
    ) as caught:
        ensure_environment(spec, run, deadline())
    assert any(
        line.startswith("ERROR: ") and "tiny-thing" in line for line in caught.value.log_tail
    )
    assert not is_complete(Path(spec.path))
    assert actions(run) == ["building"]


def test_a_missing_base_python(spec: EnvironmentSpec, run: RunDir) -> None:
    """Goal: named as such. Red with the error not caught."""
    with pytest.raises(BootstrapError, match="cannot start /nowhere/python3"):
        ensure_environment(replace(spec, base_python="/nowhere/python3"), run, deadline())


def test_uv_outside_the_path(
    spec: EnvironmentSpec,
    run: RunDir,
    tmp_path: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: uv in ~/.local/bin is found although a bare ssh command has no such PATH; it gets the interpreter and both
    files. Red with only PATH searched."""
    uv = tmp_path / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(
        '#!/bin/sh\necho "$@" >> "$HOME/calls"\n'
        f'if [ "$1" = venv ]; then exec cp -a {prepared} "$4"; fi\n'
        'python=$4; shift 4; exec "$python" -m pip install "$@"\n'
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_environment(replace(spec, installer="uv"), run, deadline())
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"venv --python {spec.base_python} {spec.path}",
        f"pip install --python {spec.path}/bin/python -c {spec.path}/constraints.txt -r {spec.path}/requirements.txt",
    ]


def slow_python(tmp_path: Path) -> str:
    path = tmp_path / "slow-python"
    path.write_text(
        '#!/bin/sh\nmkdir -p "$3"\necho working\nsleep 600 &\necho $! > "$3/child"\nwait\n'
    )
    path.chmod(0o755)
    return str(path)


def test_the_time_limit(spec: EnvironmentSpec, run: RunDir, tmp_path: Path) -> None:
    """Goal: an installer that hangs is ended with its children, and the limit is named. Red without the limit, and with
    only the installer itself ended."""
    slow, limit = replace(spec, base_python=slow_python(tmp_path)), deadline()

    def over() -> None:  # once the installer has its child
        if (Path(spec.path) / "child").exists() and (Path(spec.path) / "child").read_text():
            limit._deadline = 0.0

    limit.tick = over
    with pytest.raises(
        BootstrapError, match=r"limits\.bootstrap_timeout_s=200; .* was still running"
    ) as caught:
        ensure_environment(slow, run, limit)
    assert caught.value.log_tail == ["working"]
    child = int((Path(spec.path) / "child").read_text())
    wait_for(lambda: not alive(child), "the installer's child's end")
    assert not is_complete(Path(spec.path))


def test_the_time_limit_while_another_builds(spec: EnvironmentSpec, run: RunDir) -> None:
    """Goal: waiting for another run has the same limit. Red with a blocking lock."""
    import fcntl

    Path(spec.path).parent.mkdir()
    with Path(spec.path).with_name(".key1.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(BootstrapError, match="another run was still building it"):
            ensure_environment(spec, run, deadline(0.3))


def test_whatever_tick_raises_ends_the_build(
    spec: EnvironmentSpec, run: RunDir, tmp_path: Path
) -> None:
    """Goal: a stop comes through `tick`; the installer ends with it. Red with the group ended only on a time-out."""

    class Stopped(Exception):
        pass

    def tick() -> None:
        if (Path(spec.path) / "child").exists() and (Path(spec.path) / "child").read_text():
            raise Stopped

    with pytest.raises(Stopped):
        ensure_environment(
            replace(spec, base_python=slow_python(tmp_path)), run, deadline(tick=tick)
        )
    child = int((Path(spec.path) / "child").read_text())
    wait_for(lambda: not alive(child), "the installer's child's end")


def test_a_run_with_an_environment(host: Host, spec: EnvironmentSpec) -> None:
    """Goal: the supervisor makes the environment before the first stage, which runs in it; what the installer said is
    in its log; a second run reuses it. Red with the bootstrap left out."""
    in_it = process(
        "trainer", [f"{spec.path}/bin/python", "-c", "import tiny_thing; print(tiny_thing.version)"]
    )
    first = host.finish(stage("sft", in_it), environments=[spec])
    assert as_status(first)["state"] == "done" and log(first, "trainer") == "1.0\n"
    assert "Successfully installed tiny-thing-1.0" in log(first, "supervisor").replace(
        "tiny_thing", "tiny-thing"
    )
    kinds = [row["kind"] for row in events(first)]
    assert kinds[:4] == ["run_started", "environment", "environment", "stage_started"]
    second = host.finish(stage("sft", in_it), environments=[spec])
    assert actions(second) == ["reused"] and as_status(second)["state"] == "done"


def test_a_run_whose_environment_fails(host: Host, spec: EnvironmentSpec) -> None:
    """Goal: no stage starts, and the installer's last lines are in the error event. Red with the error not caught as
    the run's failure (its message is then a traceback's)."""
    spec = replace(spec, requirements=["--no-index", "tiny-thing"])
    run = host.finish(stage("sft", trainer("print('never')")), environments=[spec])
    (error,) = events(run, "error")
    assert error["window"] == "supervisor" and "failed with exit code 1" in error["message"]
    assert any(line.startswith("ERROR: ") and "tiny-thing" in line for line in error["log_tail"])
    assert as_status(run)["exit_code"] == 1 and not run.log("trainer").exists()


def test_kill_9_of_the_supervisor_while_it_builds(
    host: Host, spec: EnvironmentSpec, tmp_path: Path
) -> None:
    """Goal: the installer does not outlive the supervisor, and the next run starts over. Red with the wrapper's
    two sweeps removed."""
    slow = replace(spec, base_python=slow_python(tmp_path))
    run = host.start(stage("sft", trainer("pass")), environments=[slow])
    wait_for((Path(spec.path) / "child").exists, "the installer")
    supervisor = recorded_pid(run, "supervisor")
    wrapper = parent_of(supervisor)
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not alive(wrapper), "the wrapper's end")
    assert run_dir.read_exit(run, "run", "supervisor").code == 137
    run = host.finish(stage("sft", trainer("pass")), environments=[spec])
    assert actions(run) == ["building", "ready"] and version_in(spec) == "1.0"
