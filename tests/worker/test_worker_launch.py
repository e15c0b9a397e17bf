"""The launcher: a run starts once, whatever tmux and the caller's environment are like, or says why it cannot."""

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.run_dir import RunDir
from rollouts.worker.processes import marked_processes
from tests.worker.stands import (
    REPOSITORY,
    Host,
    as_status,
    log,
    module,
    private_tmux,
    recorded_pid,
    stage,
    tmux_sessions,
    trainer,
    wait_for,
    wait_for_end,
)

UP = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def fresh_server() -> Iterator[Path]:
    """A tmux server of the test's own, not started yet."""
    directory = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    with private_tmux(directory):
        yield directory
    shutil.rmtree(directory)


def test_what_it_writes_and_prints(host: Host) -> None:
    """Goal: config, plan, code files and status are there before anything runs; the directory is 0700, secrets are
    0600; windows have the size of a terminal. Red with either at the default mode."""
    job = host.job(stage("sft", trainer(UP)), secrets={"API_TOKEN": "hunter2"})
    done = host.launch(job)
    run = host.launched[-1]
    assert json.loads(done.stdout) == {
        "started": True,
        "run_id": run.run_id,
        "run_path": str(run.path),
    }
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert json.loads(run.config.read_text()) == job["config"]
    assert json.loads(run.plan.read_text()) == job["plan"]
    assert (run.code / "commit.txt").read_text() == "0123abc\n"
    assert (
        stat.S_IMODE(run.secrets.stat().st_mode) == 0o600
        and stat.S_IMODE(run.path.stat().st_mode) == 0o700
    )
    assert run_dir.is_live(run)
    pid = recorded_pid(run, "trainer")
    listing = subprocess.run(
        ["tmux", "list-windows", "-t", f"={run.run_id}", "-F", "#{window_name} #{window_width}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listing.stdout == "supervisor 200\ntrainer 200\n"
    assert b"API_TOKEN=hunter2" in Path(f"/proc/{pid}/environ").read_bytes()
    commands = subprocess.run(
        ["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True
    ).stdout
    assert "rollouts.worker.supervise.window" in commands and "hunter2" not in commands
    assert module("stop", str(run.path)).returncode == 0
    assert not run.secrets.exists()


def test_secrets_stay_out_of_the_tmux_server(fresh_server: Path, tmp_path: Path) -> None:
    """Goal: a secret that stands in the launcher's own environment, as on a laptop, does not get into the server that
    it starts. Red with the environment handed on whole."""
    host = Host(tmp_path)
    job = host.job(stage("sft", trainer(UP)), secrets={"API_TOKEN": "hunter2"})
    assert (
        host.launch(
            job,
            env={**os.environ, "API_TOKEN": "hunter2", "SHOWN": "yes", "ROLLOUTS_RUN_ID": "outer"},
        ).returncode
        == 0
    )
    run = host.launched[-1]
    recorded_pid(run, "trainer")
    shown = subprocess.run(
        ["tmux", "show-environment", "-g"], capture_output=True, text=True, check=True
    ).stdout
    assert "SHOWN=yes" in shown and "hunter2" not in shown
    assert "ROLLOUTS_RUN_ID" not in shown, "the server would be ended with the outer run"
    assert module("stop", str(run.path)).returncode == 0


def test_engine_keys_are_made_here_and_reach_the_processes_alone(host: Host) -> None:
    """Goal: each run has keys of its own, in its processes' variables and its 0600 secrets file, nowhere else. Red
    with the keys written into plan.json, and with them left out of the windows' environment."""
    jobs = [host.job(stage("sft", trainer(UP))) for _ in range(2)]
    made = []
    for job, run in zip(jobs, host.launched[-2:], strict=True):
        assert host.launch(job).returncode == 0
        keys = json.loads(run.secrets.read_text())["engine_keys"]
        environment = (
            Path(f"/proc/{recorded_pid(run, 'trainer')}/environ").read_bytes().split(b"\0")
        )
        assert all(f"{name}={key}".encode() in environment for name, key in keys.items())
        made += keys.values()
    assert len(set(made)) == 4
    commands = subprocess.run(
        ["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True
    ).stdout
    variables = subprocess.run(
        ["tmux", "show-environment", "-g"], capture_output=True, text=True, check=True
    ).stdout
    assert not any(key in commands + variables for key in made)
    for run in host.launched[-2:]:
        for file in run.path.rglob("*"):
            if file.is_file() and file != run.secrets and run.code_tree not in file.parents:
                assert not any(key.encode() in file.read_bytes() for key in made), file
        assert module("stop", str(run.path)).returncode == 0
        assert not run.secrets.exists()


def test_a_second_launch_changes_nothing(host: Host) -> None:
    """Goal: launching again, while it runs and after its end, says so with exit 0 and leaves the run alone. Red with
    the lock not looked at."""
    go = host.home / "go"
    text = (
        f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.05)\nprint('once')"
    )
    job = host.job(stage("sft", trainer(text)))
    assert json.loads(host.launch(job).stdout)["started"] is True
    run = host.launched[-1]
    pid = recorded_pid(run, "trainer")
    again = host.launch(job)
    assert again.returncode == 0 and json.loads(again.stdout)["started"] is False
    assert "running" in json.loads(again.stdout)["reason"]
    assert recorded_pid(run, "trainer") == pid
    go.touch()
    wait_for_end(run)
    again = host.launch(job)
    assert (
        json.loads(again.stdout)["started"] is False
        and "done" in json.loads(again.stdout)["reason"]
    )
    assert log(run, "trainer") == "once\n"


def test_two_launches_at_once_start_it_once(host: Host) -> None:
    """Goal: two laptops, or a retry beside a slow first try. Red without the lock around the launch."""
    job = host.job(stage("sft", trainer("print('once')")))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: host.launch(job), range(4)))
    assert [answer.returncode for answer in answers] == [0] * 4, [
        answer.stderr for answer in answers
    ]
    assert sorted(json.loads(answer.stdout)["started"] for answer in answers) == [
        False,
        False,
        False,
        True,
    ]
    wait_for_end(host.launched[-1])
    assert log(host.launched[-1], "trainer") == "once\n"


def test_a_launch_that_was_cut_off_is_taken_up(host: Host) -> None:
    """Goal: files written but no session, as after a lost connection: the next launch starts the run. Red with
    status.json alone taken as proof of a start."""
    job = host.job(stage("sft", trainer("print('once')")))
    run = host.launched[-1]
    run_dir.write_json_atomic(run.plan, job["plan"])
    run_dir.write_json_atomic(run.status, run_dir.Status(
        run_id=run.run_id, experiment_name="test", state="starting", stage=None, message="", started_at=0.0,
        updated_at=0.0, exit_code=None,
    ))  # fmt: skip
    assert json.loads(host.launch(job).stdout)["started"] is True
    wait_for_end(run)
    assert as_status(run)["state"] == "done"


def test_no_tmux(host: Host, tmp_path: Path) -> None:
    """Goal: a host without tmux gets one message with the fix, the run is listed as failed, and once tmux is there the
    same launch works. Red with the missing program not caught."""
    job = host.job(stage("sft", trainer("print('once')")))
    done = host.launch(job, env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 1 and done.stdout == ""
    assert (
        "tmux is not installed on this host. Install it" in done.stderr
        and "Traceback" not in done.stderr
    )
    run = host.launched[-1]
    assert not run.lock.exists() and not run.secrets.exists()
    assert json.loads(host.launch(job).stdout)["started"] is True
    wait_for_end(run)
    assert as_status(run)["state"] == "done"


def test_a_tmux_that_fails(host: Host, tmp_path: Path) -> None:
    """Goal: what tmux says reaches the user, and the status says failed. Red with tmux's exit code not looked at."""
    job = host.job(stage("sft", trainer("print('once')")))
    # tmux refuses a socket directory that others may write to
    (tmp_path / f"tmux-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"tmux-{os.getuid()}").chmod(0o777)
    done = host.launch(job, env={**os.environ, "TMUX_TMPDIR": str(tmp_path)})
    assert (
        done.returncode == 1
        and "tmux new-session failed" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert as_status(host.launched[-1])["state"] == "failed"


def test_somebody_elses_session_of_that_name(host: Host) -> None:
    """Goal: a session that is not the run's is never touched. Red with an existing session taken for a started run."""
    job = host.job(stage("sft", trainer("print('once')")))
    run = host.launched[-1]
    subprocess.run(["tmux", "new-session", "-d", "-s", run.run_id, "sleep", "600"], check=True)
    done = host.launch(job)
    assert done.returncode == 1 and "not of this run" in done.stderr
    assert run.run_id in tmux_sessions()
    subprocess.run(["tmux", "kill-session", "-t", f"={run.run_id}"], check=True)


@pytest.mark.parametrize("python", ["/nowhere/python3", "/bin/false"])
def test_a_supervisor_that_cannot_start(host: Host, python: str) -> None:
    """Goal: a base Python that does not work is told at once. Red without the wait for the supervisor's lock."""
    job = host.job(stage("sft", trainer("pass")))
    job["plan"]["base_python"] = python
    done = host.launch(job)
    assert done.returncode == 1 and python in done.stderr and "ended at once" in done.stderr
    assert as_status(host.launched[-1])["state"] == "failed"


def test_a_supervisor_that_is_too_slow(host: Host, tmp_path: Path) -> None:
    """Goal: a launch that gives up leaves nothing that starts later. Red without the end of its session: on a busy host
    the supervisor came after "nothing was started", and its trainer found no secrets."""
    job = host.job(stage("sft", trainer("pass")))
    slow = tmp_path / "python3"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    job["plan"]["base_python"] = str(slow)
    program = "from rollouts.worker import launch as l; l.SUPERVISOR_START_S = 0.2; l.main()"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    run = host.launched[-1]
    assert done.returncode == 1 and "did not start within 0.2 s" in done.stderr, done.stderr
    assert as_status(run)["state"] == "failed"
    assert run.run_id not in tmux_sessions() and not marked_processes(run)


def test_files_that_cannot_be_written(host: Host) -> None:
    """Goal: a full disk (here a file size limit of 0) is one message naming the file and the room left. Red with the
    error not caught."""
    job = host.job(stage("sft", trainer("pass")))
    command = [
        "/bin/bash",
        "-c",
        'ulimit -f 0; exec "$0" -m rollouts.worker.launch',
        sys.executable,
    ]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("error: cannot write "), done.stderr
    assert "MiB free there" in done.stderr and "Traceback" not in done.stderr
    assert host.launched[-1].run_id not in tmux_sessions()


def test_stdin_that_is_no_job() -> None:
    """Goal: a torn transfer is told as such. Red with the parser's traceback."""
    done = module("launch", stdin='{"plan": ')
    assert done.returncode == 1 and "not JSON" in done.stderr and "Traceback" not in done.stderr


def test_a_users_tmux_conf(fresh_server: Path, tmp_path: Path) -> None:
    """Goal: settings that end detached sessions, keep dead windows, or count from 1 do not break a run. Red with the
    session's own options not set: the session ends at once, or stays for ever."""
    home = tmp_path / "user"
    home.mkdir()
    (home / ".tmux.conf").write_text(
        "set -g destroy-unattached on\nset -g remain-on-exit on\nset -g base-index 1\nset -g default-command false\n"
        "set -g default-shell /bin/false\nsetw -g automatic-rename on\n"
    )
    host = Host(tmp_path / "home")
    job = host.job(stage("sft", trainer("print('once')")))
    assert host.launch(job, env={**os.environ, "HOME": str(home)}).returncode == 0
    run = host.launched[-1]
    wait_for_end(run)
    assert (as_status(run)["state"], log(run, "trainer")) == ("done", "once\n")
    wait_for(lambda: run.run_id not in tmux_sessions(), "the session's end")


def test_a_server_with_another_environment(fresh_server: Path, tmp_path: Path) -> None:
    """Goal: a tmux server that was started long ago from somewhere else gives its windows its own environment; the
    run's processes get the launcher's. Red with the environment left to tmux."""
    odd = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONHOME": "/nowhere",
        "TMUX_TMPDIR": str(fresh_server),
    }
    subprocess.run(["tmux", "new-session", "-d", "-s", "old", "sleep", "600"], env=odd, check=True)
    host = Host(tmp_path)
    show = "import os; print(os.environ.get('PYTHONHOME'), os.environ['HOME'], os.environ['MINE'])"
    job = host.job(stage("sft", trainer(show)))
    # the launcher may itself sit in some tmux
    elsewhere = {"TMUX": "/tmp/nowhere,1,0", "TMUX_PANE": "%9"}
    assert host.launch(job, env={**os.environ, **elsewhere, "MINE": "yes"}).returncode == 0
    run = host.launched[-1]
    wait_for_end(run)
    assert log(run, "trainer") == f"None {os.environ['HOME']} yes\n"
    assert "old" in tmux_sessions()


def test_the_bootstrap_sees_the_configs_environment(host: Host) -> None:
    """Goal: host.env of the config is set for the supervisor, and so for the installers. Red with the supervisor's
    window given none."""
    run = host.start(stage("sft", trainer(UP)), host_env={"INSTALLER_OPTION": "1"})
    environment = Path(f"/proc/{recorded_pid(run, 'supervisor')}/environ").read_bytes()
    assert b"INSTALLER_OPTION=1" in environment
    assert module("stop", str(run.path)).returncode == 0
    assert isinstance(run, RunDir)


@pytest.mark.parametrize(
    "file",
    [
        *(
            file.relative_to(REPOSITORY).as_posix()
            for file in sorted(REPOSITORY.glob("rollouts/worker/[!t]*.py"))
        ),
        *(
            "rollouts/worker/tail.py",
            "rollouts/worker/tmux.py",
            "rollouts/worker/environments/torch_index.py",
        ),
        *(
            file.relative_to(REPOSITORY).as_posix()
            for file in sorted(REPOSITORY.glob("rollouts/run_dir/*.py"))
        ),
        *("rollouts/plain_files.py", "rollouts/manifest.py", "rollouts/remote/host/host_probe.py"),
        *("rollouts/engines/keys.py", "rollouts/engines/diagnosis.py"),
    ],
)
def test_a_hosts_python_may_be_3_10(file: str) -> None:
    """Goal: what runs under the host's own Python keeps to 3.10, which Ubuntu 22.04 has. Red with
    hashlib.file_digest in the manifest, and with process_group= in the installer."""
    text = (REPOSITORY / file).read_text()
    ast.parse(text, feature_version=(3, 10))
    newer = r"file_digest|process_group=|tomllib|except\*|ExceptionGroup|StrEnum|\bUTC\b|\bSelf\b|contextlib\.chdir"
    assert re.findall(newer, re.sub(r"#.*", "", text)) == []
