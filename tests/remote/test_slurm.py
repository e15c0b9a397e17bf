"""Runs as jobs of a real Slurm (slurmctld, two slurmd, munge), from the real command over a real sshd.

The worker is the real one; torch, trainer and engine are stood in for.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollouts.run_dir import RunDir, read_jsonl, read_plan, read_slurm_job, read_status
from tests.remote.hosts import WAIT_S, Host, Laptop, wait_for, write_config
from tests.remote.slurm_cluster import Cluster, cluster
from tests.remote.test_whole_runs import assert_complete, mirror, quiet


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def login(make_host: Callable[..., Host], slurm: Cluster) -> Host:
    """A login host: an sshd whose commands find the cluster."""
    return make_host(environment=slurm.environment)


def options_file(laptop: Laptop, *lines: str) -> str:
    file = laptop.project / "runs" / "job.sh"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["#!/bin/bash", "#SBATCH --time=10", "#SBATCH -c 2", *lines]) + "\n")
    return str(file)


def state_on(host: Host, run_id: str) -> str:
    status = read_status(RunDir(host.run_path(run_id)))
    return "" if status is None else f"{status.state}: {status.message}"


def test_a_run_as_a_job_of_two_nodes(laptop: Laptop, login: Host, slurm: Cluster) -> None:
    """Goal: one command submits, follows and pulls a run that Slurm starts on two nodes, which find each other there;
    the second one's logs come, too, and nothing is left. (One node: what `resume` below starts.) Red with the
    second node's files left out: node-1 did not join."""
    config = str(write_config(laptop.project, target__hosts=2, engine__sglang_port=0))
    options = options_file(laptop, "export FROM_THE_FILE=yes")
    done = laptop.deploy(config, "--slurm", options, "--remote", login.target, "--run-id", "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    run, there = mirror(laptop, "whole"), RunDir(login.run_path("whole"))
    assert_complete(run, there.path)
    assert "network_tested hosts=['n1', 'n2'] gigabytes_per_s=1.5 ranks=2" in done.stdout
    second = run.path / "hosts/1/logs/trainer.log"
    assert second.read_text() == "stage=sft rank=1\nstage=rl rank=1\n"
    left = [file for part in (there, there.on_node(1)) for file in part.path.glob("*secrets*")]
    assert left == []
    quiet("whole")
    assert slurm.jobs() == ""


def test_stop_saves_a_checkpoint_and_ends_the_job(
    laptop: Laptop, login: Host, slurm: Cluster, tmp_path: Path
) -> None:
    """Goal: `deploy stop` of a running job is graceful on both of its nodes, and Slurm has no job of it afterwards."""
    never = {"STAND_IN_WAIT": str(tmp_path / "never")}
    config = str(write_config(laptop.project, env=never, target__hosts=2))
    command = [config, "--slurm", options_file(laptop), "--remote", login.target]
    sent = laptop.deploy(*command, "--run-id", "stopped", "--detach")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    wait_for(lambda: read_jsonl(RunDir(login.run_path("stopped")).metrics), "its first step")
    done = laptop.json("stop", "stopped")
    assert done["state"] == "stopped" and done["checkpoint"] == "checkpoints/sft/step_000002", done
    assert (
        state_on(login, "stopped")
        == "stopped: stopped in stage sft, on request, after a checkpoint"
    )
    quiet("stopped")
    second = read_status(RunDir(login.run_path("stopped")).on_node(1))
    assert second is not None and second.state == "stopped"
    assert slurm.jobs() == ""


def test_a_pending_job_shows_slurms_reason(laptop: Laptop, login: Host, slurm: Cluster) -> None:
    """Goal: what a pending job waits for is told by the launch, `ls`, `status` and `attach`; `stop` takes it back."""
    config = str(write_config(laptop.project))
    held = options_file(laptop, "#SBATCH --hold")
    sent = laptop.deploy(
        config, "--slurm", held, "--remote", login.target, "--run-id", "held", "--detach"
    )
    assert sent.returncode == 0 and "held is in the queue of" in sent.stdout, (
        sent.stdout + sent.stderr
    )
    status = laptop.json("status", "held")
    assert status["state"] == "queued" and status["message"].endswith("is pending: JobHeldUser"), (
        status
    )
    following = laptop.start("attach", "held")
    wait_for(lambda: read_jsonl(mirror(laptop, "held").events), "its first event here")
    listed = laptop.deploy("ls")
    assert "is pending: JobHeldUser" in listed.stdout
    stopped = laptop.json("stop", "held")
    assert stopped["state"] == "stopped", stopped
    out, err = following.communicate(timeout=WAIT_S)
    assert "held: stopped, exit code 143" in out and "CANCELLED" in out, out + err
    assert slurm.jobs() == ""


def submitted(laptop: Laptop, login: Host, run_id: str, *lines: str, **config: Any) -> str:
    """Submit a run that waits in its second step; return the id of its job once it has taken the first."""
    never = {"STAND_IN_WAIT": str(laptop.home / "go"), "STAND_IN_WAIT_IN": "sft"}
    file = str(write_config(laptop.project, run_id, env=never, **config))
    options = options_file(laptop, *lines)
    sent = laptop.deploy(
        file, "--slurm", options, "--remote", login.target, "--run-id", run_id, "--detach"
    )
    assert sent.returncode == 0, sent.stdout + sent.stderr
    run = RunDir(login.run_path(run_id))
    wait_for(lambda: read_jsonl(run.metrics), f"the first step of {run_id}")
    job = read_slurm_job(run)
    assert job is not None
    return job.job_id


def test_the_time_limit_saves_a_checkpoint_and_resume_goes_on(
    laptop: Laptop, login: Host, slurm: Cluster
) -> None:
    """Goal: what Slurm sends before the limit ends the run after a checkpoint, and a new job goes on from it; without
    --slurm nothing starts on the login host. Red with `stage_ended` for the stage that was stopped: rl came next."""
    job_id = submitted(laptop, login, "limited")
    slurm.ask("scancel", "--batch", "--signal=USR1", job_id)  # as --signal=B:USR1@S does
    ended = laptop.deploy("attach", "limited")
    assert ended.returncode == 143, ended.stdout + ended.stderr
    assert (
        "stopped in stage sft, since the time limit of its job is near, after a checkpoint"
        in ended.stdout
    )
    bare = laptop.deploy("resume", "limited")
    assert bare.returncode == 2 and "deploy resume limited --slurm FILE" in bare.stderr, bare.stderr
    (laptop.home / "go").touch()
    again = laptop.deploy(
        "resume", "limited", "--slurm", options_file(laptop), "--run-id", "unlimited"
    )
    assert again.returncode == 0, again.stdout + again.stderr
    steps = [(row["stage"], row["step"]) for row in read_jsonl(mirror(laptop, "unlimited").metrics)]
    before = [("sft", 1), ("sft", 2)]  # then sft once more: the stand-in counts from 1 again
    assert steps == before + [(stage, step) for stage in ("sft", "rl") for step in (1, 2, 3)]
    quiet("unlimited")


def test_gpus_are_those_that_slurm_gives(laptop: Laptop, login: Host, slurm: Cluster) -> None:
    """Goal: with GPU 0 of the node in another job, the run's only GPU, place 0, is GPU 1; and when Slurm cancels the
    job, its word is the run's end."""
    other = ("sbatch", "--parsable", "-w", "n1", "--gres=gpu:1", "--output=/dev/null")
    held = slurm.ask(*other, "--wrap=sleep 1000")
    wait_for(lambda: "wrap RUNNING" in slurm.jobs(), "the other job")
    cuda = {"target__device_type": "cuda", "output__mode": "sft", "engine": None, "rl": None}
    job_id = submitted(laptop, login, "gpus", "#SBATCH -w n1", **cuda)
    plan = read_plan(RunDir(login.run_path("gpus")))
    assert plan is not None and plan.stages[0].trainer is not None
    env = plan.stages[0].trainer.env
    assert (env["CUDA_VISIBLE_DEVICES"], env["ROLLOUTS_GPUS"]) == ("1", "1")
    slurm.ask("scancel", held.strip(), job_id)
    ended = laptop.deploy("attach", "gpus")
    assert ended.returncode == 143, ended.stdout + ended.stderr
    assert f"Slurm's job {job_id} ended as CANCELLED" in ended.stdout
    quiet("gpus")


def test_a_run_goes_on_in_a_job_that_slurm_starts_again(
    laptop: Laptop, login: Host, slurm: Cluster
) -> None:
    """Goal: with --requeue a job of two nodes that another one takes the place of waits, starts again, and goes on from
    its last checkpoint to its end: each step stands once, and no secrets are left. Red with the secrets gone at the
    first end."""
    job_id = submitted(laptop, login, "again", "#SBATCH --requeue", target__hosts=2)
    following = laptop.start("attach", "again")
    urgent = ("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--output=/dev/null")
    other = slurm.ask(*urgent, "--wrap=sleep 1000").strip()
    wait_for(lambda: f"{job_id} PENDING" in slurm.ask("squeue", "-h", "-o", "%A %T"), "its turn")
    slurm.ask("scancel", other)
    (laptop.home / "go").touch()
    out, err = following.communicate(timeout=250)
    assert following.returncode == 0, out + err
    run = mirror(laptop, "again")
    steps = [(row["stage"], row["step"]) for row in read_jsonl(run.metrics)]
    assert steps == [(stage, step) for stage in ("sft", "rl") for step in (1, 2, 3)]
    (restart,) = [row for row in read_jsonl(run.events) if row["kind"] == "stage_restarted"]
    assert restart["checkpoint"] == "checkpoints/sft/step_000001"
    assert restart["reason"] == "Slurm started the run's job again"
    assert not RunDir(login.run_path("again")).secrets.exists()
    quiet("again")


def test_a_node_with_another_home(laptop: Laptop, login: Host, slurm: Cluster) -> None:
    """Goal: where a node does not see the login host's home, the run ends at once, and the message has the fix: for the
    node that runs the job's script, and for another. Red for the first with Slurm's exit code not read, and for the
    other without the script's look from each node."""
    if os.geteuid() != 0:
        pytest.skip("a node with mounts of its own needs root")
    (login.home / "runs").mkdir()
    for hosts, node in ((1, "n2"), (2, "n2")):
        name = f"apart{hosts}"
        config = str(write_config(laptop.project, name, target__hosts=hosts))
        options = options_file(laptop, *(["#SBATCH -w n2"] if hosts == 1 else []))
        with slurm.without(login.home / "runs", node):
            done = laptop.deploy(
                config, "--slurm", options, "--remote", login.target, "--run-id", name
            )
        assert done.returncode == 1, done.stdout + done.stderr
        seen = f"does not see {login.run_path(name)}, which the login host and the job's nodes have"
        assert seen in done.stdout and "set ROLLOUTS_HOME to a directory" in done.stdout
        assert hosts == 1 or f"{node} does not see" in done.stdout
        quiet(name)


def test_what_slurm_refuses_is_told_before_anything_is_sent(
    laptop: Laptop, login: Host, make_host: Callable[..., Host]
) -> None:
    """Goal: an unknown partition in Slurm's words, with those there; a host without Slurm; options that contradict the
    config. Nothing is sent, and --plan shows the script and when it might start."""
    config = str(write_config(laptop.project))
    there = ["--remote", login.target, "--run-id", "refused"]
    shown = laptop.deploy(config, *there, "--slurm", options_file(laptop), "--plan")
    assert shown.returncode == 0, shown.stderr
    assert "#SBATCH --job-name=refused" in shown.stdout
    assert "note: Slurm says: Job" in shown.stdout and "in partition debug" in shown.stdout
    wrong = laptop.deploy(config, *there, "--slurm", options_file(laptop, "#SBATCH -p nope -N 3"))
    assert wrong.returncode == 2 and "Nothing was started." in wrong.stderr
    assert "invalid partition specified: nope" in wrong.stderr
    assert "partitions there: debug, down, urgent" in wrong.stderr
    assert "--nodes=3, and the config asks for 1" in wrong.stderr
    assert not login.run_path("refused").exists()
    bare = laptop.deploy(
        config, "--slurm", options_file(laptop), "--remote", make_host().target, "--plan"
    )
    assert bare.returncode == 2 and "Slurm's controller does not answer" in bare.stderr, bare.stderr


def test_a_node_that_fails_is_said_in_slurms_words(
    laptop: Laptop, login: Host, slurm: Cluster
) -> None:
    """Goal: a run of two nodes, one of which is gone, is failed, not running for ever; its message has Slurm's word,
    and says how to go on. The last test: the node may stay away for minutes. Red with the state that a supervisor
    writes that Slurm ends: stopped."""
    job_id = submitted(laptop, login, "lost", target__hosts=2)
    slurm.ask("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
    ended = laptop.deploy("attach", "lost")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert f"Slurm's job {job_id} ended as NODE_FAIL: a node failed" in ended.stdout
    assert "`deploy resume lost --slurm FILE` goes on from its last checkpoint" in ended.stdout
    second = read_status(RunDir(login.run_path("lost")).on_node(1))
    assert second is not None and second.state in ("failed", "stopped")
    quiet("lost")
