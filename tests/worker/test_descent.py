"""Processes that dropped the run's mark: they belong to it by descent, and end with it."""

import os
import signal

from rollouts.run_dir import RunDir
from rollouts.worker.processes import descendants, marked_processes
from tests.worker.stands import (
    Host,
    alive,
    as_status,
    log,
    module,
    parent_of,
    recorded_pid,
    stage,
    trainer,
    wait_for,
    wait_for_end,
)

# As `env -i` and `sudo` do; the second is orphaned at once, the third a grandchild of such a one
HIDING = """
import subprocess, sys, time
hidden = {"start_new_session": True, "env": {}}
grandchild = "import subprocess, time; p = subprocess.Popen(['sleep', '600'], env={}); print(p.pid, flush=True); "
first = subprocess.Popen(["sleep", "600"], **hidden)
orphan = "import subprocess as s; print(s.Popen(['sleep', '600'], stdout=-3, start_new_session=True, env={}).pid)"
second = subprocess.run([sys.executable, "-c", orphan], stdout=subprocess.PIPE, text=True, env={}).stdout.strip()
between = subprocess.Popen([sys.executable, "-c", grandchild + "time.sleep(600)"], stdout=subprocess.PIPE, text=True,
                           **hidden)
print("hidden", first.pid, second, between.pid, between.stdout.readline().strip(), flush=True)
"""
WAITING = f"{HIDING}\ntime.sleep(600)"


def hidden_of(run: RunDir) -> list[int]:
    line = wait_for(
        lambda: [line for line in log(run, "trainer").splitlines() if line.startswith("hidden")],
        "them",
    )
    return [int(word) for word in line[0].split()[1:]]


def end(pids: list[int]) -> None:
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_unmarked_processes_end_with_their_stage(host: Host) -> None:
    """Goal: what a reward or a tool started with an empty environment, in a session of its own, orphaned or below such
    a one, ends with the stage that it came from. Red with the mark alone asked for: all four lived on."""
    run = host.finish(stage("sft", trainer(HIDING)))
    pids = hidden_of(run)
    try:
        assert as_status(run)["state"] == "done"
        assert [pid for pid in pids if alive(pid)] == []
    finally:
        end(pids)


def test_unmarked_processes_end_with_a_stop(host: Host) -> None:
    """Goal: the same for `stop`, whose caller is no parent of theirs. Red with the mark alone asked for."""
    run = host.start(stage("sft", trainer(WAITING)))
    pids = hidden_of(run)
    try:
        assert set(pids) <= set(marked_processes(run))
        assert module("stop", str(run.path)).returncode == 0
        assert [pid for pid in pids if alive(pid)] == []
    finally:
        end(pids)


def test_unmarked_processes_of_a_killed_wrapper(host: Host) -> None:
    """Goal: kill -9 of the wrapper, through which they descend, leaves none of them: the supervisor has looked around
    before. Red with `family` left out."""
    run = host.start(stage("sft", trainer(WAITING)))
    pids = hidden_of(run)
    wrapper = parent_of(recorded_pid(run, "trainer"))
    try:
        for _ in range(2):  # the first of them may have looked before they were there
            beats = as_status(run)["updated_at"]
            wait_for(lambda beats=beats: as_status(run)["updated_at"] > beats, "a look around")
        assert set(pids) <= descendants(wrapper, run).keys()
        os.kill(wrapper, signal.SIGKILL)
        wait_for_end(run)
        assert [pid for pid in pids if alive(pid)] == []
    finally:
        end(pids)


def test_adopted_processes_are_reaped(host: Host) -> None:
    """Goal: thousands of orphans over a long run leave no zombies under the wrapper. Red without `reap`."""
    text = (
        "import subprocess, time\nfor _ in range(20): subprocess.run(['sh', '-c', 'sleep 0 &'])\n"
    )
    run = host.start(stage("sft", trainer(f"{text}print('ready', flush=True); time.sleep(600)")))
    wait_for(lambda: "ready" in log(run, "trainer"), "the orphans")
    child = recorded_pid(run, "trainer")
    wrapper = parent_of(child)

    def children() -> list[int]:
        with open(f"/proc/{wrapper}/task/{wrapper}/children") as stream:
            return [int(word) for word in stream.read().split()]

    wait_for(lambda: children() == [child], "only the trainer below the wrapper")
    assert module("stop", str(run.path)).returncode == 0


def test_another_runs_processes_are_spared(host: Host) -> None:
    """Goal: what another run marked is not ended, though it was started from inside of this one. Red with descent
    alone: a run that deploys another took it along."""
    other = """
import os, subprocess
marked = {**os.environ, "ROLLOUTS_RUN_ID": "another"}
print("hidden", subprocess.Popen(["sleep", "600"], start_new_session=True, env=marked).pid, flush=True)
"""
    run = host.finish(stage("sft", trainer(other)))
    pids = hidden_of(run)
    try:
        assert [pid for pid in pids if alive(pid)] == pids
    finally:
        end(pids)
