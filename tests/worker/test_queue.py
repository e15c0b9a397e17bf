"""The host's queue with real tmux and supervisors: who comes first, and that nobody dead is waited for."""

import dataclasses
import itertools
import json
import os
import random
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rollouts.run_dir import (
    LaunchPlan,
    NamedGpu,
    QueueSpec,
    RunDir,
    SmokeCheck,
    observe,
    read_status,
)
from rollouts.worker.claims import LiveRun
from rollouts.worker.supervise.other_cards import placed
from rollouts.worker.supervise.turn import Choice, Obstacle, choose
from rollouts.worker.tickets import in_line
from tests.ports import free_port
from tests.worker.stands import (
    Host,
    as_status,
    events,
    module,
    process,
    recorded_pid,
    script,
    stage,
    wait_for,
    wait_for_end,
)

ONE = QueueSpec(cards=[], at_once=1, ports=[])
TURNS = """
import os, pathlib, sys, time
with open(sys.argv[1] + "/order", "a") as order:
    order.write(os.environ["ROLLOUTS_RUN_ID"] + " " + os.environ.get("ROLLOUTS_GPUS", "") + "\\n")
while not pathlib.Path(sys.argv[1], os.environ["ROLLOUTS_RUN_ID"]).exists() and len(sys.argv) > 2: time.sleep(0.02)
"""


def turn(directory: Path, *, holds: bool = False, env: dict[str, str] | None = None) -> Any:
    """A stage whose trainer notes its run's turn; `holds`: until a file of the run's name is in `directory`."""
    return stage(
        "sft",
        process("trainer", script(TURNS, str(directory), *(["holds"] if holds else [])), env=env),
    )


def order(directory: Path) -> list[str]:
    file = directory / "order"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def queued(run: RunDir) -> bool:
    status = read_status(run)
    return status is not None and status.state == "queued"


def queued_behind(run: RunDir, text: str) -> bool:
    status = read_status(run)
    return status is not None and status.state == "queued" and text in status.message


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_is_kept_whoever_dies(host: Host, tmp_path: Path, seed: int) -> None:
    """Goal: two that launch at once wait in one line; whoever of it is killed or stopped, the first among them, the
    others come in their order, one at a time. Red with tickets of the dead counted: nobody's turn came."""
    chance = random.Random(seed)
    holder = host.start(turn(tmp_path, holds=True), queue=ONE)
    wait_for(lambda: order(tmp_path) == [holder.run_id], "the holder's turn")
    with ThreadPoolExecutor(2) as laptops:
        runs = list(laptops.map(lambda _: host.start(turn(tmp_path), queue=ONE), range(5)))
    wait_for(lambda: len(in_line(host.home)) == 5, "five tickets")
    line = [ticket.run_id for ticket in in_line(host.home)]
    assert sorted(line) == sorted(run.run_id for run in runs)
    by_name = {run.run_id: run for run in runs}
    for place, run_id in enumerate(line, 1):
        wait_for(partial(queued_behind, by_name[run_id], f"place {place} of 5"), "its place")
    ended = {line[0], *chance.sample(line[1:], 2)}
    for run_id in chance.sample(sorted(ended), 3):
        if chance.random() < 0.7:
            os.kill(recorded_pid(by_name[run_id], "supervisor"), signal.SIGKILL)
        else:
            assert (
                json.loads(module("stop", str(by_name[run_id].path)).stdout)["state"] == "stopped"
            )
    (tmp_path / holder.run_id).touch()
    left = [run_id for run_id in line if run_id not in ended]
    for run_id in left:
        wait_for_end(by_name[run_id])
    assert order(tmp_path) == [holder.run_id, *left]
    spans = [
        [row["time"] for row in events(by_name[run_id]) if row["kind"] in ("turn", "run_ended")]
        for run_id in left
    ]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert {observe(by_name[run_id]).state for run_id in ended} <= {"died", "stopped"} and in_line(
        host.home
    ) == []


def test_so_many_at_once_as_is_said(host: Host, tmp_path: Path) -> None:
    """Goal: with at_once=2 two run side by side and the third waits for either; a stop takes a waiter out. Red with
    the plan's queue part kept once the turn had come."""
    two = QueueSpec(cards=[], at_once=2, ports=[])
    first, second, third, fourth = (
        host.start(turn(tmp_path, holds=True), queue=two) for _ in range(4)
    )
    wait_for(lambda: sorted(order(tmp_path)) == sorted([first.run_id, second.run_id]), "two turns")
    wait_for(
        lambda: (
            queued_behind(third, "at most 2 at once")
            and second.run_id in as_status(third)["message"]
        ),
        "its place",
    )
    wait_for(
        lambda: queued_behind(
            fourth, f"place 2 of 2 in the host's queue, waits for run {third.run_id}"
        ),
        "its place",
    )
    assert json.loads(module("stop", str(third.path)).stdout) == {
        "state": "stopped",
        "exit_code": 143,
    }
    assert [row["kind"] for row in events(third)] == ["queued", "stop_asked", "run_ended"]
    (tmp_path / second.run_id).touch()
    wait_for(lambda: fourth.run_id in order(tmp_path), "the fourth's turn")
    assert observe(first).state == "running"
    for run in (first, fourth):
        (tmp_path / run.run_id).touch()
        wait_for_end(run)


def test_a_plan_on_other_cards_and_ports() -> None:
    """Goal: environments, command lines and URLs name the new cards and ports, a number that is none stays, and the
    smoke test of one card does not count for another. Red with any of these left as it was."""
    env = {"ROLLOUTS_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1", "OMP_NUM_THREADS": "1"}
    by_index = {"ROLLOUTS_GPUS": "1", "CUDA_VISIBLE_DEVICES": "1"}
    argv = [
        "python",
        "--port",
        "21000",
        "--max-total-tokens",
        "21000",
        "--worker-urls",
        "http://127.0.0.1:21001",
    ]
    engine = process("engine-0", argv, env=by_index, ready_url="http://127.0.0.1:21000/ready")
    smoke = SmokeCheck(
        process=process("smoke", ["x"], env=env),
        timeout_s=1.0,
        marker="/e/.smoke-ab",
        subject="GPU 0 (H200), GPU 1 (H200)",
    )
    plan = plan_of(
        stage(
            "rl",
            process("trainer", ["t", "--engine-url", "http://127.0.0.1:21000"], env=env),
            engine,
        )
    )
    cards = {0: NamedGpu(index=1, uuid="GPU-1"), 1: NamedGpu(index=3, uuid="GPU-3")}
    ready = placed(
        dataclasses.replace(plan, smoke=[smoke], queue=ONE), cards, {21000: 22000, 21001: 22001}
    )
    rl, (check,) = ready.stages[0], ready.smoke
    assert rl.trainer.env == {**env, "ROLLOUTS_GPUS": "1,3", "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-3"}
    assert (
        rl.trainer.argv[-1] == "http://127.0.0.1:22000"
        and rl.engines[0].env["CUDA_VISIBLE_DEVICES"] == "3"
    )
    assert rl.engines[0].argv == ["python", "--port", "22000", *argv[3:6], "http://127.0.0.1:22001"]
    assert rl.engines[0].ready_url == "http://127.0.0.1:22000/ready" and ready.queue is None
    assert check.subject == "GPU 1 (H200), GPU 3 (H200)" and check.marker != smoke.marker
    assert check.marker.startswith("/e/.smoke-") and placed(plan, {}, {}) == plan


def test_ports_at_the_turn(tmp_path: Path) -> None:
    """Goal: a port that the config names is waited for, whoever has it; one that the host chose is chosen anew. Red
    with the launch's port kept, which a live run has by now."""

    def asked(port: int, chosen: list[int]) -> tuple[LaunchPlan, QueueSpec]:
        spec = process("engine-0", ["x"], ready_url=f"http://127.0.0.1:{port}/ready")
        return plan_of(stage("rl", process("trainer", ["t"]), spec)), QueueSpec(
            cards=[], at_once=9, ports=chosen
        )

    other = LiveRun(RunDir(tmp_path / "other"), asked(port := free_port(), [])[0], 0.0)
    assert choose(*asked(port, [port]), [], {}) == Choice({}, {})
    new = choose(*asked(port, [port]), [other], {})
    assert isinstance(new, Choice) and new.ports[port] != port
    held = choose(*asked(port, []), [other], {})
    assert isinstance(held, Obstacle) and held.text.startswith(f"port {port} (run other since")
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        found = choose(*asked(port, []), [], {})
        assert (
            isinstance(found, Obstacle) and found.text == f"port {port} (something listens there)"
        )


def plan_of(*stages: Any) -> LaunchPlan:
    """A plan of these stages that nobody launches."""
    return LaunchPlan(
        run_id="r",
        experiment_name="e",
        home="/h",
        run_path="/h/runs/r",
        base_python="python3",
        environments=[],
        stages=list(stages),
        bootstrap_timeout_s=1.0,
        stop_grace_s=1.0,
        engine_restarts_max=0,
        engine_hang_timeout_s=1.0,
    )


NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *--query-gpu*) for i in 0 1; do echo "$i, GPU-$i, NVIDIA H200, 143771, 143000"; done ;;
  *) [ -e {busy} ] && cat {busy} ;;
esac
exit 0
"""


@pytest.fixture
def gpu_host(host: Host, tmp_path: Path) -> Callable[..., RunDir]:
    """Launch queued runs for one of the two GPUs that a stand-in nvidia-smi lists; `busy` has its compute processes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(NVIDIA_SMI.format(busy=tmp_path / "busy"))
    (tools / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}

    def start(cards: list[int]) -> RunDir:
        spec = QueueSpec(
            cards=[NamedGpu(index=i, uuid=f"GPU-{i}") for i in cards], at_once=1, ports=[]
        )
        env = {"ROLLOUTS_GPUS": "0", "CUDA_VISIBLE_DEVICES": "GPU-0"}
        job = host.job(turn(tmp_path, holds=True, env=env), queue=spec)
        done = host.launch(job, env=environment)
        assert done.returncode == 0, done.stderr
        return RunDir(Path(job["plan"]["run_path"]))

    return start


def test_gpus_are_shared_out(gpu_host: Callable[..., RunDir], host: Host, tmp_path: Path) -> None:
    """Goal: a stranger's GPU is left alone, with its process, owner and start in the message; runs take the free ones,
    each its own, and one that named its card waits for that. Red with nvidia-smi not asked."""
    (tmp_path / "busy").write_text(f"GPU-0, {os.getpid()}, 5000, python\n")
    one = gpu_host([0, 1])
    wait_for(lambda: order(tmp_path) == [one.run_id], "its turn")
    assert (tmp_path / "order").read_text() == f"{one.run_id} 1\n"
    assert events(one, "turn")[0]["has"] == ["GPU 1"]
    assert (
        json.loads(one.plan.read_text())["stages"][0]["trainer"]["env"]["CUDA_VISIBLE_DEVICES"]
        == "GPU-1"
    )
    two, named = gpu_host([0, 1]), gpu_host([1])
    wait_for(
        lambda: queued_behind(two, f"GPU 0 (pid {os.getpid()} python of "), "the stranger's name"
    )
    assert (
        f"1 of the GPUs GPU 0 (pid {os.getpid()}" in as_status(two)["message"]
        and one.run_id in as_status(two)["message"]
    )
    plain = host.job(turn(tmp_path, env={"ROLLOUTS_GPUS": "0"}))
    refused = json.loads(host.launch({**plain, "launch_id": "x"}).stdout)
    assert (
        not refused["started"]
        and f"run {two.run_id} waits in the host's queue for GPU 0" in refused["reason"]
    )
    (tmp_path / "busy").unlink()
    wait_for(lambda: order(tmp_path) == [one.run_id, two.run_id], "the second's turn")
    assert (tmp_path / "order").read_text().splitlines()[1] == f"{two.run_id} 0"
    wait_for(
        lambda: queued_behind(
            named, f"place 1 of 1 in the host's queue, waits for GPU 1 (run {one.run_id}"
        ),
        "it",
    )
    (tmp_path / one.run_id).touch()
    wait_for(lambda: named.run_id in order(tmp_path), "the third's turn")
    for run in (two, named):
        (tmp_path / run.run_id).touch()
        wait_for_end(run)
