"""Shell completion as one meets it: bash and zsh with a real Tab, real fish; what is offered; how it installs."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.remote import completion
from rollouts.remote.run.tags import tag_run
from tests.remote.hosts import ROOT, WAIT_S
from tests.remote.test_gone_runs import register

needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
needs_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a config and its reward, `deploy` on the PATH, and three runs, one of them with a tag."""
    for name, value in {"HOME": tmp_path, "ROLLOUTS_HOME": tmp_path / "home"}.items():
        monkeypatch.setenv(name, str(value))
    for run_id in ("sft-one", "sft-two", "other"):
        register(tmp_path / "home", tmp_path / "results", run_id)
    tag_run("sft-two", "paper", run_ids=[])
    work = tmp_path / "work"
    (work / "jobs").mkdir(parents=True)
    (work / "jobs/mine.py").write_text("from rollouts.config import Config\nconfig: Config = 1\n")
    (work / "jobs/my_reward.py").write_text("def score(): ...\n")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/deploy"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {ROOT}/deploy.py "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(work)
    return work


def fish(line: str) -> list[str]:
    """What fish offers for a line, without what it says of each."""
    done = subprocess.run(
        ["fish", "-c", f"complete -C {shlex.quote(line)}"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    return [offer.partition("\t")[0] for offer in done.stdout.splitlines()]


def install(shell: str) -> None:
    done = subprocess.run(
        ["deploy", "--install-completion", shell], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and f"{shell} completion installed" in done.stdout, done.stderr


QUIET = {"bash": "bind 'set bell-style none'", "zsh": "unsetopt zle_bracketed_paste prompt_sp beep"}


def after_tab(shell: str, *typed: str) -> list[str]:
    """What stands on the line after each text was typed, Tab pressed and a + typed, in an interactive shell with the
    user's rc: zsh takes a space away again that nothing follows."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PS1="", TERM="dumb", INPUTRC="/dev/null")
        os.execvp(shell, [shell, "-i"])
    lines = []
    try:
        read_until(terminal, "READY", f"PS1=; {QUIET[shell]}; echo REA''DY\n".encode())
        for text in typed:
            # Ctrl-A and `echo "` make the completed line an argument, which is printed whole
            os.write(terminal, text.encode() + b"\t+")
            said = read_until(terminal, "<\r\n", b"\x01echo '>\x05<'\n")
            lines.append(said.rpartition("\n>")[2].partition("<")[0].removesuffix("+"))
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    return lines


def read_until(terminal: int, mark: str, keys: bytes) -> str:
    """Press keys, and return what the terminal shows until the mark stands there twice: as typed, and as printed."""
    os.write(terminal, keys)
    said, deadline = "", time.monotonic() + WAIT_S
    while mark not in said and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 4096).decode(errors="replace")
    return said


@pytest.mark.parametrize("shell", ["bash", pytest.param("zsh", marks=needs_zsh)])
def test_a_real_tab(shell: str, desk: Path) -> None:
    """Goal: after --install-completion a new shell completes, at its first Tab too, verbs, runs, tags, options, fields,
    configs, and files of a run, which it quotes; no space follows what is to be gone on with. Red with `bash` taken for
    a config, with the beginning of a line refused as a whole one is, and with typer's own scripts: `other: `, and in
    bash nothing after it, in zsh nothing at the first Tab."""
    install(shell)
    files = desk.parent / "results/other"
    (files / "a b$").touch()
    (files / "logs").mkdir(exist_ok=True)
    (files / "logs/trainer.log").touch()
    typed = {
        "deploy stat": "deploy status ",
        "deploy status oth": "deploy status other ",
        "deploy rm other pap": "deploy rm other paper ",
        "deploy jobs/mi": "deploy jobs/mine.py ",
        "deploy jobs/mine.py --det": "deploy jobs/mine.py --detach ",
        "deploy --remote h --run-id x --det": "deploy --remote h --run-id x --detach ",
        "deploy jo": "deploy jobs/",
        "deploy resume last --set rl.matrix_l": "deploy resume last --set rl.matrix_lr=",
        "deploy resume last --set=rl.matrix_l": "deploy resume last --set=rl.matrix_lr=",
        "deploy ls --state failed,die": "deploy ls --state failed,died ",
        "deploy cp oth": "deploy cp other:",
        "deploy cp other:con": "deploy cp other:config.json ",
        "deploy cp other:lo": "deploy cp other:logs/",
        "deploy cp other:logs/": "deploy cp other:logs/trainer.log ",
        "deploy cp other:a": r"deploy cp other:a\ b\$ ",
        r"deploy cp other:a\ b": r"deploy cp other:a\ b\$ ",
        "deploy cp other@1:con": "deploy cp other@1:config.json ",
    }
    assert dict(zip(typed, after_tab(shell, *typed), strict=True)) == typed


@needs_fish
def test_fish(desk: Path) -> None:
    """Goal: likewise in fish, which shows all that fits; a file that is not a config is none. Red with every .py."""
    install("fish")
    assert {"status", "stop", "ssh", "sweep"} <= {*fish("deploy s")}
    assert fish("deploy attach sft") == ["sft-one", "sft-two"]
    assert fish("deploy --remote gpu-7 logs -f pa") == ["paper"]
    assert fish("deploy jobs/") == ["jobs/mine.py"]
    assert fish("deploy cp oth") == ["other:"]
    assert fish("deploy cp other:con") == ["other:config.json"]
    assert fish("deploy ls --state failed,d") == ["failed,died", "failed,done"]
    assert fish("deploy --ru") == ["--run-id"]
    assert "rl.baseline.gamma" in fish("deploy explain rl.baseline.")


def test_a_start_up_file_of_another_encoding(desk: Path) -> None:
    """Goal: a .bashrc that is not UTF-8 stays, and the message says what to do. Red with what the codec says."""
    (desk.parent / ".bashrc").write_bytes(b"# caf\xe9\n")
    done = subprocess.run(
        ["deploy", "--install-completion", "bash"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "start-up file is not UTF-8" in done.stderr, done.stderr
    assert (desk.parent / ".bashrc").read_bytes() == b"# caf\xe9\n"


def test_many_files(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: of a large directory those that begin so are offered, wherever they stand in it. Red with the first files
    alone looked at."""
    monkeypatch.setattr(completion, "FILES_MAX", 3)
    for name in "abcde":
        (desk.parent / "results/other" / name).touch()
    (desk / "zz.py").write_text("config = 1\n")
    assert completion.run_files("other:e") == ["other:e"]
    assert completion.run_files("other:") == ["other:a", "other:b", "other:c"]
    assert completion.config_files("zz") == ["zz.py"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--show-completion", "tcsh"], "not 'tcsh'. For example: deploy --show-completion bash"),
        (["--install-completion", "bash", "fish"], "not 'bash fish'"),
        (["--install-completion", "bash"], "So nothing is installed."),
    ],
)
def test_a_shell_that_it_is_not_for(arguments: list[str], said: str, desk: Path) -> None:
    """Goal: one message that names the shells, or the file that cannot be written, and no traceback. Red with typer's
    own words for it: `Shell tcsh not supported.`"""
    (desk.parent / ".bashrc").mkdir()
    done = subprocess.run(["deploy", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_be_read_is_left_out(desk: Path, tmp_path: Path) -> None:
    """Goal: Tab never fails: without a registry, in a directory that is gone, for a run that is not known."""
    shutil.rmtree(tmp_path / "home")
    asked: list[Callable[[str], list[str]]] = [
        *(completion.run_names, completion.run_files, completion.targets, completion.experiments),
        *(completion.tag_names, completion.machine_names),
    ]
    assert [complete("") for complete in asked] == [[]] * len(asked)
    assert completion.run_files("none:x") == completion.config_files("none/x") == []
    assert not (tmp_path / "home").exists(), "a look makes nothing"
