"""`deploy ui --remote`: the runs of a host over a real sshd, followed into a mirror while one looks."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from rollouts.remote.run import registry
from rollouts.remote.run.registry import RunEntry
from rollouts.run_dir import (
    GroupHost,
    HostGroup,
    RunDir,
    Status,
    append_jsonl,
    hold_lock,
    write_json_atomic,
)
from tests.remote.hosts import WAIT_S, Host, Laptop, wait_for
from tests.remote.test_gone_runs import launch_plan
from tests.view.runs import START, rl_row, rollout_row, write_run


def live_run(host: Host, run_id: str) -> RunDir:
    run = write_run(host.run_path(run_id), steps=3)
    status = Status(
        run_id=run_id,
        experiment_name="cpu_sft_rl",
        state="running",
        stage="rl",
        message="training",
        started_at=START,
        updated_at=START,
        exit_code=None,
    )
    write_json_atomic(run.status, status)
    write_json_atomic(run.launch, {"launch_id": "there", "host": {}})
    return run


def content(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


def test_a_hosts_run_is_followed_and_left_alone(
    laptop: Laptop, make_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a run that another machine started is listed, shown, and grows here as it does there; neither the host nor
    the registry here is changed; Ctrl-C leaves no process on either side. Of a run on several hosts that was started
    here all are shown. Red with the first host followed alone, and with what was read kept
    until the first host's metrics grow."""
    host, second = make_host(), make_host()
    run = live_run(host, "theirs")
    monkeypatch.setenv("ROLLOUTS_HOME", str(laptop.rollouts_home))
    runs = [run, *run_on_hosts({"one": host, "two": second}, laptop.home / "ours")]
    locks = [hold_lock(each) for each in runs]
    assert None not in locks
    before = content(run.path)
    process = laptop.start("ui", "--remote", host.target, "--json")
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    link = json.loads(line)["link"]
    with httpx.Client(base_url=link.partition("/?")[0], timeout=120, trust_env=False) as client:
        client.get(link)
        listed = client.get("/api/runs").json()
        assert (listed["title"], {row["run_id"] for row in listed["runs"]}) == (
            host.target,
            {"theirs", "ours"},
        )
        shown = client.get("/api/runs/theirs").json()
        assert (shown["step"], shown["state"], shown["remarks"]) == (3, "running", [])
        assert ["rl.sampling.seed", "0"] in shown["config"]
        append_jsonl(run.metrics, rl_row(4, 4, 0.5, random.Random(0)))
        append_jsonl(run.rollouts, rollout_row(4, 0, random.Random(0), 4))
        wait_for(lambda: client.get("/api/runs/theirs").json()["step"] == 4, "the new step")
        wait_for(
            lambda: client.get("/api/runs/theirs/samples").json()["index"]["count"] == 25,
            "the new sample",
        )
        assert client.get("/runs/none").status_code == 404
        asked = {"run": "ours", "stage": "rl", "name": "chart:usage"}

        def shown_hosts() -> set[str]:
            answer = client.get("/api/chart", params=asked)
            points = answer.json()["datasets"]["usage"] if answer.status_code == 200 else []
            return {point["name"].split()[0] for point in points}

        wait_for(lambda: shown_hosts() == {"one", "two"}, "how busy both hosts are")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, error) == (0, "", "")
    assert {
        name: text
        for name, text in content(run.path).items()
        if name in before and "jsonl" not in name
    } == {name: text for name, text in before.items() if "jsonl" not in name}
    assert set(content(run.path)) == set(before)
    assert [file.name for file in laptop.rollouts_home.glob("registry/*.json")] == ["ours.json"]
    assert not (laptop.project / "runs").exists()
    for each, lock in zip(runs, locks, strict=True):
        wait_for(lambda each=each: not followers(each), "no follower on the host")
        assert lock is not None
        lock.close()


def run_on_hosts(hosts: Mapping[str, Host], local_dir: Path) -> list[RunDir]:
    """Register a run on these hosts, and write what each of them has of it, with a row of usage."""
    first, *others = hosts.values()
    named = [
        GroupHost(target=host.target, name=name, address="127.0.0.1", interface="lo")
        for name, host in hosts.items()
    ]
    group = HostGroup(rank=0, hosts=named, supervisor_port=1, trainer_port=2)
    python = str(shutil.which("python3", path=first.environment["PATH"]))
    plan = replace(launch_plan(first.home, "ours"), group=group, base_python=python)
    entry = RunEntry(
        run_id="ours",
        experiment_name="cpu_sft_rl",
        target=first.target,
        home=str(first.home),
        run_path=str(first.run_path("ours")),
        local_dir=str(local_dir),
        repository="/",
        created_at=START,
        launch_id="there",
        others=[
            {"target": o.target, "home": str(o.home), "run_path": str(o.run_path("ours"))}
            for o in others
        ],
    )
    registry.save(entry)
    entry.record.path.mkdir()
    for name in ("plan.json", "plan-1.json"):
        write_json_atomic(entry.record.path / name, plan)
    runs = [live_run(host, "ours") for host in hosts.values()]
    busy = [{"name": "trainer", "cpu": 1.0, "memory_gib": 0.5}]
    for run in runs:
        write_json_atomic(run.plan, plan)
        append_jsonl(run.gpu, {"time": START, "stage": "rl", "gpus": [], "processes": busy})
    return runs


def followers(run: RunDir) -> list[str]:
    """Return the processes whose command line names the run."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                command = Path(entry.path, "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(run.path) in command:
                found.append(entry.name)
    return found
