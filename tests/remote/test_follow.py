"""Following over connections that break, with a host that is a real process on this machine."""

import base64
import concurrent.futures
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.run.connection import Retries, RetryPolicy, RunConnection
from rollouts.remote.run.follow import apply, follow, read_message
from rollouts.remote.run.mirror import Mirror
from rollouts.remote.run.registry import RunEntry
from rollouts.remote.run.watch import _Watching
from rollouts.run_dir import RunDir, Status, append_jsonl, hold_lock, read_status, write_json_atomic
from rollouts.view import row_order
from tests.remote.hosts import ROOT, WAIT_S, wait_for


def make_connection(tmp_path: Path, python: str = sys.executable) -> RunConnection:
    """A run that ended on this machine, whose code tree is this repository."""
    run = RunDir(tmp_path / "home/runs/r")
    run.code.mkdir(parents=True)
    run.code_tree.symlink_to(ROOT)
    run.lock.touch()
    fields: dict[str, Any] = {
        "run_id": "r",
        "experiment_name": "e",
        "state": "done",
        "stage": "rl",
        "message": "m",
    }
    write_json_atomic(run.status, Status(**fields, started_at=1.0, updated_at=1.0, exit_code=0))
    append_jsonl(run.metrics, {"step": 1}, {"step": 2})
    entry = RunEntry(
        run_id="r",
        experiment_name="e",
        target="local",
        home=str(tmp_path / "home"),
        run_path=str(run.path),
        local_dir=str(tmp_path / "mirror"),
        repository=str(ROOT),
        created_at=0.0,
    )
    return RunConnection(entry, python, LocalTransport())


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def run_follow(connection: RunConnection, said: list[str], **patience: Any) -> dict[str, Any]:
    clock = Clock()
    settings = RetryPolicy(
        sleep=clock.sleep, clock=lambda: clock.now, jitter=lambda: 0.5, **patience
    )
    return follow(
        connection,
        Mirror(connection.entry.mirror),
        lambda file: None,
        lambda phase, text: said.append(text),
        settings,
    )


def failing_python(tmp_path: Path, failures: int, how: str) -> str:
    """A python that runs `how` as often as `failures` says, then is the real one."""
    script = tmp_path / "python"
    count = tmp_path / "count"
    script.write_text(
        f'#!/bin/sh\necho x >> {count}\n[ "$(wc -l < {count})" -gt {failures} ] && exec {sys.executable} "$@"\n{how}\n'
    )
    script.chmod(0o755)
    return str(script)


def test_reconnecting_until_it_works(tmp_path: Path) -> None:
    """Goal: connections cut before and within a message are made again; the mirror is whole. Red with one try."""
    torn = """printf '{"alive":true}\\n{"file": "metr'; kill -9 $$"""
    connection = make_connection(tmp_path, failing_python(tmp_path, 3, torn))
    said: list[str] = []
    assert run_follow(connection, said) == {"ended": True, "state": "done", "exit_code": 0}
    assert sum("Next try in" in text for text in said) == 3 and any(
        "again" in text for text in said
    )
    assert connection.entry.mirror.metrics.read_text() == '{"step":1}\n{"step":2}\n'


def test_giving_up_says_how_to_attach(tmp_path: Path) -> None:
    """Goal: the search for a lost host is bounded, and ends with what to do. Red with no bound: it never returns."""
    connection = make_connection(tmp_path, failing_python(tmp_path, 10**6, "kill -9 $$"))
    with pytest.raises(DeployError) as caught:
        run_follow(connection, [], total_s=100.0)
    assert (
        "the run goes on there" in caught.value.text() and "deploy attach r" in caught.value.text()
    )
    assert "Nothing was started." not in caught.value.text() and caught.value.exit_code == 1


def test_a_worker_that_cannot_follow(tmp_path: Path) -> None:
    """Goal: an error of the host's own is shown at once, not tried for minutes. Red with every end taken for a cut."""
    connection = make_connection(
        tmp_path, failing_python(tmp_path, 10**6, "echo broken >&2; exit 3")
    )
    with pytest.raises(DeployError, match="cannot be followed") as caught:
        run_follow(connection, [])
    assert "broken" in caught.value.text()


def test_a_mirror_of_something_else(tmp_path: Path) -> None:
    """Goal: a mirror that is ahead of the host is not written over. Red with `error` messages passed over."""
    connection = make_connection(tmp_path)
    connection.entry.mirror.path.mkdir()
    connection.entry.mirror.metrics.write_text("x" * 1000)
    with pytest.raises(DeployError, match="does not fit") as caught:
        run_follow(connection, [])
    assert "move" in caught.value.text()


def test_a_laptop_that_slept_for_days_goes_on(tmp_path: Path) -> None:
    """Goal: following lasts as long as the run: each pause here is a day, and the fourth try goes on at the byte where
    the first broke. Red with the bound of a pull, 15 minutes."""
    torn = """printf '{"alive":true}\\n{"file": "metr'; kill -9 $$"""
    connection, now = make_connection(tmp_path, failing_python(tmp_path, 3, torn)), [0.0]
    bound = RetryPolicy.while_it_lasts(lambda target: "")
    policy = RetryPolicy(
        total_s=bound.total_s,
        pause_max_s=bound.pause_max_s,
        sleep=lambda seconds: now.__setitem__(0, now[0] + 86_400),
        clock=lambda: now[0],
    )
    ended = follow(
        connection,
        Mirror(connection.entry.mirror),
        lambda file: None,
        lambda phase, text: None,
        policy,
    )
    assert ended["state"] == "done" and now[0] >= 3 * 86_400
    assert connection.entry.mirror.metrics.read_text() == '{"step":1}\n{"step":2}\n'


def test_a_long_search_is_told_now_and_then(tmp_path: Path) -> None:
    """Goal: hours without a host do not fill the screen: the first ten tries are told, then every thirtieth. Red with
    each of them told."""
    said: list[str] = []
    policy = RetryPolicy(total_s=math.inf, sleep=lambda seconds: None)
    retries = Retries(make_connection(tmp_path), lambda phase, text: said.append(text), policy)
    for _ in range(65):
        retries.wait_after(TransportError("gone", lost=True))
    assert len(said) == 12 and "(60 tries)" in said[-1]


def test_rows_are_shown_at_the_end_of_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: the host tells that a look is over, and its rows are shown then. Red with that message taken for noise:
    they waited for the clock."""
    monkeypatch.setattr(row_order, "QUIET_S", 3600.0)
    shown: list[dict[str, Any]] = []

    reporter = mock.Mock()
    reporter.row = lambda file, row, view: shown.append(row)
    watching = _Watching(Mirror(RunDir(tmp_path / "mirror")), reporter, lambda path: None)
    data = base64.b64encode(b'{"step": 1}\n').decode()
    assert apply(watching.mirror, {"file": "metrics.jsonl", "offset": 0, "data": data})
    watching.on_file("metrics.jsonl")
    assert shown == []
    looked = read_message(b'{"looked":true}\n')
    assert looked is not None
    watching.on_message(looked)
    assert shown == [{"step": 1}]


def test_two_laptops_on_one_run(tmp_path: Path) -> None:
    """Goal: two that follow a live run, one of them over connections that break, both have its bytes, and neither
    changes the run. Red with the offsets of one mirror kept on the host."""
    torn = """printf '{"alive":true}\\n'; kill -9 $$"""
    first = make_connection(tmp_path, failing_python(tmp_path, 2, torn))
    second = dataclasses.replace(
        first,
        entry=dataclasses.replace(first.entry, local_dir=str(tmp_path / "other")),
        python=sys.executable,
    )
    run = RunDir(Path(first.entry.run_path))
    status = read_status(run)
    assert status is not None
    write_json_atomic(run.status, dataclasses.replace(status, state="running", exit_code=None))
    held = hold_lock(run)
    assert held is not None
    with held, concurrent.futures.ThreadPoolExecutor() as threads:
        both = [threads.submit(run_follow, connection, []) for connection in (first, second)]
        for step in range(3, 200):
            append_jsonl(run.metrics, {"step": step})
        mirrors = [connection.entry.mirror.metrics for connection in (first, second)]
        wait_for(lambda: all(mirror.exists() for mirror in mirrors), "rows on both")
        write_json_atomic(run.status, status)
        held.close()
        assert [following.result(WAIT_S)["state"] for following in both] == ["done", "done"]
    whole = run.metrics.read_bytes()
    assert [mirror.read_bytes() for mirror in mirrors] == [whole, whole] and whole.count(
        b"\n"
    ) == 199
