"""Damaged lines, damaged checkpoints and lost connections cost what they touch, are told, and stop no pull."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rollouts.manifest import manifest_problems, write_manifest
from rollouts.remote.errors import DeployError
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.run import checkpoints
from rollouts.remote.run.checkpoints import CheckpointPuller
from rollouts.remote.run.connection import RetryPolicy, RunConnection
from rollouts.remote.run.execute import read_launch_answer
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.pull import final_pull, pull
from rollouts.remote.run.watch import watch
from rollouts.run_dir import RunDir, append_jsonl
from rollouts.view.display import live_lines, row_line
from rollouts.view.fold import View, evaluation_table, fold
from rollouts.view.row_order import in_order
from tests.remote.hosts import wait_for
from tests.remote.test_follow import make_connection


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def say(self, phase: str, text: str) -> None:
        self.said.append(f"{phase}: {text}")

    def row(self, file: str, row: dict[str, Any], view: View) -> None:
        self.rows.append(row)

    def alive(self, doing: str) -> None:
        return None

    def close(self) -> None:
        return None


def host_run(connection: RunConnection) -> RunDir:
    return RunDir(Path(connection.entry.run_path))


def make_checkpoint(run: RunDir, path: str) -> Path:
    directory = run.path / path
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights" * 100)
    write_manifest(directory)
    append_jsonl(
        run.events, {"time": 2.0, "kind": "checkpoint", "stage": "sft", "step": 1, "path": path}
    )
    return directory


def step(number: int) -> str:
    return f"checkpoints/sft/step_{number:06d}"


TORN = [
    b'{"time":1,"kind":"no',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"\n\n[]\nnull\n17",
    b'{"time":1,"kind":"checkpoint","path":"checkpoints/sft/ste',
]


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_torn_lines_cost_themselves(torn: bytes, tmp_path: Path) -> None:
    """Goal: following and pulling leave a torn line out, say so once, and bring every checkpoint, also one whose own
    line is torn. Red with json.loads of every line: JSONDecodeError, and nothing was pulled; and without the look at
    what lies on the host: the checkpoint whose line is torn did not come."""
    connection = make_connection(tmp_path)
    run = host_run(connection)
    make_checkpoint(run, step(1))
    for file in (run.events, run.metrics, run.eval):
        with file.open("ab") as stream:
            stream.write(torn)
    make_checkpoint(run, step(2))  # glued to the torn line
    make_checkpoint(run, step(3))
    make_checkpoint(run, step(4))
    os.truncate(run.events, run.events.stat().st_size - 20)  # its own line is torn
    append_jsonl(run.events, {"time": 3.0, "kind": "note"})
    told = Told()
    result = watch(connection, told, RetryPolicy())
    assert result.state == "done" and "events.jsonl that are not JSON objects" in result.notes[0]
    final_pull(connection, told.say)
    assert pull(connection, told.say).state == "done"
    assert all(
        manifest_problems(connection.entry.mirror.path / step(number)) == ()
        for number in (1, 2, 3, 4)
    )
    assert sum("events.jsonl that are not JSON" in text for text in told.said) == 2, told.said


def test_one_damaged_checkpoint_stops_no_other(tmp_path: Path) -> None:
    """Goal: each is tried; all that failed is told at the end, and whose fault it was. Red with the first raised."""
    connection = make_connection(tmp_path)
    run = host_run(connection)
    for number in (1, 2, 3, 4):
        make_checkpoint(run, step(number))
    (run.path / step(1) / "model.safetensors").write_bytes(b"x" * 700)
    (run.path / step(3) / "model.safetensors").unlink()
    for action in (final_pull, pull):
        with pytest.raises(DeployError) as caught:
            action(connection)
        text = caught.value.text()
        assert text.count("damaged on the host") == 2 and "Nothing was started" not in text
        assert (
            "model.safetensors: its bytes differ" in text and "model.safetensors: missing" in text
        )
    here = connection.entry.mirror.checkpoints / "sft"
    assert sorted(path.name for path in here.iterdir()) == ["latest", "step_000002", "step_000004"]


def test_files_that_cannot_be_followed_are_pulled_all_the_same(tmp_path: Path) -> None:
    """Goal: where `tail` fails on the host, results still come. Red with the pull ended by it."""
    connection = make_connection(tmp_path)
    make_checkpoint(host_run(connection), step(1))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(DeployError, match="cannot be followed"):
        pull(RunConnection(connection.entry, str(broken), connection.transport))
    assert connection.entry.mirror.metrics.exists()
    assert manifest_problems(connection.entry.mirror.path / step(1)) == ()


def failing_rsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, code: int
) -> None:
    """An rsync that is cut off the first times."""
    tools = tmp_path / "tools"
    tools.mkdir()
    real, count = shutil.which("rsync"), tmp_path / "count"
    asked = f'[ "$1" = --version ] && exec {real} "$@"'  # which is no transfer
    goes = f'[ "$(wc -l < {count})" -gt {failures} ] && exec {real} "$@"'
    (tools / "rsync").write_text(f"#!/bin/sh\n{asked}\necho x >> {count}\n{goes}\nexit {code}\n")
    (tools / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


def patience(**more: Any) -> RetryPolicy:
    return RetryPolicy(sleep=lambda seconds: None, jitter=lambda: 0.5, **more)


@pytest.mark.parametrize("code", [255, 12, 30])
def test_the_last_pull_is_tried_again(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a connection lost while pulling is made again, as while following. Red with one try."""
    connection = make_connection(tmp_path)
    make_checkpoint(host_run(connection), step(1))
    Mirror(connection.entry.mirror)
    append_jsonl(connection.entry.mirror.events, {"kind": "checkpoint", "path": step(1)})
    failing_rsync(tmp_path, monkeypatch, 3, code)
    told = Told()
    final_pull(connection, told.say, patience())
    assert (
        sum("Next try in" in text for text in told.said) == 3
        and "with local again" not in told.said
    )
    assert manifest_problems(connection.entry.mirror.path / step(1)) == ()


def test_the_search_for_a_lost_host_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: once a host is given up, the other files are not tried for as long each. Red with each of them tried."""
    connection, now = make_connection(tmp_path), [0.0]
    Mirror(connection.entry.mirror)
    append_jsonl(
        connection.entry.mirror.events,
        *({"kind": "checkpoint", "path": step(number)} for number in (1, 2, 3)),
    )
    failing_rsync(tmp_path, monkeypatch, 10**6, 255)
    clock = RetryPolicy(
        total_s=100.0, sleep=lambda s: now.__setitem__(0, now[0] + s), clock=lambda: now[0]
    )
    with pytest.raises(DeployError, match="cannot be reached") as caught:
        final_pull(connection, policy=clock)
    assert (
        "Nothing was started" not in caught.value.text()
        and caught.value.exit_code == 1
        and now[0] < 200
    )


def test_background_pulls_are_tried_again_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: a checkpoint that could not come is tried again meanwhile, and no failure is silent. Red with one try, and
    with errors that are not ours ending the thread."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    connection, said = make_connection(tmp_path), []
    run = host_run(connection)
    make_checkpoint(run, step(1))
    failing_rsync(tmp_path, monkeypatch, 2, 255)
    real = checkpoints.pull_checkpoint

    def with_a_bug(
        transport: Any, run_path: str, mirror: RunDir, path: str, **options: Any
    ) -> Path:
        return (
            real(transport, run_path, mirror, path, **options)
            if path != step(9)
            else Path(str(1 // 0))
        )

    monkeypatch.setattr(checkpoints, "pull_checkpoint", with_a_bug)
    puller = CheckpointPuller(
        LocalTransport(),
        str(run.path),
        connection.entry.mirror,
        lambda phase, text: said.append(text),
        lambda failures: 0.0,
    )
    puller.add(step(1))
    puller.add("checkpoints/../x")
    (connection.entry.mirror.path / "checkpoints").mkdir(parents=True, exist_ok=True)
    (connection.entry.mirror.path / "checkpoints/rl").write_text("a file is in the way")
    puller.add("checkpoints/rl/step_000001")
    puller.add(step(9))
    make_checkpoint(run, step(2))
    puller.add(step(2))
    for number in (1, 2):
        wait_for((connection.entry.mirror.path / step(number)).exists, f"step {number}")
    puller.finish()
    assert sum("cut off" in text for text in said) == 2
    assert len(said) == 5 and any("a link or not a directory" in text for text in said)
    assert any("deploy itself failed: ZeroDivisionError" in text for text in said)


# --- rows -----------------------------------------------------------------------------------------------------------

ODD = [
    *(None, True, 0, -1, 0.5, 10**300, 10**400, 1.7e308, -1.7e308, float("nan"), float("inf")),
    *("", "x\n\x1b", "é" * 2000, [], [1], {}, {"a": 1}),
]
EVENTS: dict[str, dict[str, Any]] = {
    "run_started": {"mode": "sft"},
    "environment": {"name": "trainer", "action": "ready", "seconds": 1.0},
    "environment_progress": {"name": "trainer", "doing": "x", "packages": 1, "seconds": 1.0},
    "stage_started": {"stage": "sft"},
    "training_started": {"stage": "sft", "step": 0, "steps_total": 9},
    "engine_ready": {"window": "engine-0", "seconds": 1.0},
    "engine_restarted": {"window": "engine-0", "reason": "it died", "restarts_left": 1},
    "checkpoint": {"stage": "sft", "step": 1, "path": "p"},
    "checkpoint_removed": {"stage": "sft", "path": "p"},
    "stage_ended": {"stage": "sft", "seconds": 1.0},
    "error": {"message": "m", "window": "trainer", "log_tail": ["x"]},
    "warning": {"message": "m"},
    "run_ended": {"state": "done", "exit_code": 0},
    "new": {"a": 1},
}
ROWS: list[tuple[str, dict[str, Any]]] = [
    *(("events.jsonl", {"time": 1.0, "kind": kind, **fields}) for kind, fields in EVENTS.items()),
    ("metrics.jsonl", {"stage": "sft", "step": 1, "time": 1.0, "loss": 1.0}),
    (
        "eval.jsonl",
        {"stage": "sft", "step": 0, "split": "test", "metric": "m", "value": 1.0, "task": "all"},
    ),
]


def show(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """All that a watcher does with rows."""
    view = View()
    for file, row in in_order(rows):
        view = fold(view, file, row)
        shown = [
            row_line(file, row, view),
            *live_lines(view, "", width=80, utf8=True, doing_s=1.0, host_now=9.0),
        ]
        assert all("\x1b" not in text and "\n" not in text for text in shown)
        assert view.eta_s is None or view.eta_s >= 0
    evaluation_table(view.evals)


@pytest.mark.parametrize(("file", "row"), ROWS, ids=[row.get("kind", file) for file, row in ROWS])
def test_no_row_is_too_odd(file: str, row: dict[str, Any]) -> None:
    """Goal: a row without one of its fields, or with another type or a number beyond all bounds in it, is folded and
    shown without an error. Red with row["x"], with numbers that are not finite, and without the look for OverflowError
    or for text that is none."""
    for name in row:
        without = {key: value for key, value in row.items() if key != name}
        for odd in (without, *({**row, name: value} for value in ODD)):
            show([*ROWS[:5], (file, odd), *ROWS[-2:]])


@pytest.mark.parametrize("first", [-1.7e308, 0.0, 10**300])
def test_times_that_no_clock_tells(first: float) -> None:
    """Goal: a rate that no number holds is left out. Red with the time to the end shown all the same: OverflowError,
    "deploy itself failed"."""
    for odd in ODD:
        metrics = {"stage": "sft", "step": 1, "time": first}
        show(
            [
                *ROWS[:5],
                ("metrics.jsonl", metrics),
                ("metrics.jsonl", {**metrics, "step": 2, "time": odd}),
            ]
        )


def test_rows_that_lack_a_field_are_counted() -> None:
    """Goal: what could not be used is known. Red with such rows passed over in silence."""
    rows = [
        {"kind": "stage_started"},
        {"kind": "training_started", "stage": "sft", "step": "x", "steps_total": 3},
    ]
    rows += [{"kind": "checkpoint", "path": 7}, {"kind": "environment", "name": "trainer"}]
    view = View()
    for row in rows:
        view = fold(view, "events.jsonl", row)
    view = fold(
        fold(view, "metrics.jsonl", {"stage": "sft"}), "eval.jsonl", {"stage": "rl", "step": 1}
    )
    assert view == View(malformed=6)
    assert json.loads(json.dumps(view.phases)) == []


def test_an_evaluation_without_a_finite_value() -> None:
    """Goal: a loss that was not a number, null in the file, is shown as such and is not damage; one that no float holds
    is. Red with the null counted as a row with a wrong field."""
    row = {"stage": "sft", "step": 3, "split": "test", "metric": "validation_loss", "value": None}
    view = fold(fold(View(), "eval.jsonl", row), "eval.jsonl", {**row, "value": 10**400})
    assert view.malformed == 1
    assert evaluation_table(view.evals) == [["", "sft"], ["validation_loss", "nan"]]


@pytest.mark.parametrize(
    "around", ["{}", "Welcome\n{}\n", "{}\n[1]\n17\nbye", '{{"a": 1}}\n{}\n{{"x": 1}}']
)
def test_the_launchers_answer_is_found(around: str) -> None:
    """Goal: what Python's own start and end print around it is passed over; no answer is an error after which it is not
    said that nothing was started. Red with the last line taken for it."""
    assert (
        read_launch_answer("gpu-7", around.format('{"started": true, "reason": ""}'))["started"]
        is True
    )
    with pytest.raises(DeployError, match="cannot be read") as caught:
        read_launch_answer("gpu-7", around.format("null"))
    assert caught.value.started
