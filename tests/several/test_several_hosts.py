"""Jobs on two and three hosts, each a network namespace with its own sshd, home and host name."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from base_config import Config
from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl
from tests.e2e.conftest import a_laptop, installer_settings, processes_of, save_config, short_demo
from tests.example_config import policy_loss
from tests.remote.hosts import Host, Laptop
from tests.several.networks import Network, network, networked_host

TINY = {
    "sft.num_iterations": 3,
    "sft.eval_every": -1,
    "sft.checkpoint_every": 2,
    "sft.batch_size": 32,
    "sft.log_every": 1,
    "rl.eval_every": -1,
    "rl.num_epochs": 1,
    "rl.loss": policy_loss(),
    "data.rl_mixture.0.max_samples": 8,
    "data.eval_mixture": [],
    "target.sharding": "full_shard",
}


@dataclass
class Several:
    """A laptop, the network behind it, and the hosts there."""

    laptop: Laptop
    network: Network
    hosts: list[Host]
    directory: Path

    def remotes(self, count: int) -> list[str]:
        return [word for host in self.hosts[:count] for word in ("--remote", host.target)]

    def run(self, config: Config, run_id: str) -> RunDir:
        return RunDir(self.directory / "results" / config.output.experiment_name / run_id)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, environments: Path, tool_path: str) -> Iterator[Several]:
    directory = tmp_path_factory.mktemp("several")
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network())
        laptop = stack.enter_context(a_laptop(directory / "laptop", environments, tool_path))
        hosts = []
        for index in range(3):
            made = networked_host(
                net, directory / f"host{index}", laptop.key, path=Path(tool_path), environment=installer_settings()
            )
            hosts.append(stack.enter_context(made))
            hosts[-1].home.mkdir(parents=True)
            (hosts[-1].home / "envs").symlink_to(environments)
        laptop.know(*hosts)
        yield Several(laptop, net, hosts, directory)


@pytest.mark.timeout(1500)  # the environment may have to be built first
def test_two_hosts_are_one_host_with_as_many_ranks(several: Several) -> None:
    """Goal: SFT and RL, sharded over two hosts that share no disk, give the bits of one host with two ranks: every
    loss, every sample, the weights. Checkpoints are whole where rank 0 is, and rl starts on both from sft's.

    Red without `host_files.collect` ("rank 0 does not have optimizer/__1_0.distcp") and without `host_files.spread`.
    """
    runs = {}
    for run_id, changes, remotes in (
        ("one", {"target.gpu_ranks": [0, 1]}, []),
        ("two", {"target.hosts": 2}, several.remotes(2)),
    ):
        file = several.directory / f"{run_id}.json"
        config = save_config(short_demo(), {**TINY, **changes}, file)
        done = several.laptop.deploy(str(file), *remotes, "--run-id", run_id, timeout_s=1200)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        runs[run_id] = several.run(config, run_id)
    one, two = runs["one"], runs["two"]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        theirs, ours = ([bare(row) for row in read_jsonl(run.path / name)] for run in (one, two))
        assert theirs == ours and theirs, name
    for path in ("sft/step_000002", "sft/step_000003", "rl/step_000002"):
        assert manifest_problems(two.checkpoints / path) == ()
        names = {file.name for file in (two.checkpoints / path / "optimizer").iterdir()}
        assert names == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        weights = [(run.checkpoints / path / "model.safetensors").read_bytes() for run in (one, two)]
        assert weights[0] == weights[1], path
    (tested,) = [row for row in read_jsonl(two.events) if row["kind"] == "network_tested"]
    assert (tested["hosts"], tested["ranks"]) == (["node0", "node1"], 2) and tested["gigabytes_per_s"] > 0
    everywhere = [row for run in (two, RunDir(two.path / "hosts" / "1")) for row in read_jsonl(run.events)]
    assert not [row for row in everywhere if "other machines reach it" in str(row.get("message"))]
    left = several.hosts[1].run_path("two") / "checkpoints"
    assert sorted(path.name for path in left.glob("*/*")) == ["step_000003"]  # what sft gave, and no halves
    assert processes_of("two") == []


def bare(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a clock or the host's memory decides."""
    return {name: value for name, value in row.items() if not name.endswith(("time", "_s", "_gib", "mfu"))}
