"""`deploy resume` after kill -9 at seeded points: the metrics are the undisturbed run's, bit for bit, times aside."""

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from base_config import Config
from rollouts.run_dir import RunDir, is_live, read_jsonl
from tests.e2e.conftest import Far, save_config, short_demo
from tests.example_config import kl
from tests.remote.hosts import wait_for

MEASURED = re.compile(r"time|.*_s|mfu|peak_memory_gib")  # of this machine and moment, not of the run
CHANGES: dict[str, Any] = {
    "sft.num_iterations": 60,
    "sft.log_every": 1,
    "sft.eval_every": 15,
    "sft.checkpoint_every": 5,
    "rl.examples_per_step": 2,
    "rl.save_every": 2,
    "rl.kl": kl(coef=0.05),  # its reference is the SFT stage's checkpoint, which the other host lacks
    "data.eval_mixture.0.max_samples": 8,
    "engine.sglang_port": 0,
}


@dataclass(frozen=True)
class Whole:
    """The job, and its undisturbed run."""

    config: Config
    rows: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(far: Far) -> Iterator[Whole]:
    config = save_config(short_demo(), CHANGES, far.directory / "job.json")
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


def kill(run: RunDir, what: str) -> None:
    """kill -9 of the trainer, or of the supervisor, whose end the windows notice."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            mark = f"ROLLOUTS_RUN_PATH={run.path}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if mark and f"rollouts.worker.{what}".encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("stage", "what", "seed", "far_host"),
    [("sft", "trainer", 1, False), ("rl", "supervise.supervisor", 2, True)],
    ids=["the trainer in SFT, resumed here", "the supervisor in RL, resumed on another host"],
)
def test_killed_and_resumed(  # noqa: PLR0917
    far: Far, whole: Whole, stage: str, what: str, seed: int, far_host: bool
) -> None:
    """Goal: metrics and evaluations of the resumed run are the undisturbed run's from the first row to the last. Red
    with the old rows left out, with the whole of them taken, and with the reference of the KL penalty not sent."""
    rng, name = random.Random(seed), f"killed-{stage}"
    config = str(far.directory / "job.json")
    assert far.laptop.deploy(config, "--run-id", name, "--detach").returncode == 0
    run = RunDir(far.laptop.rollouts_home / "runs" / name)
    steps = rng.randint(6, 30) if stage == "sft" else rng.randint(3, 6)
    reached = lambda: [row for row in read_jsonl(run.metrics) if row["stage"] == stage and row["step"] >= steps]  # noqa: E731
    wait_for(lambda: (run.checkpoints / stage / "latest").exists() and reached(), f"{stage} step {steps}")
    kill(run, what)
    wait_for(lambda: not is_live(run), "the end of the run")
    where = ["--remote", far.remote.target] if far_host else []
    done = far.laptop.deploy("resume", name, *where, "--run-id", f"again-{stage}", timeout_s=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    resumed = far.mirror(whole.config, f"again-{stage}")
    assert rows(resumed) == whole.rows
    home = far.remote.home if far_host else far.laptop.rollouts_home
    launch = json.loads((home / "runs" / resumed.run_id / "launch.json").read_text())
    assert launch["resumed_from"]["run_id"] == name and launch["resumed_from"]["stage"] == stage
    assert launch["resumed_from"]["step"] > 0
    again = far.laptop.deploy("resume", resumed.run_id)
    assert again.returncode == 2 and "is done: nothing is left to resume" in again.stderr
