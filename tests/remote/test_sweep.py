"""Sweeps from the real command: several runs of one config, one after another; only torch is stood in for."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.config import Config
from rollouts.remote.commands import new_run_id
from rollouts.run_dir import RunDir, read_jsonl, valid_run_id
from tests.example_config import example_config, replace_at
from tests.remote.hosts import WAIT_S, Host, Laptop, wait_for, write_config

RATES = ("--set", "sft.matrix_lr=1e-6,3e-6")


def runs_of(laptop: Laptop) -> list[RunDir]:
    """The mirrors of the example's runs, in the order of their rates."""
    found = [RunDir(path.parent) for path in laptop.project.glob("runs/example/*/config.json")]
    return sorted(found, key=lambda run: Config.load(run.config).sft.matrix_lr)  # type: ignore[union-attr]


def test_runs_one_after_another(laptop: Laptop, make_host: Callable[..., Host]) -> None:
    """Goal: each run has its own config and a name that says what differs; they take turns; a table ends it. Red with
    all runs given the first one's config."""
    target = make_host().target
    done = laptop.deploy(
        str(write_config(laptop.project)), *RATES, "--set", "sglang_port=0", "--remote", target
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = runs_of(laptop)
    assert one.run_id.endswith("-matrix_lr-1e-06") and two.run_id.endswith("-matrix_lr-3e-06")
    configs = [Config.load(run.config) for run in (one, two)]
    assert [config.sft.matrix_lr for config in configs if config.sft] == [1e-6, 3e-6]
    assert configs[0].engine is not None and configs[0].engine.sglang_port == 0
    plan = json.loads(one.plan.read_text())
    assert ":0/" not in plan["stages"][-1]["engines"][0]["ready_url"]
    ended = read_jsonl(one.events)[-1]
    assert ended["kind"] == "run_ended" and ended["time"] <= read_jsonl(two.events)[0]["time"]
    table = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert table[0] == ["run", "differs", "state", "steps", "last", "exact_match"]
    assert table[1] == [
        one.run_id,
        "matrix_lr=1e-06",
        "done",
        "rl",
        "3",
        "reward_mean=0.3",
        "0.7500",
    ]


def test_a_failed_run_does_not_end_the_sweep(laptop: Laptop) -> None:
    """Goal: the others run, the table says which failed, and the exit code is its own. Red with the first failure
    raised out of the loop."""
    config = str(write_config(laptop.project, output__mode="sft"))
    failing = "host.env={'STAND_IN_FAIL': 'sft'},{}"
    done = laptop.deploy(config, "--set", failing, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 7, done.stderr
    assert rows[-1]["type"] == "sweep" and rows[-1]["exit_code"] == 7
    assert [(run["state"], run["exit_code"]) for run in rows[-1]["runs"]] == [
        ("failed", 7),
        ("done", 0),
    ]
    assert [row["type"] for row in rows].count("result") == 2


def test_ctrl_c_starts_no_further_run(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: Ctrl-C detaches from the run under way, names what was not started, and the command it prints runs just
    that. Red with the loop going on after the detached run: the command did not end."""
    config, go = (
        str(
            write_config(
                laptop.project, output__mode="sft", env={"STAND_IN_WAIT": str(tmp_path / "go")}
            )
        ),
        tmp_path / "go",
    )
    rates = ("--set", "sft.matrix_lr=1e-6,3e-6,5e-6")
    process = laptop.start(config, *rates, start_new_session=True)
    wait_for(lambda: runs_of(laptop) and read_jsonl(runs_of(laptop)[0].metrics), "the first step")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, err
    assert (
        "detached." in out
        and "not started: 2 of 3 runs\n  matrix_lr=3e-06\n  matrix_lr=5e-06" in out
    )
    command = f"deploy {config} --set sft.matrix_lr=1e-6,3e-6,5e-6 --skip 1"
    assert out.rstrip().endswith(command)
    go.touch()
    (first,) = runs_of(laptop)
    assert laptop.deploy("attach", first.run_id).returncode == 0
    done = laptop.deploy(*command.split()[1:])
    assert done.returncode == 0, done.stderr
    assert [run.run_id.rpartition("matrix_lr-")[2] for run in runs_of(laptop)] == [
        "1e-06",
        "3e-06",
        "5e-06",
    ]


def test_the_plan_of_a_sweep(laptop: Laptop) -> None:
    """Goal: a line a run, each with its problems; nothing is made. Red with the first plan alone."""
    config = str(write_config(laptop.project))
    done = laptop.deploy(
        config,
        "--set",
        "data.sft_mixture.0.name=configs/data/letters/train_sft.jsonl,nowhere.jsonl",
        "--plan",
    )
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[0] == "sweep of 2 runs on local, one after another (nothing is touched)"
    assert (
        lines[1].endswith("ready")
        and lines[2].endswith("1 problem")
        and "problem: 'nowhere.jsonl'" in lines[3]
    )
    assert "name=nowhere.jsonl: 'nowhere.jsonl' does not exist" in done.stderr
    fine = laptop.json(config, *RATES, "--plan")
    assert [run["values"] for run in fine["runs"]] == [
        {"sft.matrix_lr": 1e-6},
        {"sft.matrix_lr": 3e-6},
    ]
    assert not (laptop.project / "runs" / "example").exists()


REFUSED = [
    (["--set", "sft.matrix_lr=1e-6,3e-6", "--detach"], "--detach with a sweep"),
    (
        ["--set", "sft.matrix_lr=1e-6,3e-6", "--run-id", "x"],
        "--run-id x with a sweep: it names one run",
    ),
    (["--set", "sft.matrix_lr=1e-6,3e-6", "--skip", "2"], "--skip 2: the sweep has 2 runs"),
    (["--set", "sft.matrix_lr=1e-6,3e-6", "--show"], "--show prints one config"),
    (["--set", "sft.matrix_lr=1e-6,1e-6"], "names a value twice"),
    (["--set", "sft.matrx_lr=1"], "did you mean 'sft.matrix_lr'?"),
    (["--set", "rl.num_samples=0,1,4"], "num_samples-0: rl.num_samples=0: needs >= 2"),
    (
        ["--set", f"rl.sampling.seed={','.join(map(str, range(21)))}"],
        "--set asks for 21 runs, more than 20",
    ),
    (
        ["--set", f"rl.sampling.seed={','.join(map(str, range(100)))}"] * 2
        + ["--set", f"init_seed={','.join(map(str, range(1000)))}"],
        "--set asks for 10000000 runs",
    ),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[says[:30] for _, says in REFUSED])
def test_sweeps_that_are_refused(laptop: Laptop, options: list[str], says: str) -> None:
    """Goal: each ends with one message that names the fix, and nothing is started or made."""
    done = laptop.deploy(str(write_config(laptop.project)), *options)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert (
        not (laptop.rollouts_home / "registry").exists()
        and not (laptop.project / "runs" / "example").exists()
    )


def test_one_set_value_is_one_run(laptop: Laptop) -> None:
    """Goal: the run's config has the value, and a base that is wrong without it may run."""
    config = str(write_config(laptop.project, output__mode="sft"))
    broken = json.loads(Path(config).read_text())
    broken["sft"]["batch_size"] = 0
    Path(config).write_text(json.dumps(broken))
    shown = laptop.deploy(config, "--set", "sft.batch_size=2", "--show")
    assert shown.returncode == 0 and "batch_size=2," in shown.stdout, shown.stderr
    assert (
        laptop.deploy(config, "--set", "sft.batch_size=2", "--run-id", "one", "--plan").returncode
        == 0
    )


@pytest.mark.parametrize(
    ("name", "label"), [("e", "lr-1"), ("e" * 48, "lr-1"), ("e" * 48, "x" * 40), ("e", "")]
)
def test_names_of_runs_fit(name: str, label: str) -> None:
    """Goal: every name is one that a run may have. Red with the label not cut."""
    run_id = new_run_id(replace_at(example_config(), "output.experiment_name", name), label)
    assert (
        valid_run_id(run_id)
        and run_id.startswith(name)
        and (len(run_id) == 80 or run_id.endswith(label))
    )
