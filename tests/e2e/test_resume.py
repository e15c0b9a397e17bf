"""`deploy resume` after kill -9 at seeded points: the metrics are the undisturbed run's, bit for bit, times aside."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from base_config import Config, TensorBoard
from rollouts.run_dir import RunDir, is_live, read_jsonl
from tests.e2e.conftest import Far, save_config, short_demo
from tests.example_config import kl
from tests.remote.hosts import wait_for
from tests.view.event_files import steps_of

# of this machine and moment, not of the run
MEASURED = re.compile(r"time|.*_s|mfu|peak_memory_gib")
CHANGES: dict[str, Any] = {
    # many more steps than come before a kill: a test that is late still finds the stage
    "sft.num_iterations": 60,
    "sft.batch_size": 64,
    "sft.log_every": 1,
    "sft.eval_every": 30,
    "sft.checkpoint_every": 5,
    "data.rl_mixture.0.max_samples": 20,
    "rl.examples_per_step": 2,
    "rl.save_every": 2,
    # its reference is the SFT stage's checkpoint, which the other host lacks
    "rl.kl": kl(coef=0.05),
    "data.eval_mixture.0.max_samples": 8,
    "engine.sglang_port": 0,
    "engine.restarts_max": 0,  # an engine that dies ends the run
}
PROCESSES = (
    "rollouts.worker.trainer",
    "rollouts.worker.supervise.supervisor",
    "rollouts.engines.embedded",
)
KILLS = int(os.environ.get("ROLLOUTS_TEST_KILLS", "3"))  # a campaign has more of them


@dataclass(frozen=True)
class Kill:
    """Where a run is killed, and where it is resumed."""

    process: str  # the module that it runs
    stage: str
    step: int  # of the stage, at least
    wait_s: float  # from that step's row on: a moment within one of the next steps
    elsewhere: bool

    @classmethod
    def drawn(cls, seed: int) -> "Kill":
        """Draw one; the process and the place take turns, so that each kind is among the first three."""
        rng, process = random.Random(seed), PROCESSES[seed % 3]
        stage = "sft" if process == PROCESSES[seed // 3 % 2] else "rl"  # SFT has no engine
        step = rng.randint(6, 15) if stage == "sft" else rng.randint(3, 5)
        return cls(process, stage, step, rng.uniform(0, 0.3), elsewhere=seed % 2 == 1)

    def __str__(self) -> str:
        where = "elsewhere" if self.elsewhere else "here"
        return f"{self.process.rpartition('.')[2]} in {self.stage} after step {self.step}, resumed {where}"


@dataclass(frozen=True)
class Whole:
    """The job, and its undisturbed run."""

    config: Config
    rows: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(far: Far) -> Iterator[Whole]:
    tracker = TensorBoard(project="letters", directory=str(far.directory / "curves"))
    changes = {**CHANGES, "output.trackers": [tracker]}
    config = save_config(short_demo(), changes, far.directory / "job.json")
    done = far.laptop.deploy(str(far.directory / "job.json"), "--run-id", "whole", timeout_s=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    yield Whole(config, rows(far.mirror(config, "whole")))


def rows(run: RunDir) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {key: value for key, value in row.items() if not MEASURED.fullmatch(key)}
            for row in read_jsonl(run.path / name)
        ]
        for name in ("metrics.jsonl", "eval.jsonl")
    }


def kill(run: RunDir, module: str) -> None:
    """kill -9 of every process of the run that runs this module."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            mark = f"ROLLOUTS_RUN_PATH={run.path}".encode() in (
                entry / "environ"
            ).read_bytes().split(b"\0")
            if mark and module.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(KILLS), ids=lambda seed: str(Kill.drawn(seed)))
def test_killed_and_resumed(far: Far, whole: Whole, seed: int) -> None:
    """Goal: metrics and evaluations of the resumed run are the undisturbed run's from the first row to the last. In its
    tracker both runs are one curve, with each step once. Red with all rows of the resumed run sent to it."""
    drawn, name = Kill.drawn(seed), f"killed-{seed}"
    config = str(far.directory / "job.json")
    assert far.laptop.deploy(config, "--run-id", name, "--detach").returncode == 0
    run = RunDir(far.laptop.rollouts_home / "runs" / name)
    stage = drawn.stage

    def reached() -> bool:
        rows = read_jsonl(run.metrics)
        return any(row["stage"] == stage and row["step"] >= drawn.step for row in rows)

    begun = lambda: (run.checkpoints / stage / "latest").exists() and reached()  # noqa: E731
    wait_for(begun, str(drawn), timeout_s=900)  # a campaign may share the machine
    time.sleep(drawn.wait_s)
    kill(run, drawn.process)
    wait_for(lambda: not is_live(run), "the end of the run")
    where = ["--remote", far.remote.target] if drawn.elsewhere else []
    done = far.laptop.deploy("resume", name, *where, "--run-id", f"again-{seed}", timeout_s=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    resumed = far.mirror(whole.config, f"again-{seed}")
    assert rows(resumed) == whole.rows
    for part in ("sft", "rl"):
        steps = [row["step"] for row in whole.rows["metrics.jsonl"] if row["stage"] == part]
        assert steps_of(far.directory / "curves" / "letters" / f"{name}-{part}") == steps
    home = far.remote.home if drawn.elsewhere else far.laptop.rollouts_home
    launch = json.loads((home / "runs" / resumed.run_id / "launch.json").read_text())
    assert launch["resumed_from"]["run_id"] == name and launch["resumed_from"]["stage"] == stage
    assert launch["resumed_from"]["step"] > 0
    again = far.laptop.deploy("resume", resumed.run_id)
    assert again.returncode == 2 and "is done: nothing is left to resume" in again.stderr
