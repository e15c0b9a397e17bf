"""A host of two loses its power while the real trainer runs on both (gloo, a tiny model): does the run go on?

    .venv/bin/python -m scripts.host_kill [STEP]      kill the second host once step STEP is logged; 3

Needs root, for network namespaces, and minutes. Exit 0 only where the run is done, each step stands once, all steps are
there, the last checkpoint is whole, and nothing is left.
"""

import os
import sys
import tempfile
from pathlib import Path

from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl
from tests.e2e.conftest import ENVIRONMENTS_VARIABLE, save_config, short_demo
from tests.remote.hosts import wait_for
from tests.run_processes import commands_of
from tests.several.test_several_hosts import TINY, several_hosts

STEPS, WAIT_S = 12, 900.0
CHANGES = {
    **TINY,
    "target.hosts": 2,
    "target.hosts_min": 1,
    "target.sharding": "full_shard",
    "limits.restarts_max": 1,
    "output.mode": "sft",
    "sft.num_iterations": STEPS,
}


def main() -> int:
    moment = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    kept = os.environ.get(ENVIRONMENTS_VARIABLE) or Path.home() / ".cache/rollouts-tests/envs"
    tools = f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}"
    with (
        tempfile.TemporaryDirectory(prefix="host-kill-") as place,
        several_hosts(Path(place), Path(kept), tools, 2) as made,
    ):
        file = Path(place) / "kill.json"
        config = save_config(short_demo(), CHANGES, file)
        running = made.laptop.start(str(file), *made.remotes(2), "--run-id", "kill")
        first = RunDir(made.hosts[0].run_path("kill"))

        def reached() -> bool:
            rows = read_jsonl(first.metrics)
            return running.poll() is not None or (bool(rows) and rows[-1]["step"] >= moment)

        wait_for(reached, f"step {moment}", timeout_s=WAIT_S)
        made.network.kill(1)
        out, err = running.communicate(timeout=WAIT_S)
        print(out[-3000:], err[-1000:])
        here = made.run(config, "kill")
        steps = [row["step"] for row in read_jsonl(here.metrics)]
        kinds = [row["kind"] for row in read_jsonl(here.events)]
        last = manifest_problems(here.checkpoints / "sft" / f"step_{STEPS:06d}")
        holds = {
            "the command ended with 0": running.returncode == 0,
            "a host left, and the stage was restarted": {"host_left", "stage_restarted"}
            <= {*kinds},
            "each step stands once, in order": steps == list(range(1, STEPS + 1)),
            "the last checkpoint is whole": last == (),
            "no process is left": commands_of("kill") == [],
        }
        for name, ok in holds.items():
            print(f"{'yes' if ok else 'NO '} {name}")
        return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
