"""Never launched, gone and unreadable are three things; looking starts nothing. Names of runs, and forgetting."""

import json
import os
import shutil
from pathlib import Path

import pytest

from base_config import Config
from rollouts.remote.errors import DeployError
from rollouts.remote.plan import Plan
from rollouts.remote.run import registry
from rollouts.run_dir import LaunchPlan, RunDir
from tests.remote.hosts import WAIT_S, Laptop, config_with, git, write_config


def launch_plan(home: Path, run_id: str) -> LaunchPlan:
    return LaunchPlan(
        run_id=run_id,
        experiment_name="example",
        home=str(home),
        run_path=str(home / "runs" / run_id),
        base_python="/nowhere/python",
        environments=[],
        stages=[],
        bootstrap_timeout_s=1.0,
        stop_grace_s=2.0,
        engine_restarts_max=3,
        engine_hang_timeout_s=4.0,
    )


def register(
    home: Path, results: Path, run_id: str, config: Config | None = None
) -> registry.RunEntry:
    plan = Plan(
        target="local",
        run_id=run_id,
        local_dir=str(results / run_id),
        problems=(),
        notes=(),
        steps=(),
        summary=(),
        warnings=(),
        launch=launch_plan(home, run_id),
    )
    return registry.register(
        plan, config or config_with({}), results, {"code/commit.txt": "c\n"}, now=1.0
    )


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_a_run_whose_directory_is_gone(laptop: Laptop) -> None:
    """Goal: no verb trains a finished run anew, and its record stays as it was; with the mirror gone too. Red with "no
    row" taken for "never launched": attach synced the changed code and launched."""
    config = str(write_config(laptop.project, output__mode="sft"))
    assert laptop.deploy(config, "--run-id", "gone").returncode == 0
    mirror, run = laptop.project / "runs/example/gone", laptop.rollouts_home / "runs/gone"
    shutil.rmtree(run)
    (laptop.project / "rollouts/changed.py").write_text("RATE = 7.7\n")
    before = snapshot(mirror / "code")
    status = laptop.json("status", "gone")
    assert status["state"] == "gone" and "its directory is gone" in status["message"]
    for verb in ("attach", "pull", "stop", "logs"):
        done = laptop.deploy(verb, "gone")
        assert done.returncode == 2 and "its directory is gone from local" in done.stderr, (
            verb,
            done.stderr,
        )
        assert (
            str(mirror) in done.stderr.replace("'", "")
            and "deploy" in done.stderr
            and "to train again" in done.stderr
        )
        assert not run.exists() and snapshot(mirror / "code") == before, verb
    shutil.rmtree(mirror)
    assert "is gone from local" in laptop.deploy("attach", "gone").stderr and not run.exists()
    assert laptop.deploy("forget", "gone").returncode == 0 and laptop.json("ls") == []
    assert "there is no run" in laptop.deploy("attach", "gone").stderr


@pytest.mark.parametrize("damage", ["not JSON", "", '{"state": "done"}'])
def test_a_run_whose_status_cannot_be_read(damage: str, laptop: Laptop) -> None:
    """Goal: a damaged status.json is neither "not launched" nor a reason to launch; pull brings what can. Red with it
    taken for "never launched"."""
    config = str(write_config(laptop.project, output__mode="sft"))
    assert laptop.deploy(config, "--run-id", "odd").returncode == 0
    run = RunDir(laptop.rollouts_home / "runs/odd")
    run.status.write_text(damage)
    events = run.events.read_bytes()
    shutil.rmtree(laptop.project / "runs/example/odd")
    (marker,) = (laptop.rollouts_home / "registry").glob("odd.*/launched")
    marker.unlink()  # as a deploy that was killed while it launched: the host alone tells
    assert laptop.json("status", "odd")["state"] == "unreadable"
    stopped = laptop.deploy("attach", "odd")
    assert "Traceback" not in stopped.stderr and run.events.read_bytes() == events
    shutil.rmtree(laptop.project / "runs/example/odd")
    shutil.rmtree(laptop.rollouts_home / "registry")  # the host alone knows it
    (laptop.rollouts_home / "registry").mkdir()
    home = laptop.rollouts_home
    laptop.environment["ROLLOUTS_HOME"] = str(home)
    done = laptop.deploy("attach", "odd")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert run.events.read_bytes() == events and run.status.read_text() == damage


def test_a_run_that_was_never_launched(laptop: Laptop) -> None:
    """Goal: looking does not launch it, and says why it was not; `ls` shows the reason, `forget` drops it. Red with it
    listed as "unknown" without a reason."""
    config = str(write_config(laptop.project, output__mode="sft"))
    tools = laptop.home / "tools"
    tools.mkdir()
    for tool in ("git", "sh", "env", "tmux", "id", "uname", "sed", "rsync"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    (tools / "rsync").unlink()
    (tools / "rsync").write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 5\n")
    (tools / "rsync").chmod(0o755)
    failed = laptop.deploy(
        config, "--run-id", "later", env={"PATH": f"{tools}:{os.environ['PATH']}"}
    )
    assert (
        failed.returncode == 2
        and "it is broken" in failed.stderr
        and "deploy attach later" in failed.stderr
    )
    row = laptop.json("ls")[0]
    assert (
        row["state"] == "not launched"
        and "it is broken" in row["message"]
        and "\\n" not in row["message"]
    )
    assert "  error: " in laptop.deploy("ls").stdout
    status = laptop.json("status", "later")
    assert status["state"] == "not launched" and "deploy attach later" in status["message"]
    stopped = laptop.deploy("stop", "later")
    assert stopped.returncode == 0 and "later: not launched, and not to be" in stopped.stdout
    for verb in ("pull", "logs"):
        done = laptop.deploy(verb, "later")
        assert done.returncode == 2 and "was never launched on local" in done.stderr
        assert "Nothing was started" not in done.stderr
    assert not (laptop.rollouts_home / "runs/later/status.json").exists()
    assert (
        laptop.deploy("attach", "later").returncode == 0 and laptop.json("ls")[0]["state"] == "done"
    )


def test_names_by_prefix_and_last(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a unique beginning, and `last`, name a run; an ambiguous one lists its candidates. Red with whole names
    alone."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(laptop.rollouts_home))
    for index, run_id in enumerate(("alpha-1", "alpha-12", "beta")):
        register(laptop.rollouts_home, laptop.home / "results", run_id)
        os.utime(laptop.rollouts_home / "registry" / f"{run_id}.json", (index, index))
    for name, expected in (
        ("b", "beta"),
        ("last", "beta"),
        ("alpha-1", "alpha-1"),
        ("alpha-12", "alpha-12"),
    ):
        assert laptop.json("status", name)["run_id"] == expected
    several = laptop.deploy("status", "alph")
    assert (
        several.returncode == 2
        and "begins the names of 2 runs" in several.stderr
        and "alpha-12" in several.stderr
    )
    for name in ("gamma", "", "../registry/beta", "beta.json"):
        assert "there is no run" in laptop.deploy("forget", name).stderr


def test_two_deploys_of_one_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: the second of two that register at once is refused, and touches nothing of the first's. Red with the entry
    overwritten."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    first = register(tmp_path / "home", tmp_path / "results", "r")
    before = snapshot(tmp_path)
    with pytest.raises(DeployError, match="in use here") as caught:
        register(tmp_path / "home", tmp_path / "results", "r", config_with({"output.mode": "sft"}))
    assert caught.value.exit_code == 2 and snapshot(tmp_path) == before
    assert registry.find("r") == first and first.launch_id


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "x"}', '{"run_id": 7}'])
def test_a_damaged_entry(text: str, laptop: Laptop) -> None:
    """Goal: one entry that cannot be read hides no other, and is named. Red with ls's KeyError."""
    laptop.json("ls")
    (laptop.rollouts_home / "registry").mkdir(exist_ok=True)
    (laptop.rollouts_home / "registry/bad.json").write_text(text)
    done = laptop.deploy("ls")
    assert done.returncode == 0 and "bad.json cannot be read" in done.stderr
    asked = laptop.deploy("status", "bad")
    assert (
        asked.returncode == 2 and "is damaged" in asked.stderr and "Traceback" not in asked.stderr
    )


def test_a_mirror_that_is_pulled_again(laptop: Laptop) -> None:
    """Goal: it is ignored by git wherever it is made, and says that it is not followed. Red with .gitignore written at
    the start alone."""
    config = str(write_config(laptop.project, output__mode="sft", output__save_dir="out"))
    assert laptop.deploy(config, "--run-id", "r", "--detach").returncode == 0
    note = json.loads((laptop.project / "out/example/r/mirror.json").read_text())
    assert note["followed"] is False and "deploy attach r" in note["message"]
    assert laptop.deploy("attach", "r").returncode == 0
    assert (
        json.loads((laptop.project / "out/example/r/mirror.json").read_text())["complete"] is True
    )
    for verb in ("pull", "attach", "logs"):
        shutil.rmtree(laptop.project / "out")
        assert laptop.deploy(verb, "r").returncode == 0
        assert git(laptop.project, "status", "--porcelain") == "", verb


def test_a_run_directory_as_config(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: `deploy path/to/run` does that run again. Red with "no such file"."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(laptop.rollouts_home))
    register(laptop.rollouts_home, laptop.home / "results", "r")
    for path in (laptop.home / "results/r", f"{laptop.home}/results/r/"):
        assert laptop.json(str(path), "--plan")["type"] == "plan"
    empty = laptop.deploy(str(laptop.home / "results"), "--plan")
    assert empty.returncode == 2 and "Traceback" not in empty.stderr


LINES = [
    (["atach", "r"], 2, "Did you mean `deploy attach`?"),
    (["stauts", "r"], 2, "Did you mean `deploy status`?"),
    (["nonsense"], 2, "Verbs: attach"),
    (["ls", "--jsno"], 2, "--json"),
    (["x.py", "--remot", "h"], 2, "--remote"),
    (["--remot", "h", "x.py"], 2, "--remote"),
    (["help"], 0, "Exit codes:"),
    (["help", "pull"], 0, "Usage: deploy pull"),
    (["help", "pul"], 2, "Did you mean `deploy pull`?"),
    (["help", "--json"], 0, "Exit codes:"),
    (["help", "x.py"], 0, "Exit codes:"),
    (["x.py", "y.py", "--plan"], 2, "one config at a time: x.py, then y.py"),
    (["pull", "help"], 2, "there is no run 'help'"),
    (["--version"], 0, "rollouts 0."),
]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    LINES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_people_type(arguments: list[str], code: int, expected: str, laptop: Laptop) -> None:
    """Goal: help, the version, and the nearest spelling. Red with a verb's typo taken for a config file."""
    done = laptop.deploy(*arguments)
    assert done.returncode == code and expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_pipe_whose_reader_has_enough(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: `deploy … | head -1` ends without a traceback, and without words of Python's own, whatever is printed. Red
    with BrokenPipeError not caught, and with what is still to be printed left to the interpreter's own flush."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(laptop.rollouts_home))
    register(laptop.rollouts_home, laptop.home / "results", "r")
    for arguments in (["--help"], ["ls"], ["ls", "--json"], ["--remote", "local"], ["status", "r"]):
        reading, writing = os.pipe()
        os.close(reading)
        # as most people have it
        process = laptop.start(*arguments, stdout=writing, env={"PYTHONUNBUFFERED": ""})
        os.close(writing)
        _, said = process.communicate(timeout=WAIT_S)
        assert said == "" and process.returncode == (1 if arguments == ["--help"] else 0), (
            arguments,
            said,
        )
