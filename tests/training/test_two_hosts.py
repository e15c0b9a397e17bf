"""What ranks of two hosts share: torchrun's store between them, files, and versions that must be the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollouts.training.network_check import NetworkError, require_same
from tests.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
GIVEN = ["empty", "manifest.json", "model.bin", "optimizer/a.bin"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory and what both ranks found, each under an agent of its own."""
    directory, port = tmp_path_factory.mktemp("two_hosts"), free_port()
    agents = []
    for node in (0, 1):
        command = [
            sys.executable,
            "-m",
            "rollouts.training.bound_torchrun",
            "--rdzv-backend",
            "static",
        ]
        command += [
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(port),
            "--rdzv-id",
            "two",
            "--nnodes",
            "2",
        ]
        command += [
            "--node-rank",
            str(node),
            "--nproc-per-node",
            "1",
            "-m",
            "tests.training.two_hosts",
            str(directory),
        ]
        agents.append(subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True))
    for agent in agents:
        _, said = agent.communicate(timeout=240)
        assert agent.returncode == 0, said[-4000:]
    return directory, [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def test_the_store_listens_at_its_address_alone(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """Goal: torchrun between hosts is reached at the one address that it is given. Red with torch.distributed.run in
    place of ours: `::`, all addresses."""
    assert [found["agent_listens_at"] for found in two[1]] == [["127.0.0.1"], []]


def test_files_come_to_rank_0(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """Goal: what a rank of another host wrote comes to rank 0 byte for byte, and nothing of it stays there. Red with
    the last piece left out."""
    directory, (first, second) = two
    assert (directory / "host0" / "written" / "of_1").read_bytes() == b"\1" * 2500
    assert [name for name in first["here"] if name.startswith("written")] == [
        "written/of_0",
        "written/of_1",
    ]
    assert [name for name in second["here"] if name.startswith("written")] == []


def test_a_checkpoint_comes_to_every_host(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """Goal: a host without the first one's checkpoint gets it whole, once, and anew where it was damaged meanwhile. Red
    with `_is_whole` true for whatever has the manifest."""
    first, second = two[1]
    assert first["places"] == ["given"] * 3 and second["places"] == ["copy"] * 3
    assert second["here"] == [f"copy/{name}" for name in GIVEN] and second["problems"] == []


def test_hosts_with_different_versions() -> None:
    """Goal: hosts whose builds differ are named with their versions. Red with the first host's alone looked at."""
    found = [
        {"host": f"node{n}", "versions": {"torch": "2.13", "NCCL": f"2.2{n}"}} for n in range(2)
    ]
    with pytest.raises(
        NetworkError, match=r"different versions of NCCL: 2\.20 on node0; 2\.21 on node1"
    ):
        require_same(found)
    require_same(found[:1] * 2)
