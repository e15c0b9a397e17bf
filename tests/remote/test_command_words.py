"""What people type after `deploy`: near spellings, options of another verb, paths that are no config. Pure."""

from pathlib import Path

import pytest
import typer.main

import deploy
from rollouts.config import ConfigError, changed, load_config
from rollouts.remote.command_line import with_verb
from rollouts.remote.errors import DeployError
from rollouts.remote.read_config import read_config
from tests.remote.hosts import ROOT

VERBS = {"ls", "status", "attach", "logs", "stop", "pull", "forget", "run-config", "check-host"}
DEMO = "configs/00_cpu_sft_rl.py"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--plam x.py", "`deploy CONFIG` has no option --plam. Did you mean --plan?"),
        ("x.py --window trainer", "`deploy CONFIG` has no option --window. Options: --remote,"),
        ("--windw trainer logs last", "Did you mean --window?"),
        ("x.py --run_id=a", "Did you mean --run-id?"),
        ("x.py -x", "`deploy CONFIG` has no option -x."),
        (
            "--remote h --plan",
            "`deploy --remote HOST` has no option --plan. It belongs to `deploy CONFIG`.",
        ),
        ("cpu_sft_rl", f"Did you mean `deploy {DEMO}`?"),
        ("00_cpu_sft_rl", f"Did you mean `deploy {DEMO}`?"),
        ("last", "Did you mean `deploy attach last` or `deploy status last`?"),
    ],
)
def test_words_that_are_near_to_something(
    line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: what was meant is said, in the words of this command's help. Red with such lines handed to the parser: its
    message is of `deploy run-config`, a verb that nobody has heard of, and of no config."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError) as caught:
        with_verb(line.split(), VERBS)
    assert expected in str(caught.value)
    assert "run-config" not in str(caught.value) and "check-host" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x.py --help", "--help"),
        ("x.py --run-id a --json --detach", "run-config x.py --run-id a --json --detach"),
        ("--remote=h --accept-new-host-key", "check-host --remote=h --accept-new-host-key"),
        ("--run-id x -- -odd.py", "run-config --run-id x -- -odd.py"),
    ],
)
def test_lines_that_go_through(line: str, expected: str) -> None:
    """Goal: options with their values, help, and a file whose name begins with a dash. Red (help) with the page of
    `run-config`, which nobody has heard of."""
    assert with_verb(line.split(), VERBS) == expected.split()


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_its_terminal(columns: int) -> None:
    """Goal: no line of a help page wraps at 80 columns. Red with a page that is always 118 wide."""
    command = typer.main.get_command(deploy.app)
    names: list[str] = [name for name, verb in command.commands.items() if not verb.hidden]  # type: ignore[attr-defined]
    with command.make_context("deploy", ["ls"], terminal_width=columns) as context:
        pages = [command.get_help(context)]
        for name in names:
            verb = command.commands[name]  # type: ignore[attr-defined]
            pages.append(verb.get_help(type(context)(verb, info_name=name, parent=context)))
    wide = [line for page in pages for line in page.splitlines() if len(line) > columns]
    assert len(pages) > 8 and wide == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("configs/00_cpu_sft_rl.p", f"no such file. Did you mean {DEMO}?"),
        ("config/00_cpu_sft_rl.py", f"no such file. Did you mean {DEMO}?"),
        ("README.md", "README.md: is not a config: that is a .py file"),
        ("configs/data/letters/test.jsonl", "is not a config"),
        ("/bin/ls", "/bin/ls: is not a config: "),
        ("/dev/null", "/dev/null: is not a plain file"),
        ("configs", "configs: is a directory; a config is a .py file"),
    ],
)
def test_files_that_are_no_config(
    path: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the message says what the path is, and the nearest config. Red with the file executed: README.md was an
    "invalid decimal literal" in line 6."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value) and "None" not in str(caught.value)


def test_directories_that_are_no_run(tmp_path: Path) -> None:
    """Goal: a folder of configs, or of runs, says which of them could be meant. Red with "no such file" alone."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.py").touch()
    for run in ("r-1", "r-2"):
        (tmp_path / "runs/r" / run).mkdir(parents=True)
        (tmp_path / "runs/r" / run / "config.json").touch()
    for folder, meant in (("configs", "configs/mine.py"), ("runs/r", "runs/r/r-2")):
        with pytest.raises(DeployError) as caught:
            read_config(str(tmp_path / folder))
        assert f"for example: deploy {tmp_path}/{meant}" in caught.value.problems[0].fix
    with pytest.raises(DeployError, match="no run's"):
        read_config(str(tmp_path))


def test_a_config_that_loads_itself(tmp_path: Path) -> None:
    """Goal: one sentence with the chain, for a file that derives from itself, or from one that derives from it. Red
    with Python's limit for it: a thousand times the same file and line."""
    text = (
        "from base_config import changed, load_config\nconfig = changed(load_config({!r}), {{}})\n"
    )
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(text.format(str(b)))
    b.write_text(text.format(str(a)))
    for _ in range(2):  # nothing of the first try is left
        with pytest.raises(
            ConfigError, match=r"a\.py:2: .*b\.py:2: .*a\.py: loads itself: a\.py -> b\.py -> a\.py"
        ):
            load_config(a)


def test_every_wrong_path_of_a_change_at_once() -> None:
    """Goal: one try shows them all, each with its nearest. Red with the first raised."""
    demo = load_config(ROOT / DEMO)
    with pytest.raises(ConfigError) as caught:
        changed(demo, {"rl.sampling.sed": 1, "rl.sampling.seed": 2, "engin.kind": "vllm"})
    assert [line.partition(":")[2] for line in str(caught.value).splitlines()] == [
        " 'rl.sampling.sed': SamplingConfig has no field 'sed'; did you mean 'seed'?",
        " 'engin.kind': Config has no field 'engin'; did you mean 'engine'?",
    ]
