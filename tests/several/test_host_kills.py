"""Hosts of a job that lose their power at seeded moments, and what goes on: the real command and supervisors.

ROLLOUTS_HOST_KILLS=10 runs ten seeds in place of one; ROLLOUTS_HOST_KILLS_FROM=7 begins with the seventh.
"""

import dataclasses
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl, read_status
from tests.remote.hosts import Host, Laptop, wait_for, write_config
from tests.remote.test_whole_runs import mirror, quiet
from tests.several.networks import Network
from tests.several.test_group_runs import hosts_run, lan, make_hosts, printed, remotes

__all__ = ["lan", "make_hosts"]
FIRST = int(os.environ.get("ROLLOUTS_HOST_KILLS_FROM", "1"))
SEEDS = range(FIRST, FIRST + int(os.environ.get("ROLLOUTS_HOST_KILLS", "1")))
STEPS = 8
DIVIDES: dict[str, Any] = {
    "target__hosts": 3,
    "sft__target_examples_per_step": 24,
    "sft__batch_size": 4,
    "rl__num_samples": 6,
}
LAST_STEP = "it had taken its last step, and has no earlier checkpoint"

NOTEBOOK = """
import sys
from base_config import load_config
from rollouts.api import deploy

deploy(load_config(sys.argv[1]), remote=sys.argv[2:], run_id="old")
"""


def rows_of(run: RunDir) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in read_jsonl(run.metrics)]


@pytest.mark.timeout(900)  # as long as all else waits for the machine
@pytest.mark.parametrize("seed", SEEDS)
def test_a_host_dies_at_any_moment(
    laptop: Laptop, lan: Network, make_hosts: Callable[[int], list[Host]], seed: int
) -> None:
    """Goal: whichever of three hosts dies, and whenever: the run goes on or ends as the config says, everywhere, and
    says why. It is done only with all its rows and checkpoints; no row is there twice, no process is left."""
    draw = random.Random(seed)
    hosts, victim = make_hosts(3), draw.choice([0, 1, 1, 2, 2])
    fewest, restarts = draw.choice([1, 2, 3]), draw.choice([0, 1, 2])
    moment = draw.randrange(1, 2 * STEPS + 12)
    name = f"kill{seed}"
    config = write_config(
        laptop.project,
        name,
        target__hosts_min=fewest,
        limits__restarts_max=restarts,
        env={"STAND_IN_STEPS": str(STEPS), "STAND_IN_STEP_S": "0.2"},
        **DIVIDES,
    )
    deploying = laptop.start(str(config), *remotes(hosts), "--run-id", name)
    first = hosts_run(hosts[0], name)

    def seen() -> int:
        return len(read_jsonl(first.events)) + len(read_jsonl(first.metrics))

    wait_for(lambda: seen() >= moment or deploying.poll() is not None, f"row {moment}")
    stages = [row["stage"] for row in read_jsonl(first.events) if row["kind"] == "stage_started"]
    lan.kill(victim)
    out, err = deploying.communicate(timeout=600)
    print(
        f"seed {seed}: node{victim} of 3 at row {moment} in {stages[-1:] or 'bootstrap'},"
        f" hosts_min={fewest}, restarts_max={restarts}: exit code {deploying.returncode}"
    )
    quiet(name)
    here = mirror(laptop, name)
    assert len(set(rows_of(here))) == len(rows_of(here)), rows_of(here)
    if victim == 0:
        return _assert_ended_elsewhere(hosts, name, out + err, deploying.returncode)
    status = read_status(first)
    assert status is not None and (deploying.returncode == 0) == (status.state == "done"), out + err
    events = [row["kind"] for row in read_jsonl(here.events)]
    if deploying.returncode == 0:
        assert rows_of(here) == [(s, n) for s in ("sft", "rl") for n in range(1, STEPS + 1)]
        last = [here.checkpoints / stage / f"step_{STEPS:06d}" for stage in ("sft", "rl")]
        assert [manifest_problems(path) for path in last] == [(), ()]
        assert ("host_left" in events) >= ("stage_restarted" in events)
    else:
        assert f"node{victim}" in status.message and "was not heard of" in status.message
        may_go_on = bool(stages) and restarts > 0 and fewest < 3
        assert not may_go_on or LAST_STEP in status.message, status.message


def _assert_ended_elsewhere(hosts: list[Host], run_id: str, said: str, code: int) -> None:
    """The first host is gone: the others have ended, and say so, as does the command."""
    ends = [read_status(hosts_run(host, run_id)) for host in hosts[1:]]
    if all(end is not None and end.state == "done" for end in ends):
        return
    assert code != 0 and "has ended on its other hosts" in said, said
    for end in ends:
        assert end is not None and end.state == "failed", end
        assert "node0" in end.message and "was not heard of" in end.message


@pytest.mark.timeout(900)
def test_resume_on_the_hosts_that_are_left(
    laptop: Laptop, lan: Network, make_hosts: Callable[[int], list[Host]], tmp_path: Path
) -> None:
    """Goal: the first of three hosts of a run, which Python started, dies. `deploy resume` on the other two, then on
    one, goes on from the checkpoint that was pulled, with one curve; --wait is refused with a reason."""
    hosts, go = make_hosts(3), tmp_path / "go"
    config = write_config(
        laptop.project, output__mode="sft", env={"STAND_IN_WAIT": str(go)}, **DIVIDES
    )
    notebook = dataclasses.replace(laptop, command=(sys.executable, "-P", "-c", NOTEBOOK))
    done = notebook.deploy(str(config), *(host.target for host in hosts))
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(hosts_run(hosts[0], "old").latest_checkpoint("sft").exists, "step 1")
    wait_for(lambda: printed(hosts_run(hosts[2], "old")), "the third host's trainer")
    assert laptop.deploy("pull", "old").returncode == 0
    lan.kill(0)
    lives = [hosts_run(host, "old") for host in hosts[1:]]
    wait_for(
        lambda: all((s := read_status(run)) and s.state == "failed" for run in lives), "their end"
    )
    waits = laptop.deploy("resume", "old", *remotes(hosts[1:]), "--wait")
    assert waits.returncode == 2 and "--wait and --queue are for runs on one host" in waits.stderr
    go.touch()
    two = laptop.deploy("resume", "old", *remotes(hosts[1:]), "--run-id", "two")
    assert two.returncode == 0, two.stdout + two.stderr
    assert "note: target.hosts=2, as many as are named" in two.stderr
    before = read_jsonl(mirror(laptop, "old").metrics)
    assert read_jsonl(mirror(laptop, "two").metrics)[:1] == before[:1]
    led = hosts_run(hosts[1], "two")
    assert json.loads(led.launch.read_text())["resumed_from"]["step"] == 1
    assert not hosts_run(hosts[2], "two").metrics.exists()
    assert lives[1].log("trainer").read_text() == "stage=sft rank=2\n"
    assert hosts_run(hosts[2], "two").log("trainer").read_text() == "stage=sft rank=1\n"
    one = laptop.json("resume", "old", *remotes(hosts[1:2]), "--plan")
    assert one["resumed_from"]["checkpoint"] == "checkpoints/sft/step_000001"
    assert one["launch"]["group"] is None
    quiet("two")
