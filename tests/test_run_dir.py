"""The run directory: atomic writes, whole lines, torn ends, and a lock that tells who lives."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts import run_dir
from rollouts.run_dir import (
    EnvironmentSpec,
    ExitRecord,
    HubModel,
    LaunchPlan,
    ProcessSpec,
    RunDir,
    SmokeCheck,
    StageSpec,
    Status,
    append_jsonl,
    hold_lock,
    is_live,
    last_jsonl_row,
    read_jsonl,
    tail_lines,
    valid_run_id,
    write_json_atomic,
    write_text_atomic,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "r1")


def test_names(run: RunDir) -> None:
    """Goal: the names that docs/reference/run-directory.md gives. Red with any of them changed."""
    paths = [
        run.config,
        run.plan,
        run.code_tree,
        run.status,
        run.events,
        run.metrics,
        run.rollouts,
        run.eval,
    ]
    paths += [
        run.log("engine-0"),
        run.exit("rl", "trainer"),
        run.process("rank-1"),
        run.latest_checkpoint("sft"),
    ]
    assert [path.relative_to(run.path).as_posix() for path in paths] == [
        *(
            "config.json",
            "plan.json",
            "code/tree",
            "status.json",
            "events.jsonl",
            "metrics.jsonl",
            "rollouts.jsonl",
        ),
        *(
            "eval.jsonl",
            "logs/engine-0.log",
            "exit/rl-trainer.json",
            "processes/rank-1.json",
            "checkpoints/sft/latest",
        ),
    ]
    assert run.run_id == "r1"


@pytest.mark.parametrize("run_id", ["a", "debug-2024_1", "0x", "a" * 80])
def test_valid_run_ids(run_id: str) -> None:
    """Goal: what tmux takes as a session name. Red with the length bound lowered."""
    assert valid_run_id(run_id)


@pytest.mark.parametrize(
    "run_id", ["", "a.b", "a:b", "-a", "_a", "a b", "../x", "a/b", "a\n", "é", "a" * 81]
)
def test_run_ids_that_tmux_or_a_path_would_misread(run_id: str) -> None:
    """Goal: no dot or colon (tmux), no slash, no leading dash, no newline at the end. Red with `match` in place of
    `fullmatch`."""
    assert not valid_run_id(run_id)


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: ROLLOUTS_HOME, else ~/.rollouts; an empty variable counts as none. Red with `get(..., default)`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROLLOUTS_HOME", "")
    assert run_dir.home_dir() == tmp_path / ".rollouts"
    monkeypatch.setenv("ROLLOUTS_HOME", "~/elsewhere")
    assert run_dir.home_dir() == tmp_path / "elsewhere"


def test_the_plan_survives_json() -> None:
    """Goal: the launch plan is data: what was planned is what the host reads. Red with a nested record left a dict,
    also in `smoke`."""
    process = ProcessSpec(
        window="trainer", argv=["a"], env={"B": "c"}, ready_url=None, ready_timeout_s=1.5
    )
    stage = StageSpec(
        name="rl", engines=[process], trainer=process, timeout_s=9.0, needs_checkpoint="/x"
    )
    environment = EnvironmentSpec(
        name="trainer",
        path="/e",
        installer="pip",
        base_python="/p",
        requirements=["torch"],
        requirements_no_deps=[],
        constraints="",
    )
    plan = LaunchPlan(
        run_id="r1",
        experiment_name="x",
        home="/h",
        run_path="/h/runs/r1",
        base_python="/p",
        environments=[environment],
        stages=[stage],
        bootstrap_timeout_s=1.0,
        stop_grace_s=2.0,
        engine_restarts_max=3,
        engine_hang_timeout_s=4.0,
        models=[HubModel(name="a/b", weights=True)],
        smoke=[SmokeCheck(process=process, timeout_s=5.0, marker="/e/.smoke-1", subject="cpu")],
    )
    assert LaunchPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_records_that_are_not_there(run: RunDir) -> None:
    """Goal: a missing file is None, never a made-up state. Red with a default record."""
    assert run_dir.read_status(run) is None
    assert run_dir.read_exit(run, "rl", "trainer") is None
    assert run_dir.read_plan(run) is None
    assert read_jsonl(run.events) == [] and last_jsonl_row(run.events) is None
    assert tail_lines(run.log("trainer"), 50) == []
    assert not is_live(run)


def test_records_come_back(run: RunDir) -> None:
    """Goal: what was written is read, types included. Red with a field dropped."""
    status = Status(
        run_id="r1",
        experiment_name="x",
        state="running",
        stage=None,
        message="né",
        started_at=1.5,
        updated_at=2.5,
        exit_code=None,
    )
    write_json_atomic(run.status, status)
    assert run_dir.read_status(run) == status
    record = ExitRecord(window="trainer", exit_code=None, signal=9, started_at=1.0, ended_at=2.0)
    write_json_atomic(run.exit("rl", "trainer"), record)
    assert run_dir.read_exit(run, "rl", "trainer") == record


@pytest.mark.parametrize(
    ("exit_code", "signum", "code"), [(0, None, 0), (7, None, 7), (None, 9, 137), (None, None, 128)]
)
def test_the_code_as_a_shell_gives_it(exit_code: int | None, signum: int | None, code: int) -> None:
    """Goal: a signal is never 0, nor is a record without either. Red with `exit_code or 0`."""
    record = ExitRecord(
        window="w", exit_code=exit_code, signal=signum, started_at=0.0, ended_at=1.0
    )
    assert record.code == code


def test_a_write_replaces_the_file_whole(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: a reader sees old or new, and a write that fails leaves the old. Red with the file opened for writing."""
    write_text_atomic(run.status, "old")
    seen = []
    thread_done = threading.Event()

    def read() -> None:
        while not thread_done.is_set():
            seen.append(run.status.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(200):
        write_text_atomic(run.status, f"{index}" * 5000)
    thread_done.set()
    reader.join()
    assert all(
        text == "old" or (text and len(text) % 5000 == 0 and len(set(text)) <= 3) for text in seen
    )
    monkeypatch.setattr(
        os,
        "fsync",
        lambda _descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(run.status, "new")
    assert run.status.read_text() == "199" * 5000


def test_secrets_have_their_mode_from_the_first_moment(run: RunDir) -> None:
    """Goal: the temporary file is 0600 too: the mode is given to open, not set afterwards. Red with chmod after."""
    seen: list[int] = []
    original = os.fsync

    def spy(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_mode & 0o777)
        original(descriptor)

    os.fsync = spy
    try:
        write_json_atomic(run.secrets, {"A": "b"}, mode=0o600)
    finally:
        os.fsync = original
    assert seen == [0o600] and run.secrets.stat().st_mode & 0o777 == 0o600


def _append_many(path: str, name: str) -> None:
    for index in range(300):
        append_jsonl(Path(path), {"from": name, "index": index, "pad": name * 500})


def test_several_writers_never_mix_lines(run: RunDir) -> None:
    """Goal: supervisor and trainer append to the same events. Red with the line written in two writes."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(str(run.events), name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = read_jsonl(run.events)
    assert len(rows) == 900
    for name in "abc":
        assert [row["index"] for row in rows if row["from"] == name] == list(range(300))


@settings(max_examples=60)
@given(rows=st.lists(st.text(max_size=30), max_size=12), torn=st.integers(0, 40))
def test_a_torn_last_line_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], torn: int
) -> None:
    """Goal: cut anywhere, a file gives its complete lines, and `last_jsonl_row` the last of them. Red with the last
    line taken whether or not it ends."""
    path = tmp_path_factory.mktemp("torn") / "x.jsonl"
    append_jsonl(path, *({"text": text} for text in rows))
    data = path.read_bytes()
    data = data[: max(0, len(data) - torn)]
    path.write_bytes(data)
    whole = data.count(b"\n")
    assert [row["text"] for row in read_jsonl(path)] == rows[:whole]
    last = last_jsonl_row(path)
    assert (last["text"] if last else None) == (rows[whole - 1] if whole else None)


def test_the_last_row_of_long_lines(run: RunDir) -> None:
    """Goal: a last line longer than the block that is read from the end. Red with only the block looked at."""
    append_jsonl(run.rollouts, {"a": 1}, {"long": "x" * 200_000})
    last = last_jsonl_row(run.rollouts)
    assert last is not None and len(last["long"]) == 200_000


def test_tail_lines(run: RunDir) -> None:
    """Goal: exactly the last lines, invalid UTF-8 included, however long the log. Red with the count off by one."""
    path = run.log("trainer")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(b"line %d \xff\n" % index for index in range(5000)))
    assert tail_lines(path, 50) == [f"line {index} \ufffd" for index in range(4950, 5000)]
    assert len(tail_lines(path, 10_000)) <= 5000


def test_record_process(run: RunDir) -> None:
    """Goal: a rank's record is of itself. Red with the parent's id."""
    text = (
        "import sys; from pathlib import Path; from rollouts import run_dir\n"
        "run_dir.record_process(run_dir.RunDir(Path(sys.argv[1])), 'rank-0')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text, str(run.path)], start_new_session=True
    ) as child:
        child.wait()
    record = json.loads(run.process("rank-0").read_text())
    assert (record["name"], record["pid"], record["pgid"]) == ("rank-0", child.pid, child.pid)


HOLD = """
import sys, time
from pathlib import Path
from rollouts import run_dir
lock = run_dir.hold_lock(run_dir.RunDir(Path(sys.argv[1])))
print("held" if lock else "refused", flush=True)
time.sleep(600)
"""


def test_the_lock_falls_free_with_its_holder(run: RunDir) -> None:
    """Goal: one holder; live while it lives; kill -9 frees it, and wakes whoever waits. Red with a lock file whose
    existence is the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        assert is_live(run) and hold_lock(run) is None
        woken = threading.Event()
        waiter = threading.Thread(
            target=lambda: (run_dir.wait_until_dead(run), woken.set()), daemon=True
        )
        waiter.start()
        assert not woken.wait(0.2)
        child.send_signal(signal.SIGKILL)
        assert woken.wait(200)
    assert not is_live(run)
    lock = hold_lock(run)
    assert lock is not None
    lock.close()


def test_readers_do_not_keep_a_supervisor_out(run: RunDir) -> None:
    """Goal: `is_live` holds the lock for an instant; a supervisor that starts meanwhile still gets it. Red with a
    single try."""
    run.path.mkdir(parents=True)
    run.lock.touch()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            is_live(run)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(20):
            lock = hold_lock(run)
            assert lock is not None
            lock.close()
    finally:
        done.set()
        for reader in readers:
            reader.join()
