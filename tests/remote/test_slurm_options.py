"""The options file of a Slurm job and the script made from it: pure, without a Slurm."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from base_config import Config
from rollouts.remote.plan import Plan, SlurmOptions, make_plan
from rollouts.remote.plan.slurm_options import read_options
from rollouts.remote.plan.slurm_part import node_group
from rollouts.remote.plan.slurm_script import limit_of, signal_s
from rollouts.run_dir import HostGroup, LaunchPlan, RunDir
from rollouts.slurm.job_states import SeenJob, read_accounting, read_job
from rollouts.worker.slurm_node import NodeError, given_gpus, with_gpus, with_values
from tests.example_config import example_config, replace_at
from tests.remote.test_plan import CODE, CUDA, FACTS

FILE = """\
#!/bin/bash
#SBATCH --partition=gpu -A nlp --qos normal   # ours
#SBATCH -t 1-12:00:00 -c8 --exclusive
# a comment
module load cuda/12.6
"""


LOGIN = dataclasses.replace(FACTS, tools={"rsync": "/usr/bin/rsync"}, gpus=(), driver=None)


def options_of(text: str) -> SlurmOptions:
    options, problems = read_options(text, "job.sh")
    assert problems == []
    return options


def config_of(**changes: Any) -> Config:
    config = example_config()
    for path, value in changes.items():
        config = replace_at(config, path.replace("__", "."), value)
    return config


def plan_of(text: str, group: HostGroup | None = None, **changes: Any) -> Plan:
    where: dict[str, Any] = {"target": "login", "run_id": "r1", "local_dir": "/here"}
    where |= {"secrets_set": ["SET"], "queue": options_of(text), "group": group}
    return make_plan(config_of(**changes), LOGIN, CODE, **where)


def first_plan(text: str, **changes: Any) -> Plan:
    """Plan a run, of several nodes the first one's part."""
    return plan_of(text, node_group(config_of(**changes)), **changes)


def script_of(text: str, **changes: Any) -> list[str]:
    plan = first_plan(text, **changes)
    assert plan.launch is not None and plan.launch.slurm is not None
    return plan.launch.slurm.script.splitlines()


def test_an_options_file_is_read_as_sbatch_reads_it() -> None:
    """Goal: long and short options, with and without `=`, several a line, comments, and shell lines."""
    options = options_of(FILE)
    assert options.options == (
        ("partition", "gpu"),
        ("account", "nlp"),
        ("qos", "normal"),
        ("time", "1-12:00:00"),
        ("cpus-per-task", "8"),
        ("exclusive", None),
    )
    assert options.shell == ("module load cuda/12.6",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#SBATCH gpu", "job.sh:1: '#SBATCH gpu': 'gpu' is not an option."),
        ('#SBATCH --comment="a', "job.sh:1: '#SBATCH --comment=\"a': No closing quotation."),
        ("#SBATCH -Z 3", "job.sh:1: '#SBATCH -Z 3': -Z is not known here; write the long option."),
        ("\nsrun python train.py", "job.sh:2: 'srun python train.py' would start something else"),
    ],
)
def test_a_line_that_cannot_be_followed(text: str, message: str) -> None:
    """Goal: the error names file, line and what is wrong."""
    _, problems = read_options(text, "job.sh")
    assert [problem.message[: len(message)] for problem in problems] == [message]


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("#SBATCH -J mine", {}, "job.sh: --job-name cannot be set."),
        ("#SBATCH --requeue --no-requeue", {}, "--requeue and --no-requeue: one of the two."),
        ("#SBATCH -N 2", {}, "job.sh: --nodes=2, and the config asks for 1."),
        ("#SBATCH -N 1-2", {"target__hosts": 2}, "--nodes=1-2, and the config asks for 2."),
        ("#SBATCH --signal=TERM@60", {}, "job.sh: --signal=TERM@60 would not save a checkpoint."),
        ("#SBATCH --gres=gpu:1", {}, "asks for 1 GPUs, and the config uses none."),
        ("#SBATCH -G 4", CUDA, "job.sh: --gpus=4 asks for 4 GPUs, and the config uses 1."),
        ("#SBATCH --gpus-per-node=a100:2", CUDA, "asks for 2 GPUs, and the config uses 1."),
        (
            "",
            {**CUDA, "host__env": {"CUDA_VISIBLE_DEVICES": "0"}},
            "host.env sets CUDA_VISIBLE_DEVICES, and Slurm says which GPUs the run has.",
        ),
    ],
)
def test_options_that_contradict_the_run(text: str, changes: dict[str, Any], message: str) -> None:
    """Goal: what the run decides itself is a problem of the plan, and so are other nodes or GPUs than the config's."""
    found = [problem.message for problem in first_plan(text, **changes).problems]
    assert any(message in one for one in found), found


def test_the_script() -> None:
    """Goal: our options, the user's as they are, their shell lines, then one supervisor a node; bash can read it."""
    lines = script_of(FILE)
    assert lines[:8] == [
        "#!/bin/bash",
        "#SBATCH --job-name=r1",
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --output=/home/u/.rollouts/runs/r1/logs/slurm.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --chdir=/home/u/.rollouts/runs/r1/code/tree",
        "#SBATCH --no-requeue",
    ]
    assert lines[8:16] == [
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=nlp",
        "#SBATCH --qos=normal",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --exclusive",
        "module load cuda/12.6",
    ]
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)


def test_the_script_of_a_job_that_may_start_again() -> None:
    """Goal: --requeue is the user's to set; then a run that ends near the time limit after its checkpoint has Slurm
    start the job again, and nothing else does. Red with any end taken for that one: a run that failed came again."""
    lines = script_of("#SBATCH --requeue -N2 -t 10", target__hosts=2)
    assert "#SBATCH --requeue" in lines and "#SBATCH --no-requeue" not in lines
    assert [line for line in lines if line.startswith("#SBATCH --nodes")] == ["#SBATCH --nodes=2"]
    (again,) = [line for line in lines if "scontrol requeue" in line]
    asked = []
    for near, code in (("yes", 143), ("", 143), ("yes", 0), ("yes", 1)):
        shell = f"scontrol() {{ echo $*; }}; SLURM_JOB_ID=7 near={near} code={code}; {again}"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        asked.append(done.stdout)
    assert asked == ["requeue 7\n", "", "", ""]
    assert not any("scontrol requeue" in line for line in script_of("#SBATCH -t 10"))


NODES = {"target__hosts": 2, "engine__hosts": [0, 1], "engine__sglang_port": 0}


def test_the_plans_of_several_nodes() -> None:
    """Goal: each node has a directory of its own below the first one's, which alone has the script; every stand-in of
    the plans is one that a node tells. Red with the engines' ports left out of what node 1 tells."""
    group = node_group(config_of(**NODES))
    assert group is not None
    plans = [plan_of("", group=dataclasses.replace(group, rank=rank), **NODES) for rank in (0, 1)]
    assert [problem.message for plan in plans for problem in plan.problems] == []
    first, second = (plan.launch for plan in plans)
    assert first is not None and second is not None and first.slurm and second.slurm
    assert first.run_path == "/home/u/.rollouts/runs/r1"
    assert second.run_path == "/home/u/.rollouts/runs/r1/hosts/1/r1"
    assert RunDir(Path(second.run_path)).first.path == Path(first.run_path)
    assert first.slurm.script and second.slurm.script == ""
    values: dict[str, str] = {}
    for rank, launch in enumerate((first, second)):
        assert launch.slurm is not None
        ports = {
            str(port): str(21_000 + 100 * rank + n) for n, port in enumerate(launch.slurm.ports)
        }
        values |= ports | {
            f"node-{rank}.address": f"10.0.0.{rank}",
            f"node-{rank}.interface": "ib0",
        }
    for launch in (first, second):
        fitted = with_values(launch.to_json(), values)
        assert LaunchPlan.from_json(fitted).group is not None
        text = json.dumps({**fitted, "slurm": None})
        assert "99000" not in text and ".address" not in text and ".interface" not in text
        assert "10.0.0.1:21101" in text or "10.0.0.1 --port 21100" in text


def test_gpus_are_asked_for_as_the_config_uses_them() -> None:
    """Goal: as many as the highest place named, unless the user asked for them by their kind."""
    two = {**CUDA, "target__gpu_ranks": [0, 1]}
    assert "#SBATCH --gres=gpu:2" in script_of("#SBATCH -p gpu", **two)
    own = script_of("#SBATCH --gres=gpu:a100:2", **two)
    assert "#SBATCH --gres=gpu:a100:2" in own and "#SBATCH --gres=gpu:2" not in own
    assert not any("gpu" in line for line in script_of(""))


def test_a_login_host_needs_no_gpus_and_no_tmux() -> None:
    """Goal: what the node alone has is no problem of the plan. Red with `on_nodes` left out: 'has no tmux'."""
    plan = plan_of("#SBATCH -t 10", **CUDA, host__torch_build="auto")
    assert [problem.message for problem in plan.problems] == []
    assert any("driver is not known here" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-0:30", 88200),
        ("UNLIMITED", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    """Goal: all of sbatch's forms."""
    assert limit_of(text) == seconds
    assert (
        signal_s(text) == 300
        if seconds is None or seconds >= 1200
        else signal_s(text) == seconds // 4
    )


PENDING = (
    "JobId=4 JobName=r1 UserId=u(1000) Priority=1 JobState=PENDING Reason=Resources Dependency=(null)"
    " ExitCode=0:0 StartTime=2026-12-01T04:10:00 TimeLimit=00:10:00 Partition=gpu"
)


def test_what_slurm_says() -> None:
    """Goal: state, reason and start of a job; of one that was forgotten, what the accounting has."""
    assert read_job(PENDING) == SeenJob("PENDING", "Resources", "2026-12-01T04:10:00", "0:0")
    over = PENDING.replace("PENDING", "TIMEOUT").replace("Resources", "TimeLimit")
    assert read_job(over) == SeenJob("TIMEOUT", "TimeLimit", "", "0:0")
    assert read_job("") is None
    assert read_accounting("CANCELLED by 1000|0:15\n") == SeenJob("CANCELLED", exit_code="0:15")
    assert read_accounting("\n") is None


def test_gpus_of_the_node_take_the_places_of_the_plans() -> None:
    """Goal: place n of the config is the n-th GPU that Slurm gave; too few are refused."""
    env = {"ROLLOUTS_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "0,1", "A": "0"}
    plan = {"stages": [{"trainer": {"env": env}}]}
    given = given_gpus({"CUDA_VISIBLE_DEVICES": "3,5", "SLURM_JOB_GPUS": "7"})
    (stage,) = with_gpus(plan, given, 2)["stages"]
    assert stage["trainer"]["env"] == {
        "ROLLOUTS_GPUS": "3,5",
        "CUDA_VISIBLE_DEVICES": "3,5",
        "A": "0",
    }
    (stage,) = with_gpus(plan, ["MIG-a", "MIG-b"], 2)["stages"]
    assert stage["trainer"]["env"]["CUDA_VISIBLE_DEVICES"] == "MIG-a,MIG-b"
    assert stage["trainer"]["env"]["ROLLOUTS_GPUS"] == "0,1"
    with pytest.raises(NodeError, match=r"Slurm gave 1 GPUs here \(3\), and the config uses 2"):
        with_gpus(plan, ["3"], 2)


def test_free_ports_of_the_node_take_the_places_of_stand_ins() -> None:
    """Goal: engine.sglang_port=0 gives ports that are free on the node, in every place where the plan has them."""
    plan = plan_of("", engine__sglang_port=0)
    assert plan.launch is not None and plan.launch.slurm is not None
    (stand_in,) = plan.launch.slurm.ports
    fitted = LaunchPlan.from_json(with_values(plan.launch.to_json(), {str(stand_in): "21000"}))
    (engine,) = fitted.stages[-1].engines
    assert engine.ready_url is not None and ":21000/" in engine.ready_url
    assert str(stand_in) not in str(fitted.stages)
