"""`deploy ui --remote`: the runs of a host over a real sshd, followed into a mirror while one looks."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import httpx

from rollouts.run_dir import RunDir, Status, append_jsonl, hold_lock, write_json_atomic
from tests.remote.hosts import WAIT_S, Host, Laptop, wait_for
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
    laptop: Laptop, make_host: Callable[..., Host]
) -> None:
    """Goal: a run that another machine started is listed, shown, and grows here as it does there; neither the host nor
    the registry here is changed; Ctrl-C leaves no process on either side."""
    host = make_host()
    run = live_run(host, "theirs")
    lock = hold_lock(run)
    assert lock is not None
    before = content(run.path)
    process = laptop.start("ui", "--remote", host.target, "--json")
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    link = json.loads(line)["link"]
    with httpx.Client(base_url=link.partition("/?")[0], timeout=120, trust_env=False) as client:
        client.get(link)
        listed = client.get("/api/runs").json()
        assert (listed["title"], [row["run_id"] for row in listed["runs"]]) == (
            host.target,
            ["theirs"],
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
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, error) == (0, "", "")
    assert {
        name: text
        for name, text in content(run.path).items()
        if name in before and "jsonl" not in name
    } == {name: text for name, text in before.items() if "jsonl" not in name}
    assert set(content(run.path)) == set(before)
    assert list(laptop.rollouts_home.glob("registry/*.json")) == []
    assert not (laptop.project / "runs").exists()
    wait_for(lambda: not followers(run), "no follower on the host")
    lock.close()


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
