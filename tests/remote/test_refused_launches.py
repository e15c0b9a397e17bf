"""A launch that the host refuses: what `deploy` makes of the answer."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.remote.host import host_probe
from rollouts.run_dir import RunDir
from rollouts.worker import claims
from tests.ports import free_port
from tests.remote.hosts import WAIT_S, Laptop, wait_for, write_config
from tests.remote.test_gone_runs import launch_plan
from tests.worker.stands import process, stage


@contextlib.contextmanager
def live(home: Path, run_id: str, port: int = 1) -> Iterator[RunDir]:
    """Another deploy's run: its files, and a supervisor's lock, which this process holds; its engine has `port`."""
    run = RunDir(run_dir.run_path(home, run_id))
    run.path.mkdir(parents=True, exist_ok=True)
    run_dir.write_json_atomic(run.launch, {"launch_id": "another"})
    engine = process("engine-0", ["x"], ready_url=f"http://127.0.0.1:{port}/health")
    stages = [stage("rl", process("trainer", ["x"]), engine)]
    run_dir.write_json_atomic(
        run.plan, dataclasses.replace(launch_plan(home, run_id), stages=stages)
    )
    now = time.time()
    status = run_dir.Status(
        run_id=run_id,
        experiment_name="example",
        state="running",
        stage="sft",
        message="training",
        started_at=now,
        updated_at=now,
        exit_code=None,
    )
    run_dir.write_json_atomic(run.status, status)
    lock = run_dir.hold_lock(run)
    assert lock is not None
    with lock:
        yield run


@pytest.mark.parametrize("other", ["mine", "other"], ids=["of the same name", "with the same port"])
def test_a_launch_that_comes_second(laptop: Laptop, other: str) -> None:
    """Goal: of two deploys that pass the check in the same moment the second is told that its run was not started, with
    exit 2, and no verb of its name then acts on the first one's. Red with the launcher's answer ignored: it followed
    the first one's run, and said done."""
    config = str(write_config(laptop.project, engine__sglang_port=(port := free_port())))
    entry, go = laptop.rollouts_home / "registry/mine.json", laptop.home / "go"
    tools = laptop.home / "tools"  # an rsync that waits, once the run is registered
    tools.mkdir()
    (tools / "rsync").write_text(
        f"#!/bin/sh\nwhile [ -e {entry} ] && [ ! -e {go} ]; do sleep 0.05; done\n"
        f'exec {shutil.which("rsync")} "$@"\n'
    )
    (tools / "rsync").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    deploying = laptop.start(config, "--run-id", "mine", env={"PATH": path})
    wait_for(lambda: entry.exists() or deploying.poll() is not None, "its registration")
    with live(laptop.rollouts_home, other, port) as theirs:
        go.touch()
        out, error = deploying.communicate(timeout=WAIT_S)
        assert deploying.returncode == 2, out + error
        assert "mine was not started" in error and error.endswith("Nothing was started.\n")
        done = laptop.deploy("stop" if other == "mine" else "attach", "mine")
        expected = (
            "another deploy had the name first" if other == "mine" else "mine was not started"
        )
        assert done.returncode == 2 and expected in done.stderr, (done.stdout, done.stderr)
        assert run_dir.observe(theirs).state == "running"


def test_what_another_user_left_does_not_matter() -> None:
    """Goal: a directory among the runs that may not be read, here another user's, and a file in a directory's place,
    stop no look, no clean-up and no launch. Red with PermissionError let through in any of the three."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        home.chmod(0o755)
        (home / "runs" / "closed").mkdir(parents=True)
        (home / "runs" / "closed").chmod(0)
        (home / "runs" / "file").touch()
        os.seteuid(65534)
        try:
            run_dir.clean_up(home)
            assert host_probe.run_rows(home) == []
            assert claims.taken(launch_plan(home, "mine")) == ""
        finally:
            os.seteuid(0)
