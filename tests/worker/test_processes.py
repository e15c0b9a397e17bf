"""Knowing a run's processes by the mark in their environment, and ending those alone."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.run_dir import RUN_ID_VARIABLE, RUN_PATH_VARIABLE, RunDir
from rollouts.worker import processes
from rollouts.worker.processes import WINDOW_VARIABLE, end_marked, marked_processes, start_ticks
from tests.worker.stands import alive

SLEEP = "import sys, time; print('up', flush=True); time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


class Started:
    """Marked and unmarked processes; all are ended with the test."""

    def __init__(self, home: Path) -> None:
        self.run_id = f"t-{uuid.uuid4().hex[:12]}"
        self.run = RunDir(home / "runs" / self.run_id)
        self.all: list[subprocess.Popen[str]] = []

    def start(
        self,
        *,
        run_id: str | None = None,
        window: str = "sft-trainer",
        text: str = SLEEP,
        home: Path | None = None,
    ) -> int:
        """`home`: of the run that marks it, as this version does; None: as an older version did."""
        mark = {RUN_ID_VARIABLE: run_id or self.run_id, WINDOW_VARIABLE: window}
        if home is not None:
            mark[RUN_PATH_VARIABLE] = str(home / "runs" / self.run_id)
        child = subprocess.Popen(
            [sys.executable, "-c", text],
            env={**os.environ, **mark},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        self.all.append(child)
        return child.pid


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    made = Started(tmp_path)
    yield made
    for child in made.all:
        child.kill()
        child.wait()


def test_only_the_runs_own_are_found(started: Started) -> None:
    """Goal: an id that begins like ours, another run, and no mark at all are not ours; windows narrow it. Red with a
    search for the text anywhere in the environment."""
    ours, engine = started.start(), started.start(window="rl-engine-0")
    started.start(run_id=started.run_id + "-2")
    started.start(run_id="another")
    assert sorted(marked_processes(started.run)) == sorted([ours, engine])
    assert marked_processes(started.run, {"rl-engine-0"}) == [engine]
    assert marked_processes(started.run, {"rl-engine"}) == []
    assert marked_processes(started.run, set()) == []


def test_ending_spares_everybody_else(started: Started) -> None:
    """Goal: what ignores SIGTERM is killed after the grace, what is not ours lives. Red without the SIGKILL."""
    deaf, other = started.start(text=DEAF), started.start(run_id="another")
    ticks = []
    assert end_marked(started.run, None, grace_s=0.2, tick=lambda: ticks.append(1)) == []
    assert not alive(deaf) and alive(other)
    assert started.all[0].wait() == -signal.SIGKILL
    assert ticks, "the caller's heartbeat stops meanwhile"


def test_ending_asks_first(started: Started) -> None:
    """Goal: SIGTERM before SIGKILL. Red with SIGKILL at once."""
    started.start()
    assert end_marked(started.run, {"sft-trainer"}, grace_s=120) == []
    assert started.all[0].wait() == -signal.SIGTERM


def test_what_cannot_be_ended_is_told(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a process in the kernel's hands ends the wait with its id, not never. Red with the wait unbounded. (Such a
    process cannot be made here: the signals are withheld instead.)"""
    pid = started.start()
    monkeypatch.setattr(processes, "KILL_WAIT_S", 0.2)
    monkeypatch.setattr(processes, "send_signal", lambda _pid, _signum: None)
    assert end_marked(started.run, None, grace_s=0.1) == [pid]


def test_a_zombie_has_ended(started: Started) -> None:
    """Goal: a process that nobody reaped yet does not count as alive. Red with only its /proc entry looked for."""
    pid = started.start()
    assert start_ticks(pid) is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and left unreaped
    assert os.path.exists(f"/proc/{pid}")
    assert start_ticks(pid) is None
    assert marked_processes(started.run) == []


def test_start_ticks_survive_a_strange_name() -> None:
    """Goal: a command named `) Z 1 (` does not confuse the parse of /proc/pid/stat. Red with the line split at the
    first parenthesis."""
    text = "open('/proc/self/comm', 'w').write(') Z 1 ('); print('up', flush=True); import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        ticks = start_ticks(child.pid)
        assert ticks is not None and ticks >= (start_ticks(os.getpid()) or 0)
        child.kill()


def test_runs_of_one_id_in_two_homes(started: Started, tmp_path: Path) -> None:
    """Goal: the mark names the run's directory: a run of the same id in another home is another's, and what descends
    from it too. Red with the id alone compared."""
    run_dir.write_json_atomic(
        started.run.launch, {"launch_id": "x", "host": run_dir.host_identity()}
    )
    ours = started.start(home=tmp_path)
    twin = started.start(home=tmp_path / "twin")
    assert marked_processes(started.run) == [ours]
    assert end_marked(started.run, None, grace_s=5) == [] and alive(twin) and not alive(ours)


@pytest.mark.parametrize("record", ["this version", "an older version", "removed"])
def test_processes_that_an_older_version_marked(record: str, started: Started) -> None:
    """Goal: a run that an older version started is stopped by this one; a run of this version does not take such
    processes for its own. Red with marks without a directory never counted, or always."""
    if record != "removed":
        host = {"host": run_dir.host_identity()} if record == "this version" else {}
        run_dir.write_json_atomic(started.run.launch, {"launch_id": "x", **host})
    old = started.start()
    assert marked_processes(started.run) == ([] if record == "this version" else [old])
