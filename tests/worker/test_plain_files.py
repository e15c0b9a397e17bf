"""A pipe, a socket, a device or a directory where a run's file should be: nothing waits for it, and it is said."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.plain_files import NotPlainFileError, open_plain
from rollouts.run_dir import RunDir
from tests.worker.stands import PATIENCE_S, REPOSITORY
from tests.worker.test_tail import Reader, write_status


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        cwd = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            made.bind(path.name)
        finally:
            os.chdir(cwd)


def make_linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("a-pipe"))
    path.symlink_to("a-pipe")


ODD: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "directory": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a pipe": make_linked_pipe,
}
odd = pytest.mark.parametrize("kind", ODD)


@odd
@pytest.mark.parametrize(
    "name", ["logs/a.log", "metrics.jsonl", "exit/rl-trainer.json", "code/environment-x.txt"]
)
def test_tail_passes_over_what_is_no_plain_file(name: str, kind: str, tmp_path: Path) -> None:
    """Goal: the other files of the run come, the odd one is named once, and the tail ends. Red with open(): it waited
    for the pipe's other end, and took all memory for the device."""
    run = RunDir(tmp_path / "runs/r")
    write_status(run, "done", 0)
    run.lock.touch()
    for folder in ("logs", "exit", "code"):
        (run.path / folder).mkdir()
    run.log("z").write_bytes(b"the rest\n")
    ODD[kind](run.path / name)
    reader = Reader(run, {}, follow=False)
    lines = reader.process.communicate(timeout=PATIENCE_S)[0].splitlines()
    messages = [json.loads(line) for line in lines]
    assert [m["unusable"] for m in messages if "unusable" in m] == [name]
    assert [m["file"] for m in messages if "file" in m] == ["status.json", "logs/z.log"]
    assert messages[-1] == {"ended": True, "state": "done", "exit_code": 0}


def test_a_snapshot_without_end(tmp_path: Path) -> None:
    """Goal: a small file that is huge is named, and neither read whole nor sent. Red with read(): 3 GB in memory."""
    run = RunDir(tmp_path / "runs/r")
    write_status(run, "done", 0)
    run.lock.touch()
    run.exit("rl", "trainer").parent.mkdir()
    with run.exit("rl", "trainer").open("wb") as stream:
        stream.truncate(3 << 30)
    reader = Reader(run, {}, follow=False)
    out = reader.process.communicate(timeout=PATIENCE_S)[0]
    assert '"unusable":"exit/rl-trainer.json"' in out and len(out) < 10_000


READERS = """
import sys
from pathlib import Path
from rollouts import run_dir
from rollouts.remote.host.host_probe import run_rows
run = run_dir.RunDir(Path(sys.argv[1]))
for look in (run_dir.is_live, run_dir.observe, run_dir.read_launch_id, run_dir.read_plan, run_dir.read_status,
             lambda run: run_dir.read_exit(run, "rl", "trainer"), lambda run: run_dir.last_jsonl_row(run.metrics),
             lambda run: list(run_dir.iter_jsonl(run.events)), lambda run: run_dir.tail_lines(run.log("a"), 5),
             lambda run: run_dir.append_event(run, "note"), run_dir.hold_lock, run_dir.wait_until_dead,
             lambda run: run_rows(run.path.parent.parent)):
    try:
        look(run)
    except (OSError, ValueError, TypeError) as error:
        assert "plain file" in str(error) or "symbolic links" in str(error), error
print("looked")
"""


@odd
def test_no_reader_of_a_run_directory_waits(kind: str, tmp_path: Path) -> None:
    """Goal: whoever reads or appends to a run's files ends at once, each with a reason that `open` would give. Red with
    any of them opened without O_NONBLOCK."""
    run = RunDir(tmp_path / "runs/r")
    names = [
        "supervisor.lock",
        "status.json",
        "launch.json",
        "plan.json",
        "metrics.jsonl",
        "events.jsonl",
    ]
    for name in [*names, "logs/a.log", "exit/rl-trainer.json"]:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / "a-pipe").unlink(missing_ok=True)
        ODD[kind](run.path / name)
    done = subprocess.run(
        [sys.executable, "-c", READERS, str(run.path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.stdout == "looked\n", done.stderr


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_APPEND | os.O_CREAT, os.O_RDWR])
def test_what_is_opened_is_looked_at(flags: int, kind: str, tmp_path: Path) -> None:
    """Goal: the error names the path and what lies there, and a plain file opens as ever. Red with the kind unchecked:
    a pipe opened for both ways."""
    ODD[kind](tmp_path / "odd")
    with pytest.raises(NotPlainFileError, match=r"pipe|socket|directory") as caught:
        open_plain(tmp_path / "odd", flags)
    assert caught.value.filename == str(tmp_path / "odd")
    (tmp_path / "plain").touch()
    os.close(open_plain(tmp_path / "plain", flags))
    assert run_dir.read_jsonl(tmp_path / "plain") == []
