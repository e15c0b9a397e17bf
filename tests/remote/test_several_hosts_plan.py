"""Plans of a job on several hosts, and at which addresses its hosts meet: pure."""

import dataclasses
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from base_config import BroadcastSync, DiskSync
from rollouts.remote.errors import DeployError
from rollouts.remote.host import reach_probe
from rollouts.remote.host.named_hosts import NamedHost, named_hosts
from rollouts.remote.host.reach import NOWHERE, Answers, Place, decide_reach
from rollouts.remote.plan import Plan, required_ports
from rollouts.remote.plan.group_plan import count_problems, fit_problems
from rollouts.remote.plan.host_part import own_config, part_of
from rollouts.remote.plan.launch_plan import launch_plan
from rollouts.run_dir import GroupHost, HostGroup, LaunchPlan
from rollouts.worker.supervise.fewer_hosts import on_hosts
from tests.example_config import sglang
from tests.remote.hosts import config_with
from tests.remote.test_plan import CODE, FACTS, plan_for

GROUP = HostGroup(
    rank=0,
    hosts=[
        GroupHost(target="a", name="node-a", address="10.0.0.4", interface="eth1"),
        GroupHost(target="b", name="node-b", address="10.0.0.5", interface="lan0"),
    ],
    supervisor_port=21_000,
    trainer_port=22_000,
)


def on(rank: int) -> LaunchPlan:
    group = dataclasses.replace(GROUP, rank=rank)
    return launch_plan(
        config_with({"target.hosts": 2, "target.gpu_ranks": [0, 1]}), FACTS, CODE, "r1", group=group
    )


def test_what_each_host_runs() -> None:
    """Goal: ranks on each host meet at the first one's private address; engines, and the checkpoint that rl starts
    from, are the first one's. Red with needs_checkpoint on both."""
    first, second = on(0), on(1)
    for rank, plan in enumerate((first, second)):
        assert LaunchPlan.from_json(plan.to_json()) == plan
        assert plan.network is not None
        for process in (
            plan.network.process,
            *filter(None, (stage.trainer for stage in plan.stages)),
        ):
            words = " ".join(process.argv)
            assert "rollouts.training.bound_torchrun --rdzv-backend static --rdzv-id r1" in words
            assert "--master-addr 10.0.0.4 --master-port 22000" in words
            assert f"--nnodes 2 --node-rank {rank} --nproc-per-node 2" in words
            interface = ("eth1", "lan0")[rank]
            wanted = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
            assert wanted.items() <= process.env.items()
    assert [[engine.window for engine in stage.engines] for stage in first.stages] == [
        [],
        ["engine-0"],
    ]
    assert [[engine.window for engine in stage.engines] for stage in second.stages] == [[], []]
    assert [stage.needs_checkpoint is None for stage in (*first.stages, *second.stages)] == [
        True,
        False,
        True,
        True,
    ]
    trainers = [plan.stages[1].trainer for plan in (first, second)]
    assert ["--engine-url" in (trainer.argv if trainer else ()) for trainer in trainers] == [
        True,
        False,
    ]
    (local,) = second.smoke
    assert "127.0.0.1" in local.process.argv and local.process.env["GLOO_SOCKET_IFNAME"] == "lo"


def test_as_many_hosts_as_the_config_says() -> None:
    """Goal: target.hosts and the command agree. Red with too many let through."""
    (found,) = count_problems(config_with({"target.hosts": 2}), 3)
    assert (
        "asks for 2 hosts, and the command names 3" in found.message
        and "target.hosts=3" in found.fix
    )
    assert not list(count_problems(config_with({"target.hosts": 2}), 2))


GOES_ON = {
    "target.hosts": 4,
    "target.hosts_min": 1,
    "limits.restarts_max": 1,
    "sft.batch_size": 2,
    "sft.target_examples_per_step": 8,
}


def test_with_how_many_hosts_a_job_goes_on() -> None:
    """Goal: those over whose ranks the batches divide, from target.hosts_min on; the fewest have to be one of them, and
    count for the memory. Where the first and third of four live, the third has rank 1, in plan.json too.

    Red without the check of target.hosts_min, and with all counts taken for ones that divide."""
    config = config_with(GOES_ON)
    assert config.problems() == () and config.fewer_hosts() == [1, 2]
    assert config_with({**GOES_ON, "limits.restarts_max": 0}).fewer_hosts() == []
    (refused,) = config_with({**GOES_ON, "target.hosts_min": 3}).problems()
    assert refused.startswith("target.hosts_min=3: needs a number of hosts that can do the job")
    (more,) = config_with({"target.hosts_min": 2}).problems()
    assert more == "target.hosts_min=2: needs 1 to target.hosts=1"
    group = dataclasses.replace(GROUP, rank=2, hosts=GROUP.hosts * 2, fewer=config.fewer_hosts())
    assert group.going_on([0, 2, 3]) == [0, 2] and group.going_on([0]) == [0]
    assert own_config(config, part_of(config, group)).target.world_size == 1
    plan = launch_plan(config, FACTS, CODE, "r1", group=group)
    assert LaunchPlan.from_json(plan.to_json()) == plan
    assert on_hosts(plan, [0, 1, 2, 3]) is plan
    left = on_hosts(plan, [0, 2])
    words = [" ".join(stage.trainer.argv) for stage in left.stages if stage.trainer]
    assert all("--nnodes 2 --node-rank 1" in line for line in words) and len(words) == 2


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"driver": "580.2"}, ["different NVIDIA drivers", "a: 570.1\nb: 580.2"]),
        ({"python_version": "3.12.1"}, ["different environments for the trainer", "Python 3.12.1"]),
        ({"host": FACTS.host}, ["a and b are one machine: gpu-7"]),
        ({}, []),
    ],
    ids=["driver", "python", "twice", "alike"],
)
def test_hosts_that_do_not_fit(facts: dict[str, Any], words: list[str]) -> None:
    """Goal: what differs between hosts and must be the same is named for each. Red with each check left out."""
    their = {"host": "gpu-8", **facts}
    plans: list[Plan] = [plan_for(), plan_for(facts=their)]
    text = "\n".join(
        problem.text() for problem in fit_problems(["a", "b"], [FACTS, of(their)], plans)
    )
    assert bool(text) == bool(words)
    assert all(word in text.replace("          ", "") for word in words), text


def of(facts: dict[str, Any]) -> Any:
    return dataclasses.replace(FACTS, **facts)


PUBLIC, PRIVATE, SIX = (
    Place("eth0", "9.9.9.7", (1, 2)),
    Place("lan0", "10.0.0.4", (1, 2)),
    Place("lan0", "fd00::4", (1, 2)),
)


def reached(
    *places: Place, without: tuple[str, int] | None = None, clock: float = 0.0
) -> dict[tuple[str, int], float]:
    pairs = [(place.address, port) for place in places for port in place.ports]
    return {pair: clock for pair in pairs if pair != without}


@pytest.mark.parametrize(
    ("reaches", "chosen", "warns"),
    [
        (reached(PUBLIC, SIX, PRIVATE), PRIVATE, ""),
        (reached(PUBLIC, SIX, PRIVATE, without=("10.0.0.4", 2)), SIX, ""),
        (reached(PUBLIC), PUBLIC, "not a private address"),
        (reached(PRIVATE, clock=-90.0), PRIVATE, "the clocks of b and a are 90 s apart"),
    ],
    ids=["private first", "a port is closed", "public alone", "clocks"],
)
def test_where_hosts_meet(reaches: dict[tuple[str, int], float], chosen: Place, warns: str) -> None:
    """Goal: the address of a host is one that the others reach on every port; a private one and IPv4 where there is a
    choice; a public one, and clocks that differ, are warned of. Red with one port enough."""
    theirs = Place("eth0", "10.0.0.5", (3,))
    answers: Answers = {(1, 0): reaches, (0, 1): reached(theirs)}
    found = decide_reach(["a", "b"], [[PUBLIC, SIX, PRIVATE], [theirs]], answers)
    assert found.places == (chosen, theirs) and found.problems == ()
    assert len(found.warnings) == bool(warns) and warns in "".join(found.warnings)


def test_hosts_that_nobody_reaches() -> None:
    """Goal: a closed firewall, and a host without a network, say which host does not reach what. Red with the caller
    left out."""
    answers: Answers = {(1, 0): {}, (0, 1): {}}
    found = decide_reach(["a", "b"], [[PRIVATE], [NOWHERE]], answers)
    texts = [problem.text() for problem in found.problems]
    assert "a: the other hosts of the job do not reach it" in texts[0]
    assert "b does not reach 10.0.0.4 (lan0), port 1, 2" in texts[0]
    assert "it has no network address but loopback" in texts[1]


def test_a_loaded_host_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a host that answers late is reached, and its clock is not taken for another one. Red with the time to
    connect alone, and with the middle of the call taken for when its clock was read."""
    monkeypatch.setattr(reach_probe, "CONNECT_S", 0.3)
    found: list[list[Any]] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        call = threading.Thread(target=reach_probe._try, args=("127.0.0.1", port, "me", found))
        call.start()
        with listening.accept()[0] as late:
            time.sleep(1.0)
            late.sendall(f"me {time.time()}\n".encode())
        call.join()
    assert found == [["127.0.0.1", port, 0.0]]


def test_a_file_of_hosts(tmp_path: Path) -> None:
    """Goal: a line names a host and, if wanted, its address; a mistake is named with its line. Red with a second word
    that is not an address taken."""
    file = tmp_path / "hosts"
    file.write_text("# ours\ngpu-7\n\nu@gpu-8:22 10.0.0.5  # the second\n")
    assert named_hosts([], file) == (NamedHost("gpu-7"), NamedHost("u@gpu-8:22", "10.0.0.5"))
    assert named_hosts(["a", "b"], None) == (NamedHost("a"), NamedHost("b"))
    file.write_text("gpu-7\ngpu-8 eth0\n")
    with pytest.raises(DeployError, match=r"hosts:2: 'gpu-8 eth0' does not name a host"):
        named_hosts([], file)
    with pytest.raises(DeployError, match="both name hosts"):
        named_hosts(["a"], file)
    file.write_text("\n# none\n")
    with pytest.raises(DeployError, match="names no hosts"):
        named_hosts([], file)


SERVING = dataclasses.replace(
    GROUP,
    hosts=[
        GROUP.hosts[0],
        dataclasses.replace(GROUP.hosts[1], trains=False, engine_port=30_500, receiver_port=23_000),
    ],
)
FAR = {"engine.hosts": [1], "engine.weight_sync": DiskSync(on_tmpfs=True)}


def test_a_host_that_only_serves() -> None:
    """Goal: its engines listen at its private address on its own port, start with the model that the first host sends,
    and it has no trainer; the first host's trainer knows the URLs, and stays on loopback."""
    config = config_with(FAR)
    first, second = (
        launch_plan(config, FACTS, CODE, "r1", group=dataclasses.replace(SERVING, rank=rank))
        for rank in (0, 1)
    )
    for plan in (first, second):
        assert LaunchPlan.from_json(plan.to_json()) == plan and plan.network is None
    assert [[spec.window for spec in stage.processes()] for stage in first.stages] == [
        ["trainer"],
        ["trainer"],
    ]
    assert [[spec.window for spec in stage.processes()] for stage in second.stages] == [
        [],
        ["receiver", "engine-0"],
    ]
    receiver, engine = second.stages[1].processes()
    assert "--host 10.0.0.5 --port 30500" in " ".join(engine.argv)
    assert f"--model-path {second.run_path}/weights/start" in " ".join(engine.argv)
    assert receiver.argv[0] == FACTS.python and "--versions /dev/shm/" in " ".join(receiver.argv)
    for plan in (first, second):
        sent = plan.stages[1].send
        assert sent is not None and sent.receivers == ["http://10.0.0.5:23000"]
    assert first.stages[1].far_ready_urls == ["http://10.0.0.5:30500/ready"]
    trainer = first.stages[1].trainer
    assert trainer is not None and trainer.env["GLOO_SOCKET_IFNAME"] == "lo"
    assert trainer.argv[-4:] == [
        *("--engine-url", "http://10.0.0.5:30500"),
        *("--receiver-url", "http://10.0.0.5:23000"),
    ]
    assert [spec.name for spec in second.environments] == ["trainer"]  # the embedded engine's
    assert first.stages[1].needs_checkpoint and not second.stages[1].needs_checkpoint


def test_engines_on_both_hosts_that_broadcast() -> None:
    """Goal: replicas are counted through, each with a seed of its own, and a collective takes the private interface."""
    both = dataclasses.replace(
        SERVING,
        hosts=[dataclasses.replace(SERVING.hosts[0], engine_port=30_400), SERVING.hosts[1]],
    )
    config = config_with({"engine": sglang(hosts=[0, 1], weight_sync=BroadcastSync(bucket_mib=64))})
    code = dataclasses.replace(CODE, engine_requirements="sglang==1\n")
    plans = [
        launch_plan(config, FACTS, code, "r1", group=dataclasses.replace(both, rank=rank))
        for rank in (0, 1)
    ]
    engines = [plan.stages[1].engines[0] for plan in plans]
    assert [engine.window for engine in engines] == ["engine-0", "engine-1"]
    lines = [" ".join(engine.argv) for engine in engines]
    assert "--host 10.0.0.4 --port 30400" in lines[0] and "--host 10.0.0.5" in lines[1]
    seeds = [int(line.partition("--random-seed ")[2].split()[0]) for line in lines]
    assert seeds[1] == seeds[0] + 1
    assert [engine.env["GLOO_SOCKET_IFNAME"] for engine in engines] == ["eth1", "lan0"]
    assert [[spec.name for spec in plan.environments] for plan in plans] == [
        ["trainer", "engine"],
        ["engine"],
    ]
    assert [check.process.window for check in plans[1].smoke] == ["smoke-engine"]


def test_each_host_is_asked_for_its_own_part() -> None:
    """Goal: cards and ports of a host count for what runs there."""
    config = config_with({**FAR, "target.gpu_ranks": [0, 1], "engine.gpu_ranks": [3]})
    trains, serves = (
        own_config(config, part_of(config, dataclasses.replace(SERVING, rank=rank)))
        for rank in (0, 1)
    )
    assert (trains.target.gpu_ranks, trains.engine) == ([0, 1], None)
    assert serves.target.gpu_ranks == [] and serves.engine == config.engine
    assert required_ports(trains) == [] and required_ports(serves) == required_ports(config) != []


def test_hosts_for_engines_are_counted() -> None:
    """Goal: the command names the hosts that only serve, too."""
    config = config_with(FAR)
    assert not list(count_problems(config, 2))
    (found,) = count_problems(config, 1)
    assert "asks for 2 hosts, of which the last ones only serve" in found.message
    assert "target.hosts=1, engine.hosts=[1]" in found.text()
    assert plan_for(engine__hosts=[1], engine__weight_sync=FAR["engine.weight_sync"]).launch is None
