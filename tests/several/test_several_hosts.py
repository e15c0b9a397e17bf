"""Jobs on several hosts, each a network namespace with its own sshd, home and host name."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from base_config import Config
from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl
from tests.built_environments import installer_settings
from tests.e2e.conftest import a_laptop, save_config, short_demo
from tests.example_config import policy_loss
from tests.remote.hosts import Host, Laptop
from tests.remote.test_whole_runs import quiet
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
IN_THREE = {  # what three ranks share evenly
    "sft.batch_size": 16,
    "sft.target_examples_per_step": 48,
    "rl.num_samples": 6,
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
def several(
    tmp_path_factory: pytest.TempPathFactory, environments: Path, tool_path: str
) -> Iterator[Several]:
    with several_hosts(tmp_path_factory.mktemp("several"), environments, tool_path, 3) as made:
        yield made


@contextlib.contextmanager
def several_hosts(
    directory: Path, environments: Path, tool_path: str, count: int
) -> Iterator[Several]:
    """A laptop and so many hosts in one network, with the real environments."""
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network())
        laptop = stack.enter_context(a_laptop(directory / "laptop", environments, tool_path))
        hosts = []
        for index in range(count):
            made = networked_host(
                net,
                directory / f"host{index}",
                laptop.key,
                path=Path(tool_path),
                environment=installer_settings(),
            )
            hosts.append(stack.enter_context(made))
            hosts[-1].home.mkdir(parents=True)
            (hosts[-1].home / "envs").symlink_to(environments)
        laptop.know(*hosts)
        yield Several(laptop, net, hosts, directory)


@pytest.mark.timeout(1500)  # the environment may have to be built first
def test_three_hosts_are_one_host_with_as_many_ranks(several: Several) -> None:
    """Goal: SFT and RL, sharded over three hosts that share no disk, give the bits of one host with three ranks: every
    loss, every sample, the weights. Checkpoints are whole where rank 0 is, and rl starts on all from sft's.

    Red without `host_files.collect` ("rank 0 does not have optimizer/__1_0.distcp") and without `host_files.spread`.
    """
    runs = {}
    for run_id, changes, remotes in (
        ("one", {"target.gpu_ranks": [0, 1, 2]}, []),
        ("three", {"target.hosts": 3}, several.remotes(3)),
    ):
        file = several.directory / f"{run_id}.json"
        config = save_config(short_demo(), {**TINY, **IN_THREE, **changes}, file)
        done = several.laptop.deploy(str(file), *remotes, "--run-id", run_id, timeout_s=1200)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        runs[run_id] = several.run(config, run_id)
    one, three = runs["one"], runs["three"]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        theirs, ours = ([bare(row) for row in read_jsonl(run.path / name)] for run in (one, three))
        assert theirs == ours and theirs, name
    for path in ("sft/step_000002", "sft/step_000003", "rl/step_000002"):
        assert manifest_problems(three.checkpoints / path) == ()
        names = {file.name for file in (three.checkpoints / path / "optimizer").iterdir()}
        assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}
        weights = [
            (run.checkpoints / path / "model.safetensors").read_bytes() for run in (one, three)
        ]
        assert weights[0] == weights[1], path
    (tested,) = [row for row in read_jsonl(three.events) if row["kind"] == "network_tested"]
    assert (tested["hosts"], tested["ranks"]) == (["node0", "node1", "node2"], 3) and tested[
        "gigabytes_per_s"
    ] > 0
    everywhere = [
        row
        for run in (three, *(RunDir(three.path / "hosts" / number) for number in "12"))
        for row in read_jsonl(run.events)
    ]
    assert not [row for row in everywhere if "other machines reach it" in str(row.get("message"))]
    quiet("three")
    for host in several.hosts[1:]:
        left = host.run_path("three") / "checkpoints"
        # what sft gave, and no halves
        assert sorted(path.name for path in left.glob("*/*")) == ["step_000003"]


def bare(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a clock or the host's memory decides."""
    return {
        name: value
        for name, value in row.items()
        if not name.endswith(("time", "_s", "_gib", "mfu"))
    }
