"""Several machines with one home, and several homes with runs of one id: nobody takes or ends what is another's."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rollouts import run_dir
from rollouts.remote.host.host_probe import run_row
from rollouts.remote.list_runs import host_row
from rollouts.run_dir import LaunchPlan, RunDir, Status
from rollouts.view.tables import runs_text
from rollouts.worker import claims, processes, tmux
from rollouts.worker.supervise.journal import Journal
from rollouts.worker.supervise.open_window import OpenWindow
from rollouts.worker.supervise.peers import NoPeers
from rollouts.worker.supervise.pulse import Pulse
from tests.worker.stands import (
    Host,
    alive,
    as_status,
    module,
    process,
    recorded_pid,
    stage,
    trainer,
    wait_for,
)

SLEEP = "import time; time.sleep(600)"


def write_status(run: RunDir, state: Any) -> None:
    times = {"started_at": time.time(), "updated_at": time.time()}
    fields: dict[str, Any] = {"stage": "rl", "message": "", "exit_code": None, **times}
    run_dir.write_json_atomic(
        run.status, Status(run_id=run.run_id, experiment_name="test", state=state, **fields)
    )


def plan_in(home: Path, run_id: str, gpus: str = "0,1") -> LaunchPlan:
    engine = process("engine-0", ["x"], ready_url="http://127.0.0.1:30000/health")
    rl = stage("rl", process("trainer", ["x"], env={"CUDA_VISIBLE_DEVICES": gpus}), engine)
    return LaunchPlan(
        run_id=run_id,
        experiment_name="test",
        home=str(home),
        run_path=str(home / "runs" / run_id),
        base_python="python3",
        environments=[],
        stages=[rl],
        bootstrap_timeout_s=1.0,
        stop_grace_s=0.5,
        engine_restarts_max=0,
        engine_hang_timeout_s=1.0,
    )


@pytest.fixture
def other(tmp_path: Path) -> Iterator[RunDir]:
    """A live run: this process holds its lock."""
    run = RunDir(tmp_path / "runs/other")
    run_dir.write_json_atomic(run.plan, plan_in(tmp_path, "other"))
    write_status(run, "running")
    with run_dir.hold_lock(run) or pytest.fail("the lock is free"):
        yield run


HERE = run_dir.host_identity()


def run_elsewhere(home: Path, *, heard_s: float) -> RunDir:
    """A run of gpu-8 in a home that this machine shares, whose lock is not seen here; its heartbeat's age."""
    run = RunDir(home / "runs/other")
    run_dir.write_json_atomic(run.plan, plan_in(home, "other"))
    run_dir.write_json_atomic(
        run.launch, {"launch_id": "x", "host": {"name": "gpu-8", "boot": "b"}}
    )
    write_status(run, "running")
    run.lock.touch()
    heartbeat = {"updated_at": time.time() - heard_s, "message": "training"}
    run_dir.write_json_atomic(run.status, {**as_status(run), **heartbeat})
    return run


ELSEWHERE = [
    {**HERE, "name": "gpu-8"},
    {**HERE, "boot": "another"},
    {"name": "gpu-8", "boot": "another"},
]
UNKNOWN = [None, "gpu-8", {}, {"name": 7, "boot": "x"}, ["gpu-8"]]


@pytest.mark.parametrize("host", [HERE, *UNKNOWN])
def test_what_a_run_of_this_machine_has_is_taken(host: Any, other: RunDir) -> None:
    """Goal: GPUs and ports of a live run here are not given twice; one whose machine is not known counts as here. Red
    with a machine that is not known taken for another."""
    run_dir.write_json_atomic(other.launch, {"launch_id": "x", "host": host})
    home = other.path.parent.parent
    found = claims.taken(plan_in(home, "new"))
    assert "GPU 0, GPU 1, port 30000" in found and "test" not in found
    row = run_row(other)
    assert row is not None and row["ports"] == [30000] and row["host"] is None


@pytest.mark.parametrize("host", ELSEWHERE)
def test_what_a_run_of_another_machine_has_is_free_here(
    host: dict[str, str], other: RunDir
) -> None:
    """Goal: machines that share a home each have their own GPUs and ports. Red with
    the machine not looked at: a launch was refused for the other's GPUs."""
    run_dir.write_json_atomic(other.launch, {"launch_id": "x", "host": host})
    home = other.path.parent.parent
    assert claims.taken(plan_in(home, "new")) == ""
    row = run_row(other)
    assert (
        row is not None
        and row["ports"] == []
        and row["host"] == (None if host["name"] == HERE["name"] else "gpu-8")
    )


def test_a_launch_tells_its_machine(host: Host) -> None:
    """Goal: every run's record names the machine. Red with the launch id alone written."""
    run = host.start(stage("sft", trainer(SLEEP)))
    assert run_dir.read_launch_host(run) == HERE and not run_dir.is_elsewhere(run)
    module("stop", str(run.path))


def test_stop_on_the_wrong_machine(other: RunDir) -> None:
    """Goal: a live run of another machine is not called stopped from here, where its processes cannot be seen. Red
    with its status written: "stopped", while it went on."""
    run_dir.write_json_atomic(
        other.launch, {"launch_id": "x", "host": {"name": "gpu-8", "boot": "b"}}
    )
    before = other.status.read_bytes()
    done = module("stop", str(other.path))
    assert (
        done.returncode == 1 and "runs on gpu-8" in done.stderr and "--remote gpu-8" in done.stderr
    )
    assert other.status.read_bytes() == before


@pytest.mark.parametrize("heard_s", [-3600.0, 2.0, 200.0])
def test_a_live_run_of_another_machine_is_not_dead(heard_s: float, tmp_path: Path) -> None:
    """Goal: where locks do not reach over the network, a run that writes its heartbeat there is live, and its
    machine is named. Red with the lock alone asked: `died`, from every host but its own."""
    run = run_elsewhere(tmp_path, heard_s=heard_s)
    seen = run_dir.observe(run)
    assert (seen.state, seen.live, seen.exit_code) == ("running", True, None)
    assert json.loads(module("tail", str(run.path), stdin="{}\n").stdout.splitlines()[-1]) == {
        "live": True
    }
    row = run_row(run)
    assert row is not None and "runs on gpu-8, which shares this home: training" in runs_text(
        [host_row("gpu-7", row)]
    )


def test_a_silent_run_of_another_machine_is_neither_dead_nor_live(tmp_path: Path) -> None:
    """Goal: of a run of another machine that has written nothing for minutes nothing is claimed: it is not called died,
    blocks nobody's name, keeps its files, and whoever follows it is told where to ask. Red with `died`, and with stop
    removing its secrets."""
    run = run_elsewhere(tmp_path, heard_s=run_dir.SILENT_S + 60)
    run.secrets.write_text("{}")
    seen = run_dir.observe(run)
    assert (seen.state, seen.live, seen.exit_code) == ("silent", False, None)
    last = json.loads(module("tail", str(run.path), stdin="{}\n").stdout.splitlines()[-1])
    assert last == {"ended": True, "state": "silent", "exit_code": None}
    row = run_row(run)
    assert row is not None and "nothing was heard of it for minutes" in runs_text(
        [host_row("gpu-7", row)]
    )
    assert "deploy status other --remote gpu-8" in runs_text([host_row("gpu-7", row)])
    assert claims.taken(plan_in(tmp_path, "new")) == ""
    stopped = module("stop", str(run.path))
    assert (
        stopped.returncode == 1
        and f"If that machine is no more, remove {run.path}" in stopped.stderr
    )
    assert run.secrets.exists() and as_status(run)["state"] == "running"


@pytest.mark.parametrize(
    "changes", [{}, {"name": "the-same-kernels-container"}, {"boot": "before the reboot"}]
)
def test_a_dead_run_of_this_kernel_is_dead(changes: dict[str, str], tmp_path: Path) -> None:
    """Goal: where this kernel's own locks tell, they tell: containers of one machine, this machine before it
    booted. Red with every run of another name or boot judged by its heartbeat."""
    run = run_elsewhere(tmp_path, heard_s=2.0)
    run_dir.write_json_atomic(run.launch, {"launch_id": "x", "host": {**HERE, **changes}})
    assert (run_dir.observe(run).state, run_dir.observe(run).live) == ("died", False)


def test_a_lock_that_reaches_over_the_network_counts(other: RunDir) -> None:
    """Goal: a held lock is a live run, however old its heartbeat. Red with the heartbeat asked first."""
    run_dir.write_json_atomic(
        other.launch, {"launch_id": "x", "host": {"name": "gpu-8", "boot": "b"}}
    )
    run_dir.write_json_atomic(other.status, {**as_status(other), "updated_at": 1.0})
    assert run_dir.observe(other).live


def test_secrets_of_another_machines_run_stay(tmp_path: Path) -> None:
    """Goal: where locks do not reach over the network, a look from here takes no secrets from a run there. Red with
    every run that seems dead cleaned up."""
    run = RunDir(tmp_path / "runs/r")
    write_status(run, "running")
    run.lock.touch()
    for host, kept in (
        ({"name": "gpu-8", "boot": "b"}, True),
        ({**HERE, "boot": "before the reboot"}, False),
    ):
        run.secrets.write_text("{}")
        run_dir.write_json_atomic(run.launch, {"launch_id": "x", "host": host})
        run_dir.clean_up(tmp_path)
        assert run.secrets.exists() is kept, host


@pytest.mark.parametrize("launched", [True, False], ids=["a record of this version", "removed"])
def test_stop_spares_a_run_of_the_same_id(launched: bool, host: Host, tmp_path: Path) -> None:
    """Goal: of two runs of one id in two homes, `stop` ends its own alone: neither the other's processes, nor its tmux
    session, nor its weights in memory. Red with the mark being the id: the other run ended."""
    run = host.start(stage("sft", trainer(SLEEP)))
    child = wait_for(
        lambda: run.process("trainer").exists() and recorded_pid(run, "trainer"), "the trainer"
    )
    twin = RunDir(tmp_path / "elsewhere/runs" / run.run_id)
    if launched:
        write_status(twin, "running")
        run_dir.write_json_atomic(twin.launch, {"launch_id": "x", "host": HERE})
        twin.lock.touch()
    run.weights_in_memory.mkdir()
    assert twin.weights_in_memory != run.weights_in_memory
    done = module("stop", str(twin.path))
    assert (done.returncode == 0) is launched, done.stderr
    assert launched or "no run was launched there" in done.stderr
    assert tmux.has_session(run.run_id), "its windows end a moment after their session"
    assert alive(child) and run_dir.is_live(run) and run.weights_in_memory.exists()
    link = tmp_path / "link"
    link.symlink_to(run.path.parent)  # the same directory by another spelling
    assert json.loads(module("stop", str(link / run.run_id)).stdout)["state"] == "stopped"
    assert not alive(child) and not run.weights_in_memory.exists()


def test_one_look_around_reads_proc_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: however many windows a stage has, a look around reads /proc once. Red with a scan for each window."""
    run, plan = RunDir(tmp_path / "runs/r"), plan_in(tmp_path, "r")
    lock = run_dir.hold_lock(run)
    assert lock is not None
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SLEEP], env={**os.environ, **processes.run_marks(run)}
        )
        for _ in range(3)
    ]
    try:
        windows = [
            OpenWindow(
                run,
                "rl",
                plan.stages[0].engines[0],
                False,
                child.pid,
                processes.start_ticks(child.pid),
                0,
            )
            for child in children
        ]
        watching = Pulse(run, plan, Journal(run, lock), NoPeers())
        watching.windows = lambda: windows
        scans, listdir = [], os.listdir
        monkeypatch.setattr(
            processes.os, "listdir", lambda path: scans.append(path) or listdir(path)
        )
        watching._look_around()
        assert scans == ["/proc"]
    finally:
        lock.close()
        for child in children:
            child.kill()
            child.wait()
