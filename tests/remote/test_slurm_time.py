"""What a real Slurm does when time is over: its shortest limit is a minute. Run by scripts/slurm_time, never in CI."""

from pathlib import Path

import pytest

from rollouts.run_dir import RunDir, read_jsonl
from tests.remote.hosts import Host, Laptop, wait_for, write_config
from tests.remote.slurm_cluster import Cluster
from tests.remote.test_slurm import login, options_file, slurm, state_on, submitted
from tests.remote.test_whole_runs import mirror, quiet

__all__ = ["login", "slurm"]  # fixtures
pytestmark = pytest.mark.slurm_time


def test_the_time_limit_of_a_minute(laptop: Laptop, login: Host, slurm: Cluster) -> None:
    """Goal: near the limit a run with --requeue saves a checkpoint, Slurm starts its job again, and it goes on to its
    end; one whose step takes longer than is left is stopped, with Slurm's TIMEOUT and how to go on. Each step once."""
    submitted(laptop, login, "limited", "#SBATCH --time=1 --requeue")
    endless = {"STAND_IN_STEP_S": "1000"}
    config = str(write_config(laptop.project, "endless", env=endless, output__mode="sft"))
    options = options_file(laptop, "#SBATCH --time=1")
    to_login = ["--slurm", options, "--remote", login.target, "--run-id", "endless"]
    endless_one = laptop.start(config, *to_login)
    following = laptop.start("attach", "limited")
    again = RunDir(login.run_path("limited"))
    wait_for(lambda: state_on(login, "limited").startswith("queued: "), "its job's next turn")
    (laptop.home / "go").touch()
    out, err = following.communicate(timeout=400)
    assert following.returncode == 0, out + err
    steps = [(row["stage"], row["step"]) for row in read_jsonl(mirror(laptop, "limited").metrics)]
    assert steps == [(stage, step) for stage in ("sft", "rl") for step in (1, 2, 3)]
    kinds = [row for row in read_jsonl(again.events) if row["kind"] == "stage_restarted"]
    assert [row["checkpoint"] for row in kinds] == ["checkpoints/sft/step_000002"]
    out, err = endless_one.communicate(timeout=400)
    assert endless_one.returncode == 143, out + err
    assert "ended as TIMEOUT: the job's time limit was over" in out
    assert "`deploy resume endless --slurm FILE` goes on from its last checkpoint" in out
    quiet("limited")
    quiet("endless")


def test_another_job_takes_the_place_of_a_run(
    laptop: Laptop, login: Host, slurm: Cluster, tmp_path: Path
) -> None:
    """Goal: without --requeue Slurm's PREEMPTED is the run's end, with how to go on."""
    job_id = submitted(laptop, login, "taken")
    urgent = ("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--output=/dev/null")
    other = slurm.ask(*urgent, "--wrap=sleep 1000").strip()
    ended = laptop.deploy("attach", "taken")
    slurm.ask("scancel", other)
    assert ended.returncode == 143, ended.stdout + ended.stderr
    assert f"Slurm's job {job_id} ended as PREEMPTED: another job took its nodes" in ended.stdout
    quiet("taken")


def test_a_run_goes_on_with_the_nodes_that_are_left(
    laptop: Laptop, login: Host, slurm: Cluster
) -> None:
    """Goal: with target.hosts_min a node that fails leaves the job, and the run goes on from its last checkpoint on the
    other, in the same job. The last test: the node may stay away for minutes."""
    fewer = {"target__hosts": 2, "target__hosts_min": 1, "limits__restarts_max": 1}
    submitted(laptop, login, "fewer", output__mode="sft", **fewer)
    following = laptop.start("attach", "fewer")
    slurm.ask("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
    run = RunDir(login.run_path("fewer"))
    wait_for(lambda: "host_left" in [row["kind"] for row in read_jsonl(run.events)], "its way on")
    (laptop.home / "go").touch()
    out, err = following.communicate(timeout=250)
    assert following.returncode == 0, out + err
    assert [row["step"] for row in read_jsonl(mirror(laptop, "fewer").metrics)] == [1, 2, 3]
    quiet("fewer")
