"""What goes wrong on this machine: its disk, its files, its locale, Ctrl-C, a bug. One message each, no traceback."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deploy
from rollouts.manifest import write_manifest
from rollouts.remote.app import exit_code
from rollouts.remote.errors import DeployError
from rollouts.remote.local_faults import as_deploy_errors
from rollouts.remote.run.checkpoints import pull_checkpoint
from rollouts.run_dir import RunDir, append_jsonl
from rollouts.view.escape import escaped, one_line
from tests.remote.hosts import WAIT_S, Laptop, wait_for, write_config
from tests.remote.test_follow import make_connection
from tests.remote.test_sync_code import small_disk


@pytest.mark.parametrize("size", ["16k", "56k", "200k"])
def test_a_full_disk_here(size: str, laptop: Laptop, tmp_path: Path) -> None:
    """Goal: whenever this machine's disk fills, the message says so, with the path and the room, and what is true of
    the run. Red with the OSError's traceback, with the host's disk named, and with "Nothing was started" of a run that
    was done."""
    with small_disk(tmp_path / "small", size) as disk:
        config = str(
            write_config(laptop.project, output__mode="sft", output__save_dir=str(disk / "out"))
        )
        done = laptop.deploy(config, "--run-id", "full")
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, (
            done.stdout + done.stderr
        )
        told = done.stdout + done.stderr
        assert "this machine's disk is full" in told and str(disk) in told and "bytes free" in told
        launched = (laptop.rollouts_home / "runs/full/status.json").exists()
        assert ("Nothing was started" in told) == (not launched) == (done.returncode == 2)
        if launched:
            assert "deploy attach full" in told or "deploy pull full" in told
            wait_for(lambda: laptop.json("status", "full")["state"] == "done", "the run's own end")
            pulled = laptop.deploy("pull", "full")
            assert pulled.returncode == 1 and "this machine's disk is full" in pulled.stderr
            assert "Nothing was started" not in pulled.stderr and "Traceback" not in pulled.stderr


def test_a_full_disk_here_while_rsync_receives(tmp_path: Path) -> None:
    """Goal: where it is rsync that finds this machine's disk full, that is told of this machine, with the path. Red
    with rsync's words taken for the host's: "local: its disk is full"."""
    connection = make_connection(tmp_path)
    checkpoint = Path(connection.entry.run_path) / "checkpoints/sft/step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(os.urandom(600_000))
    write_manifest(checkpoint)
    with small_disk(tmp_path / "small", "200k") as disk:
        with pytest.raises(OSError, match="No space left") as caught:
            pull_checkpoint(
                connection.transport,
                connection.entry.run_path,
                RunDir(disk / "m"),
                "checkpoints/sft/step_000001",
            )
        assert caught.value.errno == errno.ENOSPC and str(caught.value.filename).startswith(
            str(disk)
        )


@pytest.mark.parametrize("place", ["/proc/nowhere", "{file}/out", "/dev/null/x", "{home}/nul\x00l"])
def test_a_place_that_cannot_be_written(place: str, laptop: Laptop) -> None:
    """Goal: a save_dir that cannot be made is one message, and leaves no entry. Red with the traceback."""
    (laptop.home / "file").write_text("")
    save_dir = place.format(file=laptop.home / "file", home=laptop.home)
    config = str(write_config(laptop.project, output__mode="sft", output__save_dir=save_dir))
    done = laptop.deploy(config, "--run-id", "r")
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and "Nothing was started." in done.stderr
    )
    assert "deploy itself failed" not in done.stderr, done.stderr
    assert laptop.json("ls") == [] and not (laptop.rollouts_home / "runs/r").exists()


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])
@pytest.mark.parametrize(
    "arguments", [["ls"], ["status", "r"], ["pull", "r"], ["--remote", "local"], ["CONFIG"]]
)
def test_a_home_that_cannot_be_written(home: str, arguments: list[str], laptop: Laptop) -> None:
    """Goal: no HOME of one's own, as in some containers, is told. Red with a traceback of mkdir."""
    config = str(write_config(laptop.project, output__mode="sft"))
    line = [config if word == "CONFIG" else word for word in arguments]
    done = laptop.deploy(*line, env={"HOME": home})
    assert "Traceback" not in done.stderr and (done.returncode == 0 or "error: " in done.stderr), (
        done.stderr
    )
    assert "deploy itself failed" not in done.stderr, done.stderr


ODD = "é ✓ \U0001f600 日本"
LOCALES = [
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "latin-1"},
]


@pytest.mark.parametrize("env", [*LOCALES, {"PYTHONIOENCODING": "ascii:strict"}])
def test_terminals_that_are_not_utf_8(env: dict[str, str], laptop: Laptop) -> None:
    """Goal: text of a run is printed under any locale, what it lacks as escapes. Red with UnicodeEncodeError."""
    config = str(write_config(laptop.project, output__mode="sft"))
    assert laptop.deploy(config, "--run-id", "r", "--detach").returncode == 0
    run = RunDir(laptop.rollouts_home / "runs/r")
    wait_for(lambda: laptop.json("status", "r")["state"] == "done", "its end")
    append_jsonl(run.events, {"time": 1.0, "kind": "note", "message": ODD})
    (run.path / "logs/trainer.log").write_text(f"{ODD}\n", encoding="utf-8")
    for arguments in (("attach", "r"), ("logs", "r"), ("ls",), ("status", "r")):
        done = laptop.start(*arguments, env=env, errors="replace")
        out, err = done.communicate(timeout=WAIT_S)
        assert done.returncode == 0 and "Traceback" not in err, (arguments, out, err)
    log = (laptop.project / "runs/example/r/logs/trainer.log").read_bytes()
    assert log == f"{ODD}\n".encode()


def test_a_bug_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Goal: any exception becomes a message with its place and where its traceback lies. Red with DeployError alone
    caught."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path))

    def broken(as_json: bool) -> int:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd byte")

    code = exit_code(broken, {"as_json": False}, to_launch=True)
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: deploy itself failed: UnicodeDecodeError")
    file = Path(said.split("traceback: ")[1].splitlines()[0])
    assert (
        file.parent == tmp_path / "tracebacks"
        and "odd byte" in file.read_text()
        and file.stat().st_mode & 0o77 == 0
    )


@pytest.mark.parametrize(
    ("reached", "code", "expected"),
    [
        ("nothing", 2, "Nothing was started."),
        ("registered", 2, "`deploy attach r` goes on"),
        ("launching", 1, "is not known"),
        ("launched", 1, "the run goes on on gpu-7: `deploy attach r`"),
        ("ended", 1, "the run has ended, and its results are on gpu-7"),
    ],
)
def test_errors_say_how_far_the_run_has_come(
    reached: Any, code: int, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: "Nothing was started." only where that is so; else what goes on, and how. Red with it constant."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path))  # where tracebacks go
    for error in (
        OSError(28, "No space left on device", "/x/y"),
        DeployError("odd"),
        RuntimeError("odd"),
    ):
        with pytest.raises(DeployError) as caught, as_deploy_errors("r", "gpu-7", reached):
            raise error
        assert caught.value.exit_code == code and expected in caught.value.text()
        assert ("Nothing was started." in caught.value.text()) == (code == 2)
        bug = isinstance(error, RuntimeError)
        assert ("deploy itself failed" in caught.value.text()) is bug, (
            "a fault of this machine is none of deploy's"
        )
    with pytest.raises(DeployError) as caught, as_deploy_errors("r", "gpu-7", reached):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130 and expected in caught.value.text()


def test_ctrl_c_before_the_launch(laptop: Laptop) -> None:
    """Goal: it says that nothing was started, and exits 130. Red with nothing printed."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a host that never answers
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        process = laptop.start(
            str(write_config(laptop.project)), "--remote", target, start_new_session=True
        )
        connection, _ = silent.accept()
        with connection:
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130 and "Nothing was started." in err and "Traceback" not in err


# --- what is shown --------------------------------------------------------------------------------------------------

STEERING = [
    "\x1b]52;c;ZXZpbA==\x07",
    "\x9b2J",
    "\x1b[2J\x08\x7f",
    "\r\x1b[1A",
    "\u202eevil",
    "\u2066x\u2069",
    "\udc80",
    "\x00",
    "\x0b\x0c\x0e\x1f",
    "\u061c\u180e",
    "\u200b\u200d\u200f",
    "\u2028\u2029",
    "\u2060\u2064",
    "\ufeff\ufff9",
    "\U000e0001\U000e0041",
]


@pytest.mark.parametrize("text", STEERING)
def test_steering_characters_are_spelled_out(text: str) -> None:
    """Goal: no control character but newline and tab, no bidirectional override reaches a terminal. Red with any of
    the ranges left out."""
    shown = escaped(f"a{text}b\n\tc")
    assert not set(shown) & set(text) - set("]52;cZXpbA=[J1Aevilx2") and shown.endswith("b\n\tc")
    shown.encode()
    assert "\n" not in one_line(f"a{text}\nb") and escaped(shown) == shown


def test_text_of_hosts_and_models_is_escaped(laptop: Laptop, tmp_path: Path) -> None:
    """Goal: an event, a status, a log, and what a host says of itself steer no terminal. Red with `show` and with
    `one_line` left to print what comes, and with a log written as it is to a terminal."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uv").write_text("#!/bin/sh\nprintf 'uv \\033]52;c;ZXZpbA==\\007'\n")
    (tmp_path / "bin/uv").chmod(0o755)
    asked = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    config = str(write_config(laptop.project, output__mode="sft"))
    assert laptop.deploy(config, "--run-id", "r").returncode == 0
    run = RunDir(laptop.rollouts_home / "runs/r")
    evil = "\x1b]52;c;ZXZpbA==\x07\x9b\u202e"
    status = json.loads(run.status.read_text())
    run.status.write_text(
        json.dumps({**status, "state": "failed", "message": evil, "exit_code": 1})
    )
    row = {"time": 9e9, "kind": "error", "message": evil, "window": evil, "log_tail": [evil]}
    append_jsonl(
        run.events, row, {"time": 9e9, "kind": evil, evil: evil}, {"kind": "note", "message": evil}
    )
    append_jsonl(
        run.eval,
        {"stage": "base", "step": 0, "split": evil, "metric": evil, "task": evil, "value": 1.0},
    )
    with (run.path / "logs/trainer.log").open("a") as log:
        log.write(f"{evil}\n")
    for arguments in (
        ("attach", "r"),
        ("ls",),
        ("status", "r"),
        ("ls", "--remote", "local"),
        ("--remote", "local"),
    ):
        done = laptop.deploy(*arguments, env=asked)
        text = done.stdout + done.stderr
        assert "\\x1b]52" in text, arguments
        assert not set("\x1b\x07\x9b\u202e") & set(text), arguments
    assert evil in laptop.deploy("logs", "r").stdout, "a pipe gets the log's own bytes"
    on_terminal = subprocess.run(
        ["script", "-qec", f"{sys.executable} {deploy.__file__} logs r", "/dev/null"],
        env=laptop._environment({}),
        cwd=laptop.project,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "\\x1b]52" in on_terminal and "\x1b]52" not in on_terminal
