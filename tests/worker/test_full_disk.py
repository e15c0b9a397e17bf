"""A full disk under a run directory, and lines that were torn: what is lost is what did not fit."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.run_dir import (
    QueueSpec,
    RunDir,
    append_jsonl,
    last_jsonl_row,
    read_jsonl,
    write_json_atomic,
)
from rollouts.view.growing_rows import GrowingRows
from rollouts.worker.supervise.journal import Journal
from rollouts.worker.tickets import draw, in_line
from tests.worker.stands import Host, as_status, events, log, stage, trainer, wait_for, wait_for_end

FILLING = """
import os, sys
try:
    with open(sys.argv[1] + "/filler", "wb") as file:
        while True:
            file.write(b"x" * 4096); file.flush()
except OSError as error:
    full = error
print("the very last words", flush=True)
raise full
"""


@pytest.fixture
def small_disk(private_server: None, tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], check=False
    )
    assert mounted.returncode == 0, "needs to mount a tmpfs"
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory: Path, *, leave: int = 0) -> None:
    """Fill the disk up to `leave` bytes."""
    descriptor = os.open(directory / "filler", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        while True:
            os.write(descriptor, bytes(4096))
    os.ftruncate(descriptor, os.fstat(descriptor).st_size - leave)
    os.close(descriptor)


def test_an_append_that_does_not_fit_is_taken_back(small_disk: Path) -> None:
    """Goal: after a full disk every line of a file is whole, so what was appended once there was room again is read.
    Red without the truncation: `run_ended` was glued to half a line, and the run's results were unreachable."""
    file = small_disk / "events.jsonl"
    append_jsonl(file, {"kind": "before"})
    fill(small_disk, leave=4096)
    with pytest.raises(OSError, match="No space left"):
        append_jsonl(file, {"kind": "fits"}, {"kind": "does not", "text": "x" * 20_000})
    (small_disk / "filler").unlink()
    append_jsonl(file, {"kind": "after"})
    assert [row["kind"] for row in read_jsonl(file)] == ["before", "fits", "after"]
    assert GrowingRows().read(file, bool)[1] == 0


@pytest.mark.parametrize(
    "torn",
    [b'{"time":1,"kind":"no', b"\xff\xfe\x00", b"[" * 100_000, b"7", b'"text"', b"null", b"{}{}"],
)
def test_a_torn_line_costs_itself(tmp_path: Path, torn: bytes) -> None:
    """Goal: a line that is no row, wherever it stands and whoever wrote it, is left out and counted; the next append
    begins a line of its own. Red with the last line alone tolerated: JSONDecodeError, every time."""
    file = tmp_path / "events.jsonl"
    append_jsonl(file, {"kind": "before"})
    with file.open("ab") as stream:
        stream.write(torn)
    append_jsonl(file, {"kind": "after"})
    rows, skipped = GrowingRows().read(file, bool)
    assert ([row["kind"] for row in rows], skipped) == (["before", "after"], 1)
    with file.open("ab") as stream:
        stream.write(torn + b"\n")
    assert last_jsonl_row(file) == {"kind": "after"}
    assert GrowingRows().read(file, bool)[1] == 2


def test_an_atomic_write_that_fails_leaves_nothing(small_disk: Path) -> None:
    """Goal: what did not fit, a secret above all, does not stay under a temporary name. Red without the unlink."""
    fill(small_disk, leave=4096)
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(small_disk / "secrets.json", {"TOKEN": "x" * 50_000}, mode=0o600)
    assert os.listdir(small_disk) == ["filler"]


def test_a_run_on_a_full_disk_says_so(small_disk: Path) -> None:
    """Goal: when a run fills its disk its end is written all the same: status, exit records, events, the trainer's last
    words; and the message names the disk. Red without the reserve: `running` for ever, "its window was killed"."""
    host = Host(small_disk)
    run = host.finish(stage("sft", trainer(FILLING.replace("sys.argv[1]", repr(str(small_disk))))))
    status = as_status(run)
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "no space left on device" in status["message"].lower()
    (ended,) = events(run, "run_ended")
    assert ended["message"] == status["message"]
    for name, window in (("sft", "trainer"), ("run", "supervisor")):
        record = run_dir.read_exit(run, name, window)
        assert record is not None and record.exit_code == 1
    assert "the very last words" in log(run, "trainer")
    assert not run.reserve.exists() and not run.secrets.exists()


def test_a_launch_that_does_not_fit_leaves_no_secret(small_disk: Path) -> None:
    """Goal: a launch that fails for want of room leaves no secret, under no name. Red with files that were written
    before the failure left as they were."""
    host = Host(small_disk)
    job = host.job(stage("sft", trainer("print('never')")), secrets={"TOKEN": "a-secret"})
    run = host.launched[-1]
    fill(small_disk, leave=8192)
    done = host.launch(job)
    assert done.returncode == 1 and "No space left on device" in done.stderr
    assert not run.secrets_in_memory.exists()
    left = [
        file for file in run.path.rglob("*") if file.is_file() and run.code_tree not in file.parents
    ]
    assert not any(b"a-secret" in file.read_bytes() for file in left), left


def test_a_full_disk_at_a_queued_runs_turn(small_disk: Path, tmp_path: Path) -> None:
    """Goal: the line is kept on a full disk; the run whose turn comes there fails, says why and leaves the line, and
    the next one comes. Red with the error taken for something that passes: the run waited for ever."""
    host, one = Host(small_disk), QueueSpec(cards=[], at_once=1, ports=[])
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.02)"
    holder = host.start(stage("sft", trainer(waits)), queue=one)
    wait_for(lambda: as_status(holder)["state"] == "running", "its turn")
    waiter = host.start(stage("sft", trainer("print('never')")), queue=one)
    wait_for(lambda: as_status(waiter)["state"] == "queued", "its place")
    holder.reserve.unlink()  # its end would make room
    fill(small_disk)
    ticket = draw(small_disk, "another")
    assert [found.run_id for found in in_line(small_disk)] == [waiter.run_id, "another"]
    ticket.drop()
    (tmp_path / "go").touch()
    wait_for_end(waiter)
    assert (
        as_status(waiter)["state"] == "failed"
        and "No space left on device" in as_status(waiter)["message"]
    )
    (small_disk / "filler").unlink()
    next_one = host.finish(stage("sft", trainer("print('trained')")), queue=one)
    assert as_status(next_one)["state"] == "done" and in_line(small_disk) == []


def test_a_reserve_is_given_once(small_disk: Path) -> None:
    """Goal: the reserve makes room for one write, and an error that is none of room passes. Red with any error."""
    run = RunDir(small_disk / "run")
    run.path.mkdir()
    run_dir.make_reserve(run)
    fill(small_disk)
    run_dir.write_on_full_disk(run, lambda: write_json_atomic(run.status, {"a": 1}))
    assert json.loads(run.status.read_text()) == {"a": 1} and not run.reserve.exists()
    (small_disk / "filler").unlink()
    run_dir.make_reserve(run)

    def refuse() -> None:
        raise OSError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        run_dir.write_on_full_disk(run, refuse)
    assert run.reserve.exists()


def test_the_supervisors_last_words_are_given_the_reserve(small_disk: Path) -> None:
    """Goal: the last event, with those before it that did not fit, and the final status are written on a full disk.
    Red with the reserve given for exit records alone."""
    run = RunDir(small_disk / "run")
    lock = run_dir.hold_lock(run)
    assert lock is not None
    with lock:
        journal = Journal(run, lock)
        for number in range(2):
            run_dir.make_reserve(run)
            fill(small_disk)
            if number == 0:
                journal.event("note")
                assert read_jsonl(run.events) == [] and run.reserve.exists()
                journal.event("run_ended", last=True)
            else:
                ended = run_dir.Status(
                    run_id="r",
                    experiment_name="e",
                    state="failed",
                    stage=None,
                    message="why",
                    started_at=1.0,
                    updated_at=2.0,
                    exit_code=1,
                )
                journal.status(ended)
                assert run_dir.read_status(run) == ended
            (small_disk / "filler").unlink()
    assert [row["kind"] for row in read_jsonl(run.events)] == ["note", "run_ended"]
