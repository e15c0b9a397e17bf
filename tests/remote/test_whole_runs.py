"""Whole runs from the real command: local and over a real sshd, with the real worker; only torch is stood in for.

Every run ends with nothing of it left on the host: `quiet` looks for its processes and its tmux session.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.manifest import manifest_problems
from rollouts.run_dir import RunDir, is_live, read_jsonl
from tests.remote.hosts import WAIT_S, Host, Laptop, wait_for, write_config
from tests.run_processes import processes_of


def mirror(laptop: Laptop, run_id: str) -> RunDir:
    return RunDir(laptop.project / "runs" / "example" / run_id)


def quiet(run_id: str) -> None:
    wait_for(lambda: not processes_of(run_id), f"the end of all processes of {run_id}")


def started(laptop: Laptop, run_id: str, step: int) -> None:
    """Wait until the mirror holds the metrics of `step`."""
    wait_for(
        lambda: any(r["step"] >= step for r in read_jsonl(mirror(laptop, run_id).metrics)),
        f"step {step}",
    )


def printed(run: RunDir) -> None:
    """Wait until the trainer's first step, which its metrics have, is in its log as well."""
    wait_for(
        lambda: run.log("trainer").exists() and "step=1\n" in run.log("trainer").read_text(),
        "the first line of its log",
    )


def assert_complete(run: RunDir, host_path: Path) -> None:
    """The mirror holds exactly what the host holds, and every checkpoint is whole."""
    for name in (
        "events.jsonl",
        "metrics.jsonl",
        "eval.jsonl",
        "status.json",
        "logs/trainer.log",
        "exit/sft-trainer.json",
    ):
        assert (run.path / name).read_bytes() == (host_path / name).read_bytes(), name
    named = [row["path"] for row in read_jsonl(run.events) if row["kind"] == "checkpoint"]
    assert len(named) == 4
    for path in named:
        assert manifest_problems(run.path / path) == ()
    assert (run.checkpoints / "rl" / "latest").resolve().name == "step_000003"
    assert not (run.path / "secrets.json").exists() and not (run.path / "code" / "tree").exists()


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_run_from_config_to_results(
    where: str, laptop: Laptop, make_host: Callable[..., Host]
) -> None:
    """Goal: one command goes from config to verified results, here and over SSH.

    Red with checkpoints left under their hidden name, and (the logs of a silent window) with the windows of log files
    alone: "has no window 'engine-0'".
    """
    config = str(write_config(laptop.project))
    host = make_host() if where == "remote" else None
    remote = ["--remote", host.target] if host else []
    done = laptop.deploy(config, *remote, "--run-id", "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    home = host.home if host else laptop.rollouts_home
    assert_complete(mirror(laptop, "whole"), home / "runs" / "whole")
    for line in (
        "sft step=3/3",
        "rl step=3/3 loss=0.3333 reward_mean=0.3",
        "whole: done, exit code 0",
    ):
        assert line in done.stdout
    table = done.stdout[done.stdout.rindex("base") :].splitlines()
    assert table[0].split() == ["base", "sft", "rl"]
    assert table[1].split() == ["exact_match", "0.2500", "0.7500", "0.7500"]
    quiet("whole")
    row = laptop.json("ls")[0]
    assert {**row, "started_at": 0} == {
        "run_id": "whole",
        "experiment_name": "example",
        "target": host.target if host else "local",
        "state": "done",
        "stage": "rl",
        "step": 3,
        "started_at": 0,
        "exit_code": 0,
        "message": "all stages done",
        "host": None,
        "tags": [],
    }
    again = laptop.deploy("attach", "whole")
    assert again.returncode == 0 and "whole: done, exit code 0" in again.stdout
    assert "step=1/3" not in again.stdout, "rows that were seen before are shown again"
    if host is None:
        # this stand-in prints nothing
        silent = laptop.deploy("logs", "whole", "--window", "engine-0")
        assert (silent.returncode, silent.stdout) == (
            0,
            "",
        ) and "engine-0 has printed nothing" in silent.stderr


def test_the_second_run_builds_and_sends_nothing_again(
    laptop: Laptop, make_host: Callable[..., Host]
) -> None:
    """Goal: unchanged environment is reused, unchanged files are linked. Red with --link-dest left out."""
    host = make_host()
    config = str(write_config(laptop.project, output__mode="sft"))
    for run_id in ("first", "second"):
        assert laptop.deploy(config, "--remote", host.target, "--run-id", run_id).returncode == 0
    actions = [
        e["action"]
        for e in read_jsonl(mirror(laptop, "second").events)
        if e["kind"] == "environment"
    ]
    assert actions == ["reused"]
    files = [host.run_path(r) / "code/tree/rollouts/run_dir/layout.py" for r in ("first", "second")]
    assert files[0].stat().st_ino == files[1].stat().st_ino


def test_a_failing_trainer(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: the job's exit code and the last 50 log lines arrive. Red with log_tail not printed."""
    host = make_host()
    config = str(write_config(laptop.project, env={"STAND_IN_FAIL": "rl"}))
    done = laptop.deploy(config, "--remote", host.target, "--run-id", "fails")
    assert done.returncode == 7
    assert "fails: failed, exit code 7" in done.stdout
    quoted = [line for line in done.stdout.splitlines() if line.startswith("  | line")]
    assert len(quoted) >= 45 and quoted[-1] == "  | line 59 of a failing trainer"
    assert manifest_problems(mirror(laptop, "fails").checkpoints / "sft" / "step_000003") == ()
    quiet("fails")
    assert laptop.deploy("attach", "fails").returncode == 7


def test_json_of_a_followed_run(laptop: Laptop) -> None:
    """Goal: one object a line, the result last. Red with the table printed in JSON mode."""
    done = laptop.deploy(str(write_config(laptop.project)), "--json", "--run-id", "j")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = {row["type"] for row in rows} - {"usage"}  # of a run that takes some seconds
    assert kinds == {"progress", "event", "metrics", "eval", "result"}
    assert (
        rows[-1]["type"] == "result" and rows[-1]["exit_code"] == 0 and rows[-1]["state"] == "done"
    )
    assert [r["step"] for r in rows if r["type"] == "metrics" and r["stage"] == "rl"] == [1, 2, 3]


def test_detach_look_stop_and_pull(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Goal: every verb on a live run over SSH; stop also where an earlier version of this program started it. Red with
    `stop` that returns before the processes end, and with a plan of other fields not read."""
    host, go = make_host(), tmp_path / "go"
    config = str(write_config(laptop.project, env={"STAND_IN_WAIT": str(go)}))
    done = laptop.deploy(config, "--remote", host.target, "--run-id", "live", "--detach")
    assert (
        done.returncode == 0
        and "deploy attach live" in done.stdout
        and "deploy stop live" in done.stdout
    )
    wait_for(lambda: read_jsonl(RunDir(host.run_path("live")).metrics), "the first step")
    printed(RunDir(host.run_path("live")))
    status = laptop.json("status", "live")
    assert (status["state"], status["stage"], status["step"]) == ("running", "sft", 1)
    assert laptop.deploy("logs", "live").stdout == "stage=sft step=1\n"
    assert laptop.json("logs", "live", "--window", "trainer")["text"] == "stage=sft step=1\n"
    no_window = laptop.deploy("logs", "live", "--window", "nope")
    assert no_window.returncode == 1 and "supervisor, trainer" in no_window.stderr
    second = laptop.deploy(config, "--remote", host.target, "--run-id", "other")
    assert second.returncode == 2 and "the live run live will use port" in second.stderr
    assert "0: free ones" in second.stderr and "Nothing was started." in second.stderr
    assert not host.run_path("other").exists()
    told = laptop.deploy("pull", "live").stdout
    # that of the first step may have come
    assert "live (live) is in" in told and told.endswith(
        ("with 0 checkpoints\n", "with 1 checkpoint\n")
    )
    plan = mirror(laptop, "live").plan
    earlier = {
        name: value
        for name, value in json.loads(plan.read_text()).items()
        if name != "engine_restarts_max"
    }
    plan.write_text(json.dumps(earlier))
    assert laptop.json("stop", "live")["state"] == "stopped"
    quiet("live")
    assert not is_live(RunDir(host.run_path("live")))
    assert laptop.json("ls", "--remote", host.target)[0]["state"] == "stopped"
    pulled = laptop.json("pull", "live")
    assert pulled["state"] == "stopped" and len(pulled["checkpoints"]) == 2  # stop had it save one
    ended = laptop.deploy("attach", "live")
    assert ended.returncode == 143 and "error: stopped" in ended.stdout


def test_logs_follow_to_the_end(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: `logs -f` shows every byte of the window once, then ends. Red with the mirror's bytes not shown first."""
    go, shown = tmp_path / "go", tmp_path / "shown"
    config = str(write_config(laptop.project, env={"STAND_IN_WAIT": str(go)}))
    assert laptop.deploy(config, "--run-id", "tailed", "--detach").returncode == 0
    printed(RunDir(laptop.rollouts_home / "runs/tailed"))
    laptop.deploy("logs", "tailed")
    with shown.open("w") as stream:
        following = laptop.start("logs", "tailed", "-f", "--window", "trainer", stdout=stream)
    wait_for(lambda: shown.read_text() or following.poll() is not None, "its first line")
    go.touch()
    following.communicate(timeout=WAIT_S)
    out = shown.read_text()
    assert out.splitlines() == [
        f"stage={stage} step={step}" for stage in ("sft", "rl") for step in (1, 2, 3)
    ]
    assert laptop.deploy("logs", "tailed").stdout == out


def test_ctrl_c_detaches(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: Ctrl-C ends only the watching, says how to go on, exits 130; attach ends with a true copy.

    Red with KeyboardInterrupt not caught, and with final_pull left out.
    """
    go = tmp_path / "go"
    config = str(write_config(laptop.project, env={"STAND_IN_WAIT": str(go)}))
    process = laptop.start(config, "--run-id", "c", start_new_session=True)
    started(laptop, "c", 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, err
    for verb in ("attach", "stop", "pull"):
        assert f"deploy {verb} c" in out
    log = mirror(laptop, "c").log("trainer")
    printed(RunDir(laptop.rollouts_home / "runs/c"))
    assert laptop.deploy("pull", "c").returncode == 0
    # damaged here: the last pull compares, and mends it
    log.write_bytes(b"X" + log.read_bytes()[1:])
    go.touch()
    assert laptop.deploy("attach", "c").returncode == 0
    assert_complete(mirror(laptop, "c"), laptop.rollouts_home / "runs" / "c")


PHASES: dict[str, Callable[[Laptop, Host], bool]] = {
    "registered": lambda laptop, host: (laptop.rollouts_home / "registry/k.json").exists(),
    "syncing": lambda laptop, host: (host.run_path("k") / "code").exists(),
    "synced": lambda laptop, host: (host.run_path("k") / "code/tree").exists(),
    "launched": lambda laptop, host: (host.run_path("k") / "status.json").exists(),
    "building": lambda laptop, host: any(
        row.get("action") == "building" for row in read_jsonl(RunDir(host.run_path("k")).events)
    ),
    "training": lambda laptop, host: bool(read_jsonl(RunDir(host.run_path("k")).metrics)),
    "pulling": lambda laptop, host: any(mirror(laptop, "k").checkpoints.glob("sft/*")),
}


@pytest.mark.parametrize("phase", PHASES)
def test_kill_9_loses_nothing(phase: str, laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: after kill -9 of deploy at any moment, attach goes on to a complete end, with every row once.

    Red with the registry written after the sync, and with rsync straight into code/tree (both: syncing).
    """
    host = make_host()
    if phase == "building":  # a real build, which goes on without the laptop
        (host.home / "envs").unlink()
    config = str(write_config(laptop.project, env={"STAND_IN_STEP_S": "0.2"}))
    process = laptop.start(
        config, "--remote", host.target, "--run-id", "k", stdout=subprocess.DEVNULL
    )
    wait_for(lambda: PHASES[phase](laptop, host), phase)
    process.kill()
    process.communicate()
    done = laptop.deploy("attach", "k")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_complete(mirror(laptop, "k"), host.run_path("k"))
    steps = [(row["stage"], row["step"]) for row in read_jsonl(mirror(laptop, "k").metrics)]
    assert steps == [(stage, step) for stage in ("sft", "rl") for step in (1, 2, 3)]
    tree = {
        p.relative_to(host.run_path("k") / "code/tree").as_posix()
        for p in (host.run_path("k") / "code/tree").rglob("*.py")
    }
    assert "rollouts/worker/launch.py" in tree and not list(
        (host.run_path("k") / "code").glob(".tree-*")
    )
    quiet("k")


def test_kill_9_at_any_moment_stops_no_later_deploy(laptop: Laptop) -> None:
    """Goal: deploys that were killed at random moments leave nothing that refuses the next one, and each of them goes
    on by attach, or is not known."""
    rng, names = random.Random(7), [f"k{n}" for n in range(4)]
    config = str(write_config(laptop.project, engine__sglang_port=0))
    for name in names:
        process = laptop.start(
            config, "--run-id", name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.2, 3.0))  # the moment is what is random: nothing is waited for
        process.kill()
        process.communicate()
    done = laptop.deploy(config, "--run-id", "next")
    assert done.returncode == 0, done.stdout + done.stderr
    known = {row["run_id"] for row in laptop.json("ls")}
    for name in names:
        attached = laptop.deploy("attach", name)
        assert attached.returncode == (0 if name in known else 2), attached.stderr
        again = laptop.deploy(config, "--run-id", name, "--plan")
        assert (again.returncode == 2) == (name in known), again.stderr


def test_a_lost_connection_comes_back(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path
) -> None:
    """Goal: sshd and all its sessions die mid-run; watching goes on with no row lost or shown twice.

    Red with the mirror's offsets not sent on the second connection.
    """
    host, go = make_host(), tmp_path / "go"
    config = str(write_config(laptop.project, env={"STAND_IN_WAIT": str(go)}))
    process = laptop.start(config, "--remote", host.target, "--run-id", "cut")
    started(laptop, "cut", 1)
    host.stop()
    go.touch()
    wait_for(lambda: not is_live(RunDir(host.run_path("cut"))), "the end of the run, unwatched")
    host.start()
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, out + err
    assert "reconnect: " in out
    shown = [line.split(" loss")[0] for line in out.splitlines() if line.startswith("stage=")]
    every = [f"stage={stage} step={step}/3" for stage in ("sft", "rl") for step in (1, 2, 3)]
    # plain lines are thinned, but for the last of each stage
    assert shown == [line for line in every if line in shown] and {every[2], every[5]} <= {*shown}
    assert_complete(mirror(laptop, "cut"), host.run_path("cut"))


def test_a_second_laptop_attaches(
    laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path, shared: Path
) -> None:
    """Goal: `attach RUN --remote T` on a machine that never saw the run. Red with attach from the registry alone."""
    host = make_host()
    config = str(write_config(laptop.project))
    assert (
        laptop.deploy(config, "--remote", host.target, "--run-id", "mine", "--detach").returncode
        == 0
    )
    other = Laptop(tmp_path / "other", laptop.project, laptop.tmux_dir)
    (other.home / ".ssh").mkdir(parents=True)
    other.key.write_bytes(laptop.key.read_bytes())
    other.key.chmod(0o600)
    other.know(host)
    elsewhere = tmp_path / "not-a-repository"
    elsewhere.mkdir()
    unknown = other.deploy("attach", "mine", cwd=elsewhere)
    assert unknown.returncode == 2 and "there is no run 'mine' on local" in unknown.stderr
    done = other.deploy("attach", "mine", "--remote", host.target, cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_complete(RunDir(elsewhere / "runs/example/mine"), host.run_path("mine"))
    assert other.json("ls")[0]["run_id"] == "mine"


def test_secrets_reach_the_trainer_and_nothing_else(
    laptop: Laptop, make_host: Callable[..., Host]
) -> None:
    """Goal: a secret is in the trainer's environment, and in no file here or there. Red with secrets in the plan."""
    host, secret = make_host(), "s3cr3t-7f1c"
    config = str(
        write_config(
            laptop.project,
            host__secrets=["TOKEN_FOR_TEST"],
            env={"STAND_IN_PRINT_HASH_OF": "TOKEN_FOR_TEST"},
        )
    )
    missing = laptop.deploy(config, "--remote", host.target)
    assert missing.returncode == 2 and "the secret TOKEN_FOR_TEST is not set here" in missing.stderr
    done = laptop.deploy(
        config, "--remote", host.target, "--run-id", "s", env={"TOKEN_FOR_TEST": secret}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = mirror(laptop, "s").log("trainer").read_text()
    assert hashlib.sha256(secret.encode()).hexdigest() in log
    for root in (host.home / "runs", host.home / "code", laptop.home, laptop.project / "runs"):
        holding = subprocess.run(
            ["grep", "-rlF", secret, str(root)], capture_output=True, text=True, check=False
        ).stdout
        assert holding == "", root
    quiet("s")
