"""Following a run's files: every byte once, whole lines, and a last word."""

import base64
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from rollouts import run_dir
from rollouts.remote.run.mirror import Mirror
from rollouts.run_dir import RunDir, Status, append_jsonl
from rollouts.worker import tail
from tests.worker.stands import (
    PATIENCE_S,
    REPOSITORY,
    Host,
    log,
    module,
    recorded_pid,
    stage,
    trainer,
    wait_for,
)


def write_status(run: RunDir, state: Any, exit_code: int | None = None) -> None:
    run_dir.write_json_atomic(
        run.status,
        Status(
            run_id=run.run_id,
            experiment_name="test",
            state=state,
            stage="sft",
            message="",
            started_at=time.time(),
            updated_at=time.time(),
            exit_code=exit_code,
        ),
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "runs" / "tailed")
    write_status(made, "running")
    (made.path / "logs").mkdir()
    return made


@pytest.fixture
def lock(run: RunDir) -> Iterator[IO[bytes]]:
    """This test as the run's supervisor; closed, the run is dead."""
    held = run_dir.hold_lock(run)
    assert held is not None
    yield held
    held.close()


class Reader:
    """The control side: a `tail` process and the mirror that its lines make, checked for gaps and repetitions."""

    def __init__(self, run: RunDir, held: dict[str, bytes], *, follow: bool = True) -> None:
        self.held = held
        self.snapshots: dict[str, str] = {}
        self.last: dict[str, Any] = {}
        command = [
            sys.executable,
            "-m",
            "rollouts.worker.tail",
            str(run.path),
            *(["--follow"] if follow else []),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(
            json.dumps({name: len(data) for name, data in held.items()}) + "\n"
        )
        self.process.stdin.flush()

    def take(self, lines: int | None = None) -> None:
        """Read so many lines, or all until the end."""
        assert self.process.stdout is not None
        while lines is None or lines > 0:
            text = self.process.stdout.readline()
            if not text.endswith("\n"):
                return
            if (message := json.loads(text)).keys() & {"looked", "alive"}:  # comes at any time
                continue
            self.last = message
            if "data" in self.last:
                name, data = self.last["file"], base64.b64decode(self.last["data"])
                before = self.held.get(name, b"")
                assert self.last["offset"] == len(before), (
                    f"{name}: {self.last['offset']} after {len(before)} bytes"
                )
                assert 0 < len(data) <= tail.CHUNK_BYTES
                self.held[name] = before + data
            elif "snapshot" in self.last:
                self.snapshots[self.last["file"]] = self.last["snapshot"]
            if lines is not None:
                lines -= 1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def test_resuming_loses_and_repeats_nothing(run: RunDir, lock: IO[bytes]) -> None:
    """Goal: while a writer appends torn lines and binary output, the reader is killed and resumed many times from what
    it holds; at the end both sides are equal. Red with offsets counted from the file's size, and with a torn line
    sent as it stands (a resumed offset inside it is fine; whole lines are asserted in the next test)."""
    rng = random.Random(1)
    rows = b"".join(
        json.dumps({"step": i, "x": "y" * rng.randrange(3000)}).encode() + b"\n" for i in range(600)
    )
    noise = rng.randbytes(900_000)

    def write() -> None:
        with (
            run.metrics.open("ab", buffering=0) as metrics,
            run.log("trainer").open("ab", buffering=0) as log,
        ):
            sent = 0
            while sent < len(rows):
                size = rng.randrange(1, 9000)
                metrics.write(rows[sent : sent + size])
                log.write(noise[sent : sent + size])
                sent += size
                time.sleep(0.002)
            log.write(noise[sent:])
        write_status(run, "done", 0)
        lock.close()

    writer = threading.Thread(target=write)
    writer.start()
    held: dict[str, bytes] = {}
    for _ in range(5):
        reader = Reader(run, held)
        reader.take(rng.randrange(1, 6))
        reader.close()
        assert all(data.endswith(b"\n") for name, data in held.items() if name.endswith(".jsonl"))
    reader = Reader(run, held)
    reader.take()
    writer.join()
    assert reader.last == {"ended": True, "state": "done", "exit_code": 0}
    assert held["metrics.jsonl"] == rows
    assert held["logs/trainer.log"] == noise
    assert reader.process.wait(PATIENCE_S) == 0


def test_a_torn_last_line_waits_for_its_end(run: RunDir, lock: IO[bytes]) -> None:
    """Goal: of a .jsonl file only complete lines are sent; of a log all. Red with everything sent as it stands."""
    run.events.write_bytes(b'{"kind":"a"}\n{"kind":"b')
    run.log("trainer").write_bytes(b"10%\r20%")
    reader = Reader(run, {}, follow=False)
    reader.take()
    assert reader.held == {"events.jsonl": b'{"kind":"a"}\n', "logs/trainer.log": b"10%\r20%"}
    assert reader.last == {"live": True}
    with run.events.open("ab") as stream:
        stream.write(b'"}\n')
    reader = Reader(run, reader.held, follow=False)
    reader.take()
    assert reader.held["events.jsonl"] == b'{"kind":"a"}\n{"kind":"b"}\n'


def test_a_line_longer_than_a_chunk(run: RunDir) -> None:
    """Goal: a complete line of any length arrives, in chunks of bounded size, and a torn one does not. Red with the
    search for the line's end limited to the chunk: the file then stalls for ever."""
    rows = b'{"x":"' + b"y" * (3 * tail.CHUNK_BYTES + 17) + b'"}\n{"z":1}\n'
    run.rollouts.write_bytes(rows + b'{"torn":"' + b"y" * (2 * tail.CHUNK_BYTES))
    reader = Reader(run, {}, follow=False)
    reader.take()
    assert reader.held["rollouts.jsonl"] == rows


def test_a_new_row_begins_a_look(
    run: RunDir, lock: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a row is on its way at once, and its reader is told that no more come with it. Red with a look every 0.2 s
    alone, and without `looked`: the reader waited another 0.1 s for more."""
    sent: list[dict[str, Any]] = []

    class EnoughError(Exception):
        pass

    def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if "looked" in message and sent.count(message) == 1:
            append_jsonl(run.metrics, {"step": 1})
        elif "looked" in message or len(sent) > 9:
            raise EnoughError

    def sleep(seconds: float) -> None:
        assert seconds <= tail.ROW_POLL_S, "a row waits"

    monkeypatch.setattr(tail.time, "sleep", sleep)
    with pytest.raises(EnoughError):
        tail.follow(run, tail.Tail(run, {}, send), send)
    assert [message.get("file") for message in sent] == [
        "status.json",
        None,
        "metrics.jsonl",
        None,
    ]


def test_snapshots_when_they_change(run: RunDir, lock: IO[bytes]) -> None:
    """Goal: status and exit records come whole, once per change. Red with the identity not remembered."""
    reader = Reader(run, {})
    reader.take(1)
    assert json.loads(reader.snapshots["status.json"])["state"] == "running"
    run_dir.write_json_atomic(run.exit("sft", "trainer"), {"window": "trainer"})
    reader.take(1)
    assert reader.last == {
        "file": "exit/sft-trainer.json",
        "snapshot": '{\n "window": "trainer"\n}\n',
    }
    write_status(run, "failed", 3)
    reader.take(1)
    assert json.loads(reader.last["snapshot"])["exit_code"] == 3
    lock.close()
    reader.take()
    assert reader.last == {"ended": True, "state": "failed", "exit_code": 3}


def test_a_dead_supervisor_is_told(run: RunDir, lock: IO[bytes]) -> None:
    """Goal: a lock that falls free with an unfinished status is `died`, with no exit code. Red with the status
    believed."""
    lock.close()
    for follow in (True, False):
        reader = Reader(run, {}, follow=follow)
        reader.take()
        assert reader.last == {"ended": True, "state": "died", "exit_code": None}


def test_a_clock_that_was_set_back_keeps_no_run_starting(run: RunDir) -> None:
    """Goal: a launch that came to nothing before the host's clock was set back is over all the same. Red with a time
    that lies ahead taken for one that has just been: `starting` for three hours."""
    write_status(run, "starting")
    for ahead_s, state in ((10, "starting"), (3 * 3600, "died")):
        status = json.loads(run.status.read_text()) | {"updated_at": time.time() + ahead_s}
        run_dir.write_json_atomic(run.status, status)
        assert run_dir.observe(run).state == state


def test_a_run_that_is_about_to_start_is_not_dead(run: RunDir) -> None:
    """Goal: between the launcher's status and the supervisor's lock the run is live. Red with only the lock asked."""
    write_status(run, "starting")
    reader = Reader(run, {}, follow=False)
    reader.take()
    assert reader.last == {"live": True}


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (
            {"metrics.jsonl": b"x" * 100},
            "metrics.jsonl: the reader holds 100 bytes, the host has 3",
        ),
        ({"logs/gone.log": b"x"}, "logs/gone.log: the reader holds 1 bytes, the host has 0"),
        ({"secrets.json": b""}, "secrets.json: not a file that is followed"),
        ({"logs/../../../x.log": b""}, "not a file that is followed"),
    ],
)
def test_offsets_that_do_not_fit(run: RunDir, held: dict[str, bytes], said: str) -> None:
    """Goal: a mirror of something else is an error that says both sizes, exit 1. Red without the check: silence."""
    run.metrics.write_bytes(b"{}\n")
    reader = Reader(run, held)
    reader.take()
    assert said in reader.last["error"]
    assert reader.process.wait(PATIENCE_S) == 1


def test_no_run_there_and_no_offsets() -> None:
    """Goal: a wrong path, or a first line that is no JSON, is an error line. Red with a traceback."""
    done = module("tail", "/nowhere/runs/x", stdin="{}\n")
    assert done.returncode == 1 and "no run was launched there" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize(
    "line", ["x", "[]", "7", '{"logs/a.log": "0"}', '{"logs/a.log": null}', "[" * 100_000, "\x00"]
)
def test_a_malformed_first_line(line: str, run: RunDir) -> None:
    """Goal: what is no {file: bytes} is an error line that shows it. Red with the TypeError's traceback."""
    done = module("tail", str(run.path), stdin=f"{line}\n")
    assert (
        done.returncode == 1
        and "first line" in json.loads(done.stdout)["error"]
        and not done.stderr
    )


@pytest.mark.parametrize("how", ["removed", "another run's"])
def test_a_directory_that_was_put_aside(how: str, run: RunDir) -> None:
    """Goal: where the run's directory is another than at first, following ends with that, though no file that was
    followed is missing: another run's end is not told as this one's. Red without `check_directory`."""
    sent: list[dict[str, Any]] = []
    follower = tail.Tail(run, {}, sent.append)
    run.path.rename(run.path.with_name("aside"))
    if how != "removed":
        write_status(run, "done", 0)
        run.lock.touch()
    with pytest.raises(tail.OffsetError, match="removed from the host, or put aside"):
        tail.follow(run, follower, sent.append)
    assert sent == []


def test_it_ends_with_its_reader(run: RunDir, lock: IO[bytes]) -> None:
    """Goal: a laptop that vanished leaves no process behind: the end of stdin, or of stdout, ends it. Red without the
    thread that watches stdin."""
    reader = Reader(run, {})
    reader.take(1)
    assert reader.process.stdin is not None
    reader.process.stdin.close()
    assert reader.process.wait(PATIENCE_S) == 0


def test_it_says_that_it_is_alive(
    run: RunDir, lock: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a reader can tell a silent run from a dead connection. Red with the line left out."""
    monkeypatch.setattr(tail, "ALIVE_S", 0.3)
    sent: list[dict[str, Any]] = []
    follower = tail.Tail(run, {}, sent.append)
    thread = threading.Thread(target=tail.follow, args=(run, follower, sent.append), daemon=True)
    thread.start()
    wait_for(lambda: sent.count({"alive": True}) >= 2, "two signs of life")
    write_status(run, "done", 0)
    lock.close()
    thread.join(PATIENCE_S)
    assert sent[-1] == {"ended": True, "state": "done", "exit_code": 0}


def test_following_a_real_run_to_its_last_word(host: Host) -> None:
    """Goal: over a real run, everything that its files hold at the end was sent before `ended`, the supervisor's own
    last line and exit record included. Red with `ended` sent before the last files."""
    run = host.start(
        stage(
            "sft",
            trainer("import time\nfor i in range(30): print(i, flush=True); time.sleep(0.02)"),
        )
    )
    reader = Reader(run, {})
    reader.take()
    assert reader.last == {"ended": True, "state": "done", "exit_code": 0}
    for name in ("events.jsonl", "logs/trainer.log", "logs/supervisor.log"):
        assert reader.held[name] == (run.path / name).read_bytes()
    exits = {
        path.relative_to(run.path).as_posix(): path.read_text()
        for path in run.path.glob("exit/*.json")
    }
    assert set(exits) == {"exit/sft-trainer.json", "exit/run-supervisor.json"}
    assert exits.items() <= reader.snapshots.items()
    assert os.path.getsize(run.log("supervisor")) > 0


def test_the_last_words_of_a_dead_supervisors_windows(host: Host) -> None:
    """Goal: what a trainer still says and how it ended, after the supervisor was killed, comes before `ended`. Red with
    `ended` sent at the supervisor's death."""
    slow_to_end = """
import signal, sys, time
def end(*_):
    time.sleep(1); print("last words", flush=True); sys.exit(9)
signal.signal(signal.SIGTERM, end); print("up", flush=True); time.sleep(600)
"""
    run = host.start(stage("sft", trainer(slow_to_end)), stop_grace_s=20.0)
    wait_for(lambda: "up" in log(run, "trainer"), "the trainer")
    reader = Reader(run, {})
    os.kill(recorded_pid(run, "supervisor"), signal.SIGKILL)
    reader.take()
    assert reader.last == {"ended": True, "state": "died", "exit_code": None}
    assert reader.held["logs/trainer.log"] == b"up\nlast words\n"
    assert json.loads(reader.snapshots["exit/sft-trainer.json"])["exit_code"] == 9


def test_a_cut_by_a_restart(run: RunDir, tmp_path: Path) -> None:
    """Goal: a mirror holds what the host holds after a stage restarted, for one that follows and for one that comes
    again when as many rows were written anew; no row that counts is shown twice."""
    mirrors = [Mirror(RunDir(tmp_path / name)) for name in ("follows", "again")]
    shown: list[list[int]] = [[], []]

    def follower(number: int) -> tail.Tail:
        held = tail.read_offsets(json.dumps(mirrors[number].held()))
        return tail.Tail(run, held, mirrors[number].apply)

    def write(steps: range, life: int) -> None:
        for step in steps:
            run_dir.append_jsonl(run.metrics, {"stage": "sft", "step": step, "life": life})

    def follow(followers: list[tail.Tail]) -> None:
        for one in followers:
            while one.send_new():
                pass
        for mirror, steps in zip(mirrors, shown, strict=True):
            steps += [row["step"] for row in mirror.rows("metrics.jsonl")]

    write(range(1, 6), life=0)
    live = follower(0)
    follow([live, follower(1)])
    for life, step in ((1, 3), (2, 4)):
        run_dir.note_restart(run, "sft", step, f"checkpoints/sft/step_{step:06d}", first=True)
        write(range(step + 1, 8), life=life)
        follow([live])
    follow([follower(1)])
    wanted = [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 2), (7, 2)]
    assert [(row["step"], row["life"]) for row in run_dir.read_jsonl(run.metrics)] == wanted
    for mirror in mirrors:
        assert mirror.run.metrics.read_bytes() == run.metrics.read_bytes()
    assert shown == [[1, 2, 3, 4, 5, 4, 5, 6, 7, 5, 6, 7], [1, 2, 3, 4, 5, 4, 5, 6, 7]]
