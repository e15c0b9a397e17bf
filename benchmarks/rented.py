"""What rollouts itself takes on a rented machine, from the moment in which SSH answers to the supervisor's start.

    python -m benchmarks.rented [--repeats 5]

The machine is that of RunPod's stand-in, an sshd on loopback; the code is this repository. The clock starts when the
provider says that the machine runs, and stops with the supervisor's process there: login, host key, guards, facts,
plan, code and launch lie between. It has to stay under five seconds.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO, cast

from benchmarks.startup import CACHE, ROOT, benchmark_config
from rollouts.run_dir import RunDir
from tests.cloud.conftest import variables
from tests.cloud.fakes.runpod import FakeRunPod
from tests.cloud.fakes.server import FakeCloud
from tests.cloud.test_rented_runs import RENTS, Machines, kill_all
from tests.remote.hosts import Laptop, kill_tmux, make_laptop, tool_directory, wait_for

LIMIT_S = 5.0


def said_ready(stream: TextIO) -> float:
    """Return when `deploy` said that the machine runs; what it says goes on to be read."""
    for line in stream:
        if line.startswith("wait: ") and line.split()[-1] == "RUNNING":
            return time.time()
    raise SystemExit("the machine was never ready")


def measure(laptop: Laptop, cloud: FakeCloud, machines: Machines, config: Path, run: str) -> float:
    """Return the seconds of one rent, whose machine is ended afterwards."""
    command = [str(config), "--yes", "--detach", "--run-id", run]
    process = laptop.start(*command, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    ready = said_ready(cast(TextIO, process.stderr))
    rest = process.stderr.read()
    if process.wait() != 0:
        raise SystemExit(rest)
    ((made, _),) = machines.hosts.values()
    record = RunDir(made.run_path(run)).process("supervisor")
    wait_for(record.exists, "the supervisor")
    started = json.loads(record.read_text())["started_at"]
    for machine in cloud.machines.values():
        cloud.end(machine)
    return float(started - ready)


def main() -> int:
    """Measure, print, and return 1 where the median is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    cloud = FakeRunPod()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        top = Path(name)
        tool_directory(top / "bin")
        CACHE.mkdir(parents=True, exist_ok=True)
        (top / "envs").symlink_to(CACHE)
        machines = Machines(top, top, stack)
        cloud.boot, cloud.shut_down = machines.boot, machines.shut_down
        tmux_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rb", dir="/tmp")))
        stack.callback(kill_tmux, tmux_dir)
        laptop = make_laptop(top / "laptop", ROOT, tmux_dir)
        laptop.environment.update(variables({cloud.provider: cloud}, laptop.home))
        laptop.environment["ROLLOUTS_HOME"] = str(laptop.rollouts_home)
        stack.callback(kill_all, f"HOME={laptop.home}", "guard_process")
        config = top / "rented.json"
        dataclasses.replace(benchmark_config(top), provision=RENTS).save(config)
        found = [measure(laptop, cloud, machines, config, f"r{n}") for n in range(options.repeats)]
    each = ", ".join(f"{seconds:.2f}" for seconds in found)
    print(f"{statistics.median(found):.2f} s median of {each}")
    return int(statistics.median(found) > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
