"""Whole runs on several hosts from the real command, with the real supervisors; only torch is stood in for."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from base_config import DiskSync
from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, append_jsonl, read_jsonl, read_status
from rollouts.view.run_data import read_run
from tests.remote.conftest import share_environments
from tests.remote.hosts import Host, Laptop, wait_for, write_config
from tests.remote.test_whole_runs import assert_complete, mirror, quiet
from tests.several.networks import Network, network, networked_host

pytestmark = pytest.mark.timeout(900)  # as long as all else waits for the machine


@pytest.fixture
def lan() -> Iterator[Network]:
    with network() as made:
        yield made


@pytest.fixture
def make_hosts(
    lan: Network, shared: Path, laptop: Laptop, tmp_path: Path
) -> Iterator[Callable[[int], list[Host]]]:
    """Start so many hosts in one network, which the laptop may log in to."""
    with contextlib.ExitStack() as stack:

        def make(count: int) -> list[Host]:
            made = []
            for index in range(count):
                one = networked_host(
                    lan, tmp_path / f"host{index}", shared / "key", path=shared / "bin"
                )
                made.append(stack.enter_context(one))
                share_environments(made[-1].home, shared)
            laptop.know(*made)
            return made

        yield make


def printed(run: RunDir) -> str:
    """What the run's trainer has printed on this host so far."""
    log = run.log("trainer")
    return log.read_text() if log.exists() else ""


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
    assert (
        run.path / "hosts/1/logs/trainer.log"
    ).read_text() == "stage=sft rank=1\nstage=rl rank=1\n"
    there = laptop.deploy("logs", "both", "--window", "trainer@node1")
    assert there.stdout == "stage=sft rank=1\nstage=rl rank=1\n", there.stderr
    nobody = laptop.deploy("logs", "both", "--window", "trainer@node7")
    assert nobody.returncode == 1 and "hosts: node0, node1" in nobody.stderr
    quiet("both")  # deploy waits some seconds for the second host's supervisor
    assert [status.state for host in hosts if (status := read_status(hosts_run(host, "both")))] == [
        "done",
        "done",
    ]
    assert [hosts_run(host, "both").log("on_end").exists() for host in hosts] == [True, False]
    assert (run.path / "logs" / "on_end.log").read_text() == "told\n"
    digests = {
        json.loads(hosts_run(host, "both").code_manifest.read_text())["digest"] for host in hosts
    }
    assert len(digests) == 1
    notes = [
        row["message"]
        for host in hosts
        for row in read_jsonl(hosts_run(host, "both").events)
        if "message" in row
    ]
    assert not [note for note in notes if "other machines reach it" in note]


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


def test_attach_after_a_stop_before_the_launch(
    laptop: Laptop, make_hosts: Callable[[int], list[Host]]
) -> None:
    """Goal: a run that was stopped before it was launched is launched by `attach` on all hosts. Red with the stop
    withdrawn on the first host alone."""
    hosts = make_hosts(2)
    config = str(write_config(laptop.project, target__hosts=2, output__mode="sft"))
    blocked = hosts[1].home / "launch.lock"
    blocked.mkdir(parents=True)
    assert laptop.deploy(config, *remotes(hosts), "--run-id", "later").returncode != 0
    blocked.rmdir()
    assert laptop.json("stop", "later")["state"] == "not launched"
    asked = [hosts_run(host, "later").stop_asked.exists() for host in hosts]
    assert asked == [True, True]
    done = laptop.deploy("attach", "later")
    assert done.returncode == 0, done.stdout + done.stderr
    quiet("later")


def test_a_run_goes_on_with_the_hosts_that_are_left(
    laptop: Laptop, lan: Network, make_hosts: Callable[[int], list[Host]], tmp_path: Path
) -> None:
    """Goal: one of three hosts loses its power: the two that are left go on from the last checkpoint, the third host
    with the second's rank, and each step stands once. Then that one dies, too: target.hosts_min ends the run, with its
    name, and nothing is left."""
    hosts = make_hosts(3)
    config = write_config(
        laptop.project,
        target__hosts=3,
        target__hosts_min=2,
        limits__restarts_max=2,
        output__mode="sft",
        sft__target_examples_per_step=24,
        sft__batch_size=4,
        rl__num_samples=6,
        env={"STAND_IN_WAIT": str(tmp_path / "never")},
    )
    deploying = laptop.start(str(config), *remotes(hosts), "--run-id", "dies")
    first, _, third = (hosts_run(host, "dies") for host in hosts)
    wait_for(first.latest_checkpoint("sft").exists, "the first checkpoint")
    wait_for(lambda: printed(third) == "stage=sft rank=2\n", "the third host's trainer")
    lan.kill(1)
    wait_for(
        lambda: printed(third) == "stage=sft rank=2\nstage=sft rank=1\n",
        "the third host's trainer, with another rank",
    )
    (left,) = [row for row in read_jsonl(first.events) if row["kind"] == "host_left"]
    assert (left["host"], left["hosts"]) == ("node1", ["node0", "node2"])
    (again,) = restarted(first)
    assert again["checkpoint"] == "checkpoints/sft/step_000001" and "node1" in again["reason"]
    killed_at = time.time()
    lan.kill(2)
    out, err = deploying.communicate(timeout=600)
    assert deploying.returncode == 1, out + err
    assert "node2" in out and "was not heard of for 15 s" in out
    assert "cannot go on with 1 of its hosts: target.hosts_min" in out
    quiet("dies")
    status = read_status(first)
    assert status is not None and status.state == "failed" and "node2" in status.message
    print(f"ended {status.updated_at - killed_at:.1f} s after the death")
    here = mirror(laptop, "dies")
    assert manifest_problems(here.checkpoints / "sft" / "step_000001") == ()
    assert [row["step"] for row in read_jsonl(here.metrics)] == [1]


@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_a_trainer_restarts_all_hosts(
    laptop: Laptop, make_hosts: Callable[[int], list[Host]], tmp_path: Path, killed: int
) -> None:
    """Goal: a trainer that is killed on either host costs one restart of the stage on both, from the checkpoint that
    the first has; each step stands once."""
    hosts, go = make_hosts(2), tmp_path / "go"
    wait = {"STAND_IN_WAIT": str(go)}
    changes = {"target__hosts": 2, "output__mode": "sft", "limits__restarts_max": 1}
    config = write_config(laptop.project, env=wait, **changes)
    deploying = laptop.start(str(config), *remotes(hosts), "--run-id", "again")
    runs = [hosts_run(host, "again") for host in hosts]
    wait_for(runs[0].latest_checkpoint("sft").exists, "step 1")
    wait_for(lambda: printed(runs[1]), "the second host's trainer")
    pid = json.loads(runs[killed].process("trainer").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(restarted(run) for run in runs), "the restart on both")
    go.touch()
    out, err = deploying.communicate(timeout=600)
    assert deploying.returncode == 0, out + err
    assert [row["step"] for row in read_jsonl(mirror(laptop, "again").metrics)] == [1, 2, 3]
    (first,), (second,) = (restarted(run) for run in runs)
    assert (first["step"], first["checkpoint"]) == (1, "checkpoints/sft/step_000001")
    assert f"node{killed}" in first["reason"] or (killed == 0 and "SIGKILL" in first["reason"])
    assert (second["step"], second["restarts_left"]) == (None, 0)
    quiet("again")


def restarted(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run.events) if row["kind"] == "stage_restarted"]


def test_stop_ends_all_hosts(
    laptop: Laptop, make_hosts: Callable[[int], list[Host]], tmp_path: Path
) -> None:
    """Goal: `deploy stop` ends a run on all of its hosts; so does the failure of one trainer. Resumed there, it
    starts from the checkpoint that lies there. Red with it sent there once more, and with the first host's samples
    alone."""
    hosts = make_hosts(2)
    go = tmp_path / "go"
    wait = {"STAND_IN_WAIT": str(go)}
    config = str(write_config(laptop.project, target__hosts=2, output__mode="sft", env=wait))
    assert laptop.deploy(config, *remotes(hosts), "--run-id", "long", "--detach").returncode == 0
    wait_for(lambda: read_jsonl(hosts_run(hosts[0], "long").metrics), "the first step")
    for rank, host in enumerate(hosts):
        # as the sampler does, which finds no ranks of torchrun here
        busy = [{"name": f"trainer-{rank}", "cpu": 1.0, "memory_gib": 0.5}]
        row = {"time": time.time(), "stage": "sft", "gpus": [], "processes": busy}
        append_jsonl(hosts_run(host, "long").gpu, row)
    watching = laptop.start("attach", "long", "--json", "--no-checkpoints")
    here = mirror(laptop, "long")
    there = RunDir(here.path / "hosts" / "1")
    wait_for(lambda: there.gpu.exists() and here.gpu.exists(), "how busy the hosts are")
    following = laptop.start("logs", "long", "-f")
    wait_for(lambda: there.log("trainer").exists(), "the second host's log, as it comes")
    assert laptop.json("stop", "long")["state"] == "stopped"
    rows = [json.loads(line) for line in watching.communicate(timeout=600)[0].splitlines()]
    shown = {row["host"] for row in rows if row.get("type") == "usage"}
    drawn = read_run(here.path).usage_by_host
    assert shown == {*drawn} == {"node0", "node1"} and all(drawn.values())
    (listed,), targets = laptop.json("ls"), [host.target for host in hosts]
    assert listed["hosts"] == laptop.json("status", "long")["hosts"] == targets
    assert f"{targets[0]} +1" in laptop.deploy("ls").stdout
    out, err = following.communicate(timeout=600)
    assert "node0: stage=sft step=1\n" in out and "node1: stage=sft rank=1\n" in out, out + err
    quiet("long")
    assert [status.state for host in hosts if (status := read_status(hosts_run(host, "long")))] == [
        "stopped"
    ] * 2
    go.touch()
    resumed = laptop.deploy("resume", "long", "--run-id", "on")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{hosts[0].run_path('long')}/checkpoints/sft/step_000002 is where" in resumed.stdout
    curves = [read_jsonl(mirror(laptop, name).metrics) for name in ("long", "on")]
    assert curves[1][: len(curves[0])] == curves[0]
    fail = {**wait, "STAND_IN_FAIL": "sft", "STAND_IN_FAIL_RANK": "1"}
    config = str(
        write_config(laptop.project, "fails", target__hosts=2, output__mode="sft", env=fail)
    )
    done = laptop.deploy(config, *remotes(hosts), "--run-id", "fails")
    assert done.returncode == 7 and "node1" in done.stdout, done.stdout + done.stderr
    for name in ("on", "fails"):
        quiet(name)


def test_what_keeps_hosts_from_one_job(
    laptop: Laptop, lan: Network, make_hosts: Callable[[int], list[Host]]
) -> None:
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
    assert (
        elsewhere.returncode == 2
        and "the other hosts of the job do not reach it" in elsewhere.stderr
    )


ENGINES_FAR = {"engine__hosts": [1], "engine__weight_sync": DiskSync(on_tmpfs=False)}


def test_the_death_of_a_host_that_only_serves(
    laptop: Laptop, lan: Network, make_hosts: Callable[[int], list[Host]], tmp_path: Path
) -> None:
    """Goal: the trainer's host ends, says which host died, and nothing is left; engines got the model of the first."""
    hosts = make_hosts(2)
    wait = {"STAND_IN_WAIT_IN": "rl", "STAND_IN_WAIT": str(tmp_path / "never")}
    config = write_config(laptop.project, env=wait, **ENGINES_FAR)
    deploying = laptop.start(str(config), *remotes(hosts), "--run-id", "dies")
    first, second = (hosts_run(host, "dies") for host in hosts)
    wait_for(lambda: any(row["stage"] == "rl" for row in read_jsonl(first.metrics)), "rl's steps")
    sent = second.weights / "start" / "model.safetensors"
    assert sent.read_bytes() == (first.checkpoints / "sft/latest/model.safetensors").read_bytes()
    assert not second.checkpoints.exists() and not second.log("trainer").exists()
    lan.kill(1)
    out, err = deploying.communicate(timeout=600)
    assert deploying.returncode == 1, out + err
    assert "node1" in out and "was not heard of for 15 s" in out
    quiet("dies")
    status = read_status(first)
    assert status is not None and status.state == "failed" and "node1" in status.message


def test_a_closed_port_is_named_before_the_run(
    laptop: Laptop, lan: Network, make_hosts: Callable[[int], list[Host]]
) -> None:
    """Goal: where a firewall leaves an engine's port closed, the plan names it."""
    hosts = make_hosts(2)
    config = write_config(laptop.project, **ENGINES_FAR)
    port = str(json.loads(config.read_text())["engine"]["sglang_port"])
    planned = laptop.deploy(str(config), *remotes(hosts), "--plan")
    assert planned.returncode == 0, planned.stderr
    assert "rl: engine-0: " in planned.stdout and f"--host {lan.address(1)}" in planned.stdout
    lan.close(0, port)
    closed = laptop.deploy(str(config), *remotes(hosts), "--plan")
    assert closed.returncode == 2, closed.stdout
    assert f"does not reach {lan.address(1)} (lan0), port {port}" in closed.stderr


def test_a_sweep_on_two_hosts(laptop: Laptop, make_hosts: Callable[[int], list[Host]]) -> None:
    """Goal: the runs of a sweep take place one after another, each on both hosts; what cannot be is refused with what
    can. Red with a sweep refused where several hosts are named, and with a look at the hosts for each run."""
    hosts = make_hosts(2)
    config = str(write_config(laptop.project, target__hosts=2, output__mode="sft"))
    words = [config, *remotes(hosts), "--set", "sft.matrix_lr=1e-3,2e-3"]
    for option, fix in (("--queue", "one after another even so"), ("--detach", "(in tmux, say)")):
        refused = laptop.deploy(*words, option)
        assert refused.returncode == 2 and fix in refused.stderr, refused.stderr
        assert "add --queue" not in refused.stderr
    planned = laptop.json(*words, "--plan")["runs"]
    targets = [host.target for host in hosts]
    assert [[plan["target"] for plan in run["plans"]] for run in planned] == [targets, targets]
    said = [(host.directory / "sshd.log").read_text() for host in hosts]
    # one look plans all runs: a login of deploy's own, and one that tries rsync's way
    assert [text.count("Accepted publickey") for text in said] == [2, 2], said
    done = laptop.deploy(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted((hosts[0].home / "runs").iterdir())
    logs = [(hosts[1].home / "runs" / run.name / "logs/trainer.log").read_text() for run in runs]
    assert logs == ["stage=sft rank=1\n"] * 2
    first, second = (read_jsonl(RunDir(run).events) for run in runs)
    first, second = sorted((first, second), key=lambda rows: rows[0]["time"])
    assert first[-1]["time"] < second[0]["time"]
    assert done.stdout.count("matrix_lr=0.001") and done.stdout.count("matrix_lr=0.002")
    for run in runs:
        quiet(run.name)
