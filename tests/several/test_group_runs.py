"""Whole runs on several hosts from the real command, with the real supervisors; only torch is stood in for."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, read_jsonl, read_status
from tests.remote.conftest import share_environments
from tests.remote.hosts import Host, Laptop, wait_for, write_config
from tests.remote.test_whole_runs import assert_complete, mirror, quiet
from tests.several.networks import Network, network, networked_host


@pytest.fixture
def lan() -> Iterator[Network]:
    with network() as made:
        yield made


@pytest.fixture
def make_hosts(lan: Network, shared: Path, laptop: Laptop, tmp_path: Path) -> Iterator[Callable[[int], list[Host]]]:
    """Start so many hosts in one network, which the laptop may log in to."""
    with contextlib.ExitStack() as stack:

        def make(count: int) -> list[Host]:
            made = []
            for index in range(count):
                one = networked_host(lan, tmp_path / f"host{index}", shared / "key", path=shared / "bin")
                made.append(stack.enter_context(one))
                share_environments(made[-1].home, shared)
            laptop.know(*made)
            return made

        yield make


def remotes(hosts: list[Host]) -> list[str]:
    return [word for host in hosts for word in ("--remote", host.target)]


def hosts_run(host: Host, run_id: str) -> RunDir:
    return RunDir(host.run_path(run_id))


def test_a_run_on_two_hosts(laptop: Laptop, make_hosts: Callable[[int], list[Host]]) -> None:
    """Goal: one command goes from config to verified results on two hosts; the second's logs are here, too; the first
    alone runs output.on_end. Red with each of them running it."""
    hosts = make_hosts(2)
    config = str(write_config(laptop.project, target__hosts=2, output__on_end="echo told; exit 3"))
    done = laptop.deploy(config, *remotes(hosts), "--run-id", "both")
    assert done.returncode == 0, done.stdout + done.stderr
    run = mirror(laptop, "both")
    assert_complete(run, hosts[0].run_path("both"))
    assert "network_tested hosts=['node0', 'node1'] gigabytes_per_s=1.5 ranks=2" in done.stdout
    assert (run.path / "hosts/1/logs/trainer.log").read_text() == "stage=sft rank=1\nstage=rl rank=1\n"
    there = laptop.deploy("logs", "both", "--window", "trainer@node1")
    assert there.stdout == "stage=sft rank=1\nstage=rl rank=1\n", there.stderr
    nobody = laptop.deploy("logs", "both", "--window", "trainer@node7")
    assert nobody.returncode == 1 and "hosts: node0, node1" in nobody.stderr
    assert [status.state for host in hosts if (status := read_status(hosts_run(host, "both")))] == ["done", "done"]
    assert [hosts_run(host, "both").log("on_end").exists() for host in hosts] == [True, False]
    assert (run.path / "logs" / "on_end.log").read_text() == "told\n"
    digests = {json.loads(hosts_run(host, "both").code_manifest.read_text())["digest"] for host in hosts}
    assert len(digests) == 1
    notes = [row["message"] for host in hosts for row in read_jsonl(hosts_run(host, "both").events) if "message" in row]
    assert not [note for note in notes if "other machines reach it" in note]
    quiet("both")


def test_all_start_or_none(laptop: Laptop, make_hosts: Callable[[int], list[Host]]) -> None:
    """Goal: where one host refuses the launch, nothing runs on the other."""
    hosts = make_hosts(2)
    (hosts[0].home).mkdir(parents=True, exist_ok=True)
    config = str(write_config(laptop.project, target__hosts=2))
    blocked = hosts[0].home / "launch.lock"
    blocked.mkdir()
    done = laptop.deploy(config, *remotes(hosts), "--run-id", "none")
    assert done.returncode != 0 and "none" in done.stderr, done.stdout + done.stderr
    status = read_status(hosts_run(hosts[1], "none"))
    assert status is not None and status.state == "stopped"
    quiet("none")


def test_the_death_of_a_host_ends_the_run_everywhere(
    laptop: Laptop, lan: Network, make_hosts: Callable[[int], list[Host]], tmp_path: Path
) -> None:
    """Goal: one of three hosts loses its power: the others end, say which it was, and nothing is left."""
    hosts = make_hosts(3)
    config = write_config(
        laptop.project,
        target__hosts=3,
        output__mode="sft",
        sft__target_examples_per_step=24,
        rl__num_samples=6,
        env={"STAND_IN_WAIT": str(tmp_path / "never")},
    )
    deploying = laptop.start(str(config), *remotes(hosts), "--run-id", "dies")
    wait_for(lambda: read_jsonl(hosts_run(hosts[0], "dies").metrics), "the first step")
    wait_for(lambda: hosts_run(hosts[1], "dies").log("trainer").exists(), "the second host's trainer")
    killed_at = time.time()
    lan.kill(2)
    out, err = deploying.communicate(timeout=200)
    assert deploying.returncode == 1, out + err
    assert "node2" in out and "was not heard of for 15 s" in out
    quiet("dies")
    for host in hosts[:2]:
        status = read_status(hosts_run(host, "dies"))
        assert status is not None and status.state == "failed" and "node2" in status.message
        print(f"ended {status.updated_at - killed_at:.1f} s after the death")
    assert manifest_problems(mirror(laptop, "dies").checkpoints / "sft" / "step_000001") == ()


def test_stop_ends_all_hosts(laptop: Laptop, make_hosts: Callable[[int], list[Host]], tmp_path: Path) -> None:
    """Goal: `deploy stop` ends a run on all of its hosts; so does the failure of one trainer."""
    hosts = make_hosts(2)
    wait = {"STAND_IN_WAIT": str(tmp_path / "never")}
    config = str(write_config(laptop.project, target__hosts=2, output__mode="sft", env=wait))
    assert laptop.deploy(config, *remotes(hosts), "--run-id", "long", "--detach").returncode == 0
    wait_for(lambda: read_jsonl(hosts_run(hosts[0], "long").metrics), "the first step")
    assert laptop.json("stop", "long")["state"] == "stopped"
    quiet("long")
    assert [status.state for host in hosts if (status := read_status(hosts_run(host, "long")))] == ["stopped"] * 2
    fail = {**wait, "STAND_IN_FAIL": "sft", "STAND_IN_FAIL_RANK": "1"}
    config = str(write_config(laptop.project, "fails", target__hosts=2, output__mode="sft", env=fail))
    done = laptop.deploy(config, *remotes(hosts), "--run-id", "fails")
    assert done.returncode == 7 and "node1" in done.stdout, done.stdout + done.stderr
    quiet("fails")


def test_what_keeps_hosts_from_one_job(laptop: Laptop, lan: Network, make_hosts: Callable[[int], list[Host]]) -> None:
    """Goal: too few hosts, one host twice, and hosts that do not reach each other are errors before anything runs."""
    hosts = make_hosts(2)
    config = str(write_config(laptop.project, target__hosts=2))
    few = laptop.deploy(config, "--remote", hosts[0].target, "--plan")
    assert few.returncode == 2 and "asks for 2 hosts, and the command names 1" in few.stderr
    file = laptop.project / "runs" / "hosts.txt"
    file.write_text(f"{hosts[0].target}  # leads\n\n{hosts[1].target} {lan.address(1)}\n")
    planned = laptop.deploy(config, "--hosts", str(file), "--plan")
    assert planned.returncode == 0, planned.stderr
    assert f"the hosts meet at {lan.address(1)} (lan0) of {hosts[1].target}" in planned.stdout
    file.write_text(f"{hosts[0].target}\n{hosts[1].target} 10.9.9.9\n")
    elsewhere = laptop.deploy(config, "--hosts", str(file), "--plan")
    assert elsewhere.returncode == 2 and "the other hosts of the job do not reach it" in elsewhere.stderr
