"""The host's queue from the real command, over a real sshd: --queue, --wait, detach, attach, stop, two laptops."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.machine.nvidia_smi import GpuProcess
from rollouts.remote.plan import Plan, QueueWish, make_plan
from rollouts.run_dir import RunDir, read_jsonl, read_status
from tests.example_config import example_config, replace_at
from tests.remote.hosts import WAIT_S, Host, Laptop, make_laptop, wait_for, write_config
from tests.remote.test_plan import BUSY, CODE, CUDA, FACTS, H200, SECOND
from tests.remote.test_sweep import RATES, runs_of
from tests.remote.test_whole_runs import assert_complete, mirror, quiet


def state_on(host: Host, run_id: str) -> str:
    status = read_status(RunDir(host.run_path(run_id)))
    return "" if status is None else f"{status.state}: {status.message}"


def test_a_sweep_in_the_queue(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Goal: all runs are sent at once and the command is gone; they run one after another; the table comes later, with
    -f at their end."""
    host, go = make_host(), tmp_path / "go"
    config = str(write_config(laptop.project, output__mode="sft", env={"STAND_IN_WAIT": str(go)}))
    sent = laptop.deploy(config, *RATES, "--queue", "--detach", "--remote", host.target)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert (
        f"2 of 2 runs are in the queue of {host.target}, also when this machine is off."
        in sent.stdout
    )
    one, two = (run.run_id for run in runs_of(laptop))
    wait_for(lambda: state_on(host, one).startswith("running"), "the first's turn")
    expected = f"queued: place 1 of 1 in the host's queue, waits for run {one} since"
    wait_for(lambda: state_on(host, two).startswith(expected), "the second's place")
    listed = laptop.deploy("ls", "--remote", host.target).stdout
    assert f"\n  note: place 1 of 1 in the host's queue, waits for run {one}" in listed
    now = laptop.deploy("sweep", "last")
    assert [line.split()[2] for line in now.stdout.splitlines()[-2:]] == ["running", "queued"], (
        now.stdout + now.stderr
    )
    go.touch()
    done = laptop.deploy("sweep", one, "-f")
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split()[:5] for line in done.stdout.splitlines()[-2:]]
    assert table == [
        [one, "matrix_lr=1e-06", "done", "sft", "3"],
        [two, "matrix_lr=3e-06", "done", "sft", "3"],
    ]
    ends, turns = read_jsonl(mirror(laptop, one).events), read_jsonl(mirror(laptop, two).events)
    assert ends[-1]["time"] <= next(row["time"] for row in turns if row["kind"] == "turn")
    quiet(two)


def test_waiting_for_a_turn(
    laptop: Laptop, make_host: Callable[..., Host], shared: Path, tmp_path: Path
) -> None:
    """Goal: --wait queues behind a live run; Ctrl-C says that the run stays queued; another laptop's comes behind it,
    and leaves by `stop`; `attach` follows from queued to done, and everything is pulled."""
    host, go = make_host(), tmp_path / "go"
    holds = str(
        write_config(laptop.project, "holds", output__mode="sft", env={"STAND_IN_WAIT": str(go)})
    )
    assert (
        laptop.deploy(holds, "--remote", host.target, "--run-id", "first", "--detach").returncode
        == 0
    )
    config = str(write_config(laptop.project))
    words = [config, "--wait", "--remote", host.target, "--run-id", "second"]
    with (said := tmp_path / "said").open("w") as stream:
        following = laptop.start(*words, start_new_session=True, stdout=stream)
    turn = "queued place=1 waits_for=run first since"
    wait_for(lambda: turn in said.read_text() or following.poll() is not None, "its place, told")
    other = make_laptop(tmp_path / "other", laptop.project, laptop.tmux_dir)
    for name in ("", ".pub"):
        shutil.copy(f"{shared}/key{name}", f"{other.key}{name}")
    other.know(host)
    behind = other.deploy(
        config, "--wait", "--remote", host.target, "--run-id", "third", "--detach"
    )
    assert behind.returncode == 0 and "third is in the queue of" in behind.stdout, (
        behind.stdout + behind.stderr
    )
    wait_for(
        lambda: state_on(host, "third").startswith("queued: place 2 of 2"), "the third behind it"
    )
    os.killpg(following.pid, signal.SIGINT)
    _, err = following.communicate(timeout=WAIT_S)
    out = said.read_text()
    assert following.returncode == 130 and turn in out, out + err
    assert f"detached. second stays queued on {host.target}: place 1 of" in out, out
    assert laptop.json("status", "second")["state"] == "queued"
    assert other.json("stop", "third")["state"] == "stopped"
    quiet("third")
    go.touch()
    done = laptop.deploy("attach", "second")
    assert done.returncode == 0 and "second: done, exit code 0" in done.stdout, (
        done.stdout + done.stderr
    )
    assert_complete(mirror(laptop, "second"), host.run_path("second"))
    assert laptop.deploy("attach", "first").returncode == 0


def queue_plan(wish: QueueWish | None, gpus: tuple[Any, ...], **changes: Any) -> Plan:
    config = example_config()
    for path, value in {**CUDA, **changes}.items():
        config = replace_at(config, path.replace("__", "."), value)
    assert config.engine is not None
    facts = dataclasses.replace(
        FACTS, gpus=gpus, free_port=21_000, ports_in_use=(config.engine.sglang_port,)
    )
    there: dict[str, Any] = {
        "target": "gpu-7",
        "run_id": "r1",
        "local_dir": "/here",
        "secrets_set": [],
    }
    return make_plan(config, facts, CODE, **there, queue=wish)


OTHER = dataclasses.replace(SECOND, name="NVIDIA L4", index=2, uuid="GPU-c")
ANY, NAMED = QueueWish(any_gpus=True, at_once=3), QueueWish(any_gpus=False)


@pytest.mark.parametrize(
    ("wish", "changes", "cards"),
    [
        (ANY, {}, [0, 1]),
        (NAMED, {}, [0]),
        (ANY, {"host__env": {"CUDA_VISIBLE_DEVICES": "0"}}, [0]),
        (ANY, {"target__gpu_ranks": [2], "engine__gpu_ranks": [2]}, [2]),
    ],
    ids=["any that is like it", "those that are named", "those of host.env", "no other is like it"],
)
def test_what_a_queued_run_may_take(
    wish: QueueWish, changes: dict[str, Any], cards: list[int]
) -> None:
    """Goal: a busy GPU and a port in use are waited for, and the plan says so; --queue takes any card like the planned
    ones, --wait the named ones. Red with every card of the host, and with the port still a problem."""
    plan = queue_plan(wish, (BUSY, SECOND, OTHER), **changes)
    assert plan.problems == () and plan.launch is not None and plan.launch.queue is not None
    queue = plan.launch.queue
    assert [card.index for card in queue.cards] == cards and queue.at_once == wish.at_once
    assert any(note.startswith("in the host's queue it waits for") for note in plan.notes), (
        plan.notes
    )
    assert type(plan.launch).from_json(json.loads(json.dumps(plan.launch.to_json()))) == plan.launch


def test_free_ports_of_a_queued_run() -> None:
    """Goal: ports that the host chose may be others at the turn; the plan without a queue has no such field, as earlier
    versions read it. Red with the 0 replaced before it was asked for."""
    plan = queue_plan(ANY, (H200,), engine__sglang_port=0)
    assert (
        plan.launch is not None
        and plan.launch.queue is not None
        and plan.launch.queue.ports == [21_000]
    )
    alone = queue_plan(None, (H200,), engine__sglang_port=0).launch
    assert alone is not None and "queue" not in alone.to_json()


def test_a_busy_gpu_names_owner_and_time() -> None:
    """Goal: without --wait the error says whose process it is, for how long, and that --wait queues. Red with the name
    alone."""
    config = replace_at(example_config(), "target.device_type", "cuda")
    held = GpuProcess(
        gpu_uuid="GPU-a",
        pid=4711,
        memory_mib=9,
        name="python",
        owner="ann",
        running_for="1-02:13:04",
    )
    facts = dataclasses.replace(FACTS, gpus=(BUSY,), gpu_processes=(held,))
    there: dict[str, Any] = {
        "target": "gpu-7",
        "run_id": "r1",
        "local_dir": "/here",
        "secrets_set": [],
    }
    (problem,) = make_plan(config, facts, CODE, **there).problems
    assert (
        "pid 4711 python, 9 MiB, of ann for 1-02:13:04" in problem.found
        and "--wait queues" in problem.fix
    )


REFUSED = [
    (["--wait", "--queue"], "--wait and --queue: one of the two"),
    (["--at-once", "2"], "--at-once 2 has no effect without a queue"),
    (["--wait", "--busy-ok"], "--busy-ok starts beside what uses a GPU"),
    (["--queue", *RATES, "--run-id", "x"], "--run-id x with a sweep"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[says[:25] for _, says in REFUSED])
def test_options_that_contradict(laptop: Laptop, options: list[str], says: str) -> None:
    """Goal: each ends with one message, and nothing is started."""
    done = laptop.deploy(str(write_config(laptop.project)), *options)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    missing = laptop.deploy("sweep", "nothing")
    assert missing.returncode == 2 and "'nothing' names no sweep of this machine" in missing.stderr
