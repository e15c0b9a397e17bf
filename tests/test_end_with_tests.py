"""A test process that is killed leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.remote.hosts import wait_for

ROOT = Path(__file__).resolve().parents[1]
TEST = """
import os, subprocess, sys, time
from pathlib import Path
from tests.end_with_tests import ended_with_this_process
with ended_with_this_process(Path(sys.argv[1])):
    wait = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    how = {"start_new_session": True, "stdout": subprocess.PIPE}
    a = subprocess.Popen(wait, env={**os.environ, "ROLLOUTS_HOME": sys.argv[1] + "/home"}, **how)
    b = subprocess.Popen([*wait, sys.argv[1] + "/sshd_config"], **how)
    other = subprocess.Popen(wait, **how)
    for each in (a, b, other):
        each.stdout.readline()
    print(a.pid, b.pid, other.pid, flush=True)
    if sys.argv[2] == "hangs":
        time.sleep(600)
"""


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("how", ["hangs", "ends"])
def test_a_test_process_that_is_killed(how: str, tmp_path: Path) -> None:
    """Goal: after kill -9 of a test process, what it started in the background for its directory ends, and nothing
    else; one that ends by itself ends what it started by itself. Red without the process that waits for its end."""
    directory = tmp_path / "tests"
    process = subprocess.Popen(
        [sys.executable, "-c", TEST, str(directory), how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if str(tmp_path) not in value},
    )
    assert process.stdout is not None
    first, second, other = map(int, process.stdout.readline().split())
    if how == "hangs":
        process.kill()
    process.wait(timeout=200)
    try:
        if how == "hangs":
            wait_for(lambda: not lives(first) and not lives(second), "their end")
        else:
            assert lives(first) and lives(second)
        assert lives(other)
    finally:
        for pid in (first, second, other):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        process.stdout.close()
