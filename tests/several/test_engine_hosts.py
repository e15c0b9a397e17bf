"""RL whose engines run on another host than the trainer: real engines and weights, hosts in network namespaces."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from base_config import DiskSync
from rollouts.run_dir import RunDir, read_jsonl
from tests.e2e.conftest import save_config, short_demo
from tests.remote.hosts import wait_for
from tests.remote.test_whole_runs import quiet
from tests.several.test_several_hosts import TINY, Several, bare, several_hosts

STEPS = {"data.rl_mixture.0.max_samples": 24, "engine.weight_sync": DiskSync(on_tmpfs=True)}

FAR = {"engine.hosts": [1], "limits.restarts_max": 1}


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, environments: Path, tool_path: str
) -> Iterator[Several]:
    with several_hosts(tmp_path_factory.mktemp("engines"), environments, tool_path, 2) as made:
        yield made


@pytest.mark.timeout(1500)  # the environment may have to be built first
def test_engines_on_another_host_give_the_same_bits(two: Several) -> None:
    """Goal: RL with its engine on a host that only serves gives the bits of RL on one host, though the engine is killed
    there, which its host starts again, and then the trainer, whose stage all hosts begin again. Red with the restart of
    a stage refused with engine.hosts."""
    runs: dict[str, RunDir] = {}
    for run_id, changes in (("near", {}), ("far", FAR)):
        file = two.directory / f"{run_id}.json"
        config = save_config(
            short_demo(), {**TINY, **STEPS, "target.sharding": "none", **changes}, file
        )
        running = two.laptop.start(str(file), *two.remotes(config.job_hosts), "--run-id", run_id)
        if config.job_hosts > 1:
            _kill_the_engine(two, run_id, running)
            _kill_the_trainer(two, run_id, running)
        out, err = running.communicate(timeout=1200)
        assert running.returncode == 0, out[-4000:] + err[-4000:]
        runs[run_id] = two.run(config, run_id)
    near, far = runs["near"], runs["far"]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        theirs, ours = ([bare(row) for row in read_jsonl(run.path / name)] for run in (near, far))
        assert theirs == ours and theirs, name
    there = read_jsonl(RunDir(far.path / "hosts" / "1").events)
    (again,) = [row for row in there if row["kind"] == "engine_restarted"]
    assert again["window"] == "engine-0"
    everywhere = [*read_jsonl(far.events), *there]
    assert not [row for row in everywhere if "other machines reach it" in str(row.get("message"))]
    kinds = [row["kind"] for row in everywhere]
    assert (kinds.count("model_sent"), kinds.count("stage_restarted")) == (2, 2)
    quiet("far")
    left = two.hosts[1].run_path("far")
    assert not (left / "checkpoints").exists() and not RunDir(left).weights_in_memory.exists()


def _kill_the_engine(two: Several, run_id: str, running: "subprocess.Popen[str]") -> None:
    first, second = (RunDir(host.run_path(run_id)) for host in two.hosts)
    wait_for(
        lambda: (
            running.poll() is not None
            or any(row.get("stage") == "rl" for row in read_jsonl(first.metrics))
        ),
        "the first step of rl",
        timeout_s=1200,
    )
    if running.poll() is None:  # else the caller tells why
        os.kill(json.loads(second.process("engine-0").read_text())["pid"], signal.SIGKILL)


def _kill_the_trainer(two: Several, run_id: str, running: "subprocess.Popen[str]") -> None:
    """Kill it once the engine that was killed is there again, and has served a step."""
    first, second = (RunDir(host.run_path(run_id)) for host in two.hosts)

    def served() -> bool:
        again = [row for row in read_jsonl(second.events) if row["kind"] == "engine_restarted"]
        rows = [row for row in read_jsonl(first.metrics) if row["stage"] == "rl"]
        return bool(again and rows) and rows[-1]["time"] > again[-1]["time"]

    wait_for(lambda: running.poll() is not None or served(), "a step", timeout_s=1200)
    if running.poll() is None:
        os.kill(json.loads(first.process("trainer").read_text())["pid"], signal.SIGKILL)
