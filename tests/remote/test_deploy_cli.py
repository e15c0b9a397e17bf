"""The command line itself: what is a config and what a verb, bad configs, help, JSON, and what is never imported."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from base_config import load_config
from rollouts import run_dir
from rollouts.remote.command_line import with_verb
from tests.example_config import example_config
from tests.remote.hosts import ROOT, Laptop, write_config

VERBS = {"ls", "status", "attach", "logs", "stop", "pull", "run-config", "check-host"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x.py", "run-config x.py"),
        ("x.py --plan", "run-config x.py --plan"),
        ("--plan --remote h x.py", "run-config --plan --remote h x.py"),
        ("--remote=h x.py", "run-config --remote=h x.py"),
        ("ls", "ls"),
        ("--remote h ls", "ls --remote h"),
        ("--json ls --remote h", "ls --json --remote h"),
        ("logs r -f --window trainer", "logs r -f --window trainer"),
        ("./ls", "run-config ./ls"),
        ("--remote h", "check-host --remote h"),
        ("--remote=h --json", "check-host --remote=h --json"),
        ("--help", "--help"),
        ("--remote h --help", "--remote h --help"),
        ("", "--help"),
    ],
)
def test_config_or_verb(line: str, expected: str) -> None:
    """Goal: the first word decides, wherever options are. Red with an option's value taken for the first word."""
    assert with_verb(line.split(), VERBS) == expected.split()


BAD_CONFIGS = [
    ("missing", None, ["bad.py: no such file"]),
    ("empty", "", ["defines no `config`"]),
    ("wrong type", "config = 3\n", ["`config` is int, needs to be a Config of rollouts.config"]),
    ("syntax", "a = 1\nconfig = (\n", ["bad.py:2: ", "config = ("]),
    ("raises", "x = 1\nraise ValueError('boom')\n", ["bad.py:2: ValueError: boom"]),
    (
        "missing fields",
        "from base_config import *\nconfig = ModelConfig(name='x')\n",
        ["bad.py:2", "ModelConfig needs"],
    ),
]


@pytest.mark.parametrize(
    ("text", "expected"), [c[1:] for c in BAD_CONFIGS], ids=[c[0] for c in BAD_CONFIGS]
)
def test_bad_configs(text: str | None, expected: list[str], laptop: Laptop) -> None:
    """Goal: a config that cannot be read is shown with its line, exit 2, nothing written. Red with our traceback."""
    if text is not None:
        (laptop.project / "bad.py").write_text(text)
    done = laptop.deploy("bad.py", "--remote", "never-asked.invalid")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr
    assert (
        done.stderr.endswith("Nothing was started.\n")
        and not (laptop.rollouts_home / "registry").exists()
    )


def test_every_problem_of_a_config_at_once(laptop: Laptop) -> None:
    """Goal: all reasons in one go, as text and as JSON. Red with the first raised."""
    config = write_config(
        laptop.project, rl__num_samples=1, data__sft_mixture=[], target__gpu_ranks="0"
    )
    done = laptop.deploy(str(config))
    assert (
        done.returncode == 2
        and "target.gpu_ranks='0'" in done.stderr
        and "rl.num_samples=1" in done.stderr
    )
    as_json = laptop.deploy(str(config), "--json")
    error = json.loads(as_json.stdout)
    assert (
        as_json.returncode == error["exit_code"] == 2
        and error["type"] == "error"
        and error["started"] is False
    )


def test_a_plan_touches_nothing(laptop: Laptop) -> None:
    """Goal: --plan shows the steps and their reasons, and writes no file. Red with the registry written first."""

    def files() -> list[Path]:
        roots = (laptop.home, laptop.project)
        return sorted(
            p
            for root in roots
            for p in root.rglob("*")
            if ".git" not in p.parts and "pycache" not in str(p)
        )

    config = str(write_config(laptop.project))
    before = files()
    done = laptop.deploy(config, "--plan")
    assert done.returncode == 0 and "1. sync" in done.stdout and "because: " in done.stdout
    plan = laptop.json(config, "--plan")
    assert plan["type"] == "plan" and plan["problems"] == [] and len(plan["launch"]["stages"]) == 2
    assert files() == before


def test_a_config_is_shown_whole(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: --show prints a config file, with --json its JSON, and needs no repository. Red with the look for one."""
    config = write_config(laptop.project)
    done = laptop.deploy(str(config), "--show", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "shown.py").write_text(done.stdout)
    assert load_config(tmp_path / "shown.py") == load_config(config)
    assert laptop.json(str(config), "--show") == json.loads(config.read_text())


def test_a_plan_with_problems_shows_both(laptop: Laptop) -> None:
    """Goal: --plan prints what would happen and every reason against it, exit 2. Red with the steps left out."""
    config = str(write_config(laptop.project, host__disk_free_gib_min=1e9))
    done = laptop.deploy(config, "--plan")
    assert done.returncode == 2 and "1. sync" in done.stdout and "GiB of disk left" in done.stderr


def test_outside_of_a_repository(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: the message says what to run from. Red with git's."""
    (tmp_path / "empty").mkdir()
    done = laptop.deploy(str(write_config(laptop.project)), cwd=tmp_path / "empty")
    assert done.returncode == 2 and "not in a git repository" in done.stderr


def test_unknown_runs(laptop: Laptop) -> None:
    """Goal: every verb on a run that is not there says so. Red with a KeyError."""
    for verb in ("status", "attach", "logs", "stop", "pull"):
        done = laptop.deploy(verb, "nope")
        assert done.returncode == 2 and "there is no run 'nope' on local" in done.stderr, verb


def test_a_run_name_in_use_here(laptop: Laptop) -> None:
    """Goal: a name that is taken is refused with the fix. Red with the registry entry overwritten."""
    config = str(write_config(laptop.project, output__mode="sft"))
    assert laptop.deploy(config, "--run-id", "twice").returncode == 0
    done = laptop.deploy(config, "--run-id", "twice")
    assert done.returncode == 2 and "run id 'twice' is in use on local" in done.stderr
    shutil.rmtree(laptop.rollouts_home / "runs/twice")
    done = laptop.deploy(config, "--run-id", "twice")
    assert done.returncode == 2 and "run id 'twice' is in use here" in done.stderr
    assert "deploy attach twice" in done.stderr
    assert laptop.deploy("tag", "twice", "paper").returncode == 0
    done = laptop.deploy(config, "--run-id", "paper", "--plan")
    assert done.returncode == 2 and "run id 'paper' is a tag of twice" in done.stderr


@pytest.mark.parametrize("earlier", ["config.json", "plan.json"])
def test_a_run_that_an_earlier_version_prepared(laptop: Laptop, earlier: str) -> None:
    """Goal: attach to a run that was planned with other fields and never launched says so, in one error. Red with the
    ConfigError, and the plan's TypeError, let through."""
    here = laptop.home / "results"
    entry = {
        "run_id": "old",
        "experiment_name": "example",
        "target": "local",
        "home": str(laptop.rollouts_home),
    }
    entry |= {"run_path": str(laptop.rollouts_home / "runs" / "old"), "local_dir": str(here)}
    run_dir.write_json_atomic(
        laptop.rollouts_home / "registry" / "old.json",
        {**entry, "repository": str(laptop.project), "created_at": 0.0},
    )
    run_dir.write_json_atomic(here / "plan.json", {"environments": [], "stages": []})
    config = {} if earlier == "config.json" else example_config().to_json()
    run_dir.write_json_atomic(here / "config.json", config)
    done = laptop.deploy("attach", "old")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "old was never launched, and another version of this program planned it" in done.stderr
    assert "Nothing was started." in done.stderr


def test_a_port_in_use(laptop: Laptop) -> None:
    """Goal: the engine's port is checked on the host before anything starts. Red with the check left out."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = laptop.deploy(str(write_config(laptop.project, engine__sglang_port=port)))
    assert done.returncode == 2 and f"port {port} is in use" in done.stderr


def test_help_reads_like_a_page(laptop: Laptop) -> None:
    """Goal: purpose, examples, files and exit codes; every verb has its own. Red with an empty page."""
    page = laptop.deploy("--help")
    assert page.returncode == 0 and page.stdout == laptop.deploy().stdout
    for part in (
        "--remote gpu-7 --plan",
        "deploy attach RUN",
        "Exit codes:",
        "130",
        "Files:",
        "--accept-new-host-key",
    ):
        assert part in page.stdout
    assert max(map(len, page.stdout.splitlines())) <= 120
    for verb in ("ls", "status", "attach", "logs", "stop", "pull"):
        assert f"Usage: deploy {verb}" in laptop.deploy(verb, "--help").stdout


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["ls", "--json"]])
def test_what_quick_commands_import(arguments: list[str], laptop: Laptop) -> None:
    """Goal: help and ls stay quick: no SSH, no live display, no torch. Red with ssh.py imported at the top."""
    code = (
        "import sys, deploy\n"
        f"sys.argv = ['deploy', *{arguments!r}]\n"
        "try: deploy.main()\nexcept SystemExit as e: assert not e.code, e\n"
        "slow = ('torch', 'transformers', 'datasets', 'paramiko', 'fabric', 'invoke', 'rich.live', 'asyncio')\n"
        "print([name for name in slow if name in sys.modules], file=sys.stderr)\n"
    )
    environment = {**os.environ, "HOME": str(laptop.home)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip() == "[]"


def test_the_other_names(laptop: Laptop) -> None:
    """Goal: `python -m rollouts` and the plain script are the same command. Red without rollouts/__main__.py."""
    environment = {**os.environ, "HOME": str(laptop.home)}
    for command in (["-m", "rollouts", "ls"], ["deploy.py", "ls"]):
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "no runs\n"), done.stderr


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_a_live_display_on_a_terminal(laptop: Laptop, terminal: tuple[int, int]) -> None:
    """Goal: on a terminal, phases and a progress bar, then the table. Red with isatty turned round."""
    ours, theirs = terminal
    config = str(write_config(laptop.project, env={"STAND_IN_STEP_S": "0.3"}))
    process = laptop.start(config, "--run-id", "tty", stdout=theirs, env={"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    for part in (
        "environment trainer",
        "sft",
        "3/3",
        "eta",
        "reward_mean",
        "━",
        "exact_match",
        "tty: done, exit code 0",
    ):
        assert part in text, part


def test_the_example_config_is_plannable() -> None:
    """Goal: what these tests build on has no problem itself. Red with a field of it broken."""
    assert example_config().problems() == ()
