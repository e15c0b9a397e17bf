"""Runs whose own end did not come: a removed directory, SIGKILL of everything; and launches that meet."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rollouts import run_dir
from rollouts.remote.host.host_probe import probe
from rollouts.remote.host.sending import sent_program
from rollouts.run_dir import RunDir, clean_up
from rollouts.worker.processes import listeners
from rollouts.worker.supervise.journal import Journal
from tests.worker.stands import (
    PATIENCE_S,
    REPOSITORY,
    Host,
    alive,
    as_status,
    events,
    kill_at_once,
    log,
    module,
    parent_of,
    recorded_pid,
    remove,
    stage,
    survivors,
    trainer,
    wait_for,
    wait_for_end,
)

SLEEP = "import time; print('up', flush=True); time.sleep(600)"


def sent(name: str, *arguments: str, more: str = "") -> "subprocess.CompletedProcess[str]":
    """A worker's program as `deploy` sends it to a host that has none of our code."""
    argv, first_line = sent_program(sys.executable, f"rollouts.worker.{name}", *arguments)
    text = first_line.decode() + more
    return subprocess.run(
        argv, input=text, capture_output=True, text=True, timeout=PATIENCE_S, cwd="/", check=False
    )


def started(host: Host) -> RunDir:
    run = host.start(stage("sft", trainer(SLEEP)), secrets={"TOKEN": "a-secret"})
    wait_for(lambda: "up" in log(run, "trainer"), "the trainer")
    return run


@pytest.mark.parametrize("how", ["removed", "put aside", "its lock removed"])
def test_a_run_ends_with_its_directory(host: Host, how: str) -> None:
    """Goal: a run whose directory is gone ends by itself, leaves its secrets nowhere, and brings no part of the
    directory back. Red without the look at the lock: five processes went on, and status.json reappeared."""
    run = started(host)
    if how == "removed":
        remove(run.path)
    elif how == "put aside":
        run.path.rename(host.home / "aside")
    else:
        run.lock.unlink()
    wait_for(lambda: not survivors(run), "its end")
    assert not run.secrets_in_memory.exists() and not run.secrets.exists()
    if how != "its lock removed":
        assert not run.path.exists(), list(run.path.rglob("*"))


def test_a_removed_run_can_be_stopped(host: Host) -> None:
    """Goal: `stop` needs no file of the run and no code on the host. Red with the run's own tree needed, and with a
    status asked for. The supervisor is held, since it would end the run itself."""
    run = started(host)
    os.kill(recorded_pid(run, "supervisor"), signal.SIGSTOP)
    shutil.rmtree(run.path)
    done = sent("stop", str(run.path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"state": "stopped", "exit_code": 143}
    assert survivors(run) == [] and not run.secrets_in_memory.parent.exists()
    again = sent("stop", str(run.path))
    assert again.returncode == 1 and "no run was launched there" in again.stderr


def test_the_sent_tail_needs_no_code(host: Host) -> None:
    """Goal: a run whose code tree is gone can still be read. Red with `-m rollouts.worker.tail` in that tree."""
    run = host.finish(stage("sft", trainer("print('trained')")))
    run.code_tree.unlink()
    lines = [
        json.loads(line) for line in sent("tail", str(run.path), more="{}\n").stdout.splitlines()
    ]
    assert lines[-1] == {"ended": True, "state": "done", "exit_code": 0}
    assert any(line.get("file") == "events.jsonl" for line in lines)


def test_a_damaged_snapshot_costs_itself(tmp_path: Path) -> None:
    """Goal: a status or a record that is no text does not stop a pull. Red with UnicodeDecodeError: nothing came."""
    run = RunDir(tmp_path)
    run.status.write_bytes(b"\xff\x00")
    run_dir.append_event(run, "note")
    lines = [
        json.loads(line) for line in sent("tail", str(run.path), more="{}\n").stdout.splitlines()
    ]
    assert lines[-1]["ended"] and {"events.jsonl", "status.json"} == {
        line["file"] for line in lines[:-1]
    }


@pytest.mark.parametrize("how", ["truncated", "replaced", "removed", "with its directory"])
def test_a_followed_file_only_grows(host: Host, how: str) -> None:
    """Goal: a followed file that shrinks, is another or is gone ends the following with words, not with bytes from the
    middle of another's line. Red with sizes alone compared: the reader got a JSONDecodeError."""
    run = started(host)
    run_dir.append_event(run, "note", message="x" * 300)
    argv, first_line = sent_program(
        sys.executable, "rollouts.worker.tail", str(run.path), "--follow"
    )
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as following:
        assert following.stdin is not None and following.stdout is not None
        following.stdin.write(first_line + b"{}\n")
        following.stdin.flush()
        for line in following.stdout:
            if b'"events.jsonl"' in line:
                break
        if how == "truncated":
            os.truncate(run.events, 10)
        elif how == "replaced":
            run_dir.write_text_atomic(run.events, "{}\n" * 500)
        elif how == "removed":
            run.events.unlink()
        else:
            remove(run.path)
        last = json.loads(following.stdout.read().splitlines()[-1])
        following.stdin.close()
    assert "error" in last, last
    assert ("events.jsonl" if how != "with its directory" else "removed") in last["error"]
    module("stop", str(run.path))


@pytest.mark.parametrize("who", ["tail", "probe", "launch"])
def test_secrets_go_when_everything_was_killed(host: Host, who: str) -> None:
    """Goal: after SIGKILL of all of a run, as an OOM killer does it, the next look at the host removes its secrets;
    while it lives no look does. Red with their removal left to the supervisor alone."""
    run = started(host)
    clean_up(host.home)
    assert run.secrets.exists() and run.secrets.stat().st_mode & 0o777 == 0o600
    supervisor, child = recorded_pid(run, "supervisor"), recorded_pid(run, "trainer")
    kill_at_once(supervisor, parent_of(supervisor), parent_of(child), child)
    wait_for(lambda: not alive(supervisor) and not survivors(run), "their end")
    assert run.secrets.exists()
    if who == "tail":
        sent("tail", str(run.path), more="{}\n")
    elif who == "probe":
        probe(host.home, [], [], None)
    else:
        host.finish(stage("sft", trainer("print('next')")))
    assert (
        not run.secrets.is_symlink()
        and not run.secrets.exists()
        and not run.secrets_in_memory.exists()
    )
    assert run_dir.observe(run).state == "died"


def test_secrets_go_when_everything_was_killed_and_removed(host: Host) -> None:
    """Goal: after SIGKILL of all of a run, and the removal of its directory, the next look at the host removes what it
    had in memory, secrets and weights; another home's look does not. Red with the directories of runs alone looked at:
    both stayed until the next boot."""
    run = started(host)
    run.weights_in_memory.mkdir()
    supervisor, child = recorded_pid(run, "supervisor"), recorded_pid(run, "trainer")
    kill_at_once(supervisor, parent_of(supervisor), parent_of(child), child)
    wait_for(lambda: not alive(supervisor) and not survivors(run), "their end")
    shutil.rmtree(run.path)
    probe(host.home.with_name("another-home"), [], [], None)
    assert run.secrets_in_memory.exists() and run.weights_in_memory.exists()
    probe(host.home, [], [], None)
    assert not run.secrets_in_memory.parent.exists() and not run.weights_in_memory.exists()


@pytest.mark.parametrize(
    "where", ["on the disk", "in memory", "in memory, whole, without the link to it"]
)
def test_a_killed_writers_secrets_go(where: str, tmp_path: Path) -> None:
    """Goal: what a writer of the secrets that was killed left, under its temporary name or before the run knew of it,
    goes at the next look. Red with the final name alone known, and with the link alone looked for."""
    run = RunDir(run_dir.run_path(tmp_path, "r"))
    run.path.mkdir(parents=True)
    directory = run.path if where == "on the disk" else run.secrets_in_memory.parent
    directory.mkdir(mode=0o700, exist_ok=True)
    left = directory / ("secrets.json" if "whole" in where else ".secrets.json.4711.tmp")
    left.write_text("a-secret")
    try:
        clean_up(tmp_path)
        assert not left.exists()
    finally:
        shutil.rmtree(run.secrets_in_memory.parent, ignore_errors=True)


def test_a_directory_in_a_runs_place_is_not_its_own(tmp_path: Path) -> None:
    """Goal: a run whose directory was replaced by another writes nothing into that. Red with the lock's name alone
    looked at."""
    run = RunDir(tmp_path / "r")
    lock = run_dir.hold_lock(run)
    assert lock is not None
    with lock:
        journal = Journal(run, lock)
        assert not journal.is_gone()
        shutil.rmtree(run.path)
        run.path.mkdir()
        run.lock.touch()
        assert journal.is_gone()
        journal.event("note")
        assert not run.events.exists()


def test_secrets_do_not_outlive_a_reboot(host: Host) -> None:
    """Goal: they lie where no reboot leaves them, and nowhere on the disk. Red with a file in the run directory."""
    run = started(host)
    assert run.secrets.is_symlink() and os.readlink(run.secrets).startswith("/dev/shm/")
    on_disk = [file for file in run.path.iterdir() if file.is_file() and not file.is_symlink()]
    assert not any(b"a-secret" in file.read_bytes() for file in on_disk)
    module("stop", str(run.path))


@pytest.mark.parametrize("how", ["missing", "open to others", "a link", "a file"])
def test_secrets_where_no_tmpfs_can_be_trusted(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: without a tmpfs, or with something of another's in the place there, secrets are a 0600 file in the run
    directory, and nothing is written into that. Red with the place taken as it is."""
    run, place = RunDir(tmp_path / "run"), tmp_path / "memory/place"
    monkeypatch.setattr(RunDir, "secrets_in_memory", property(lambda self: place / "secrets.json"))
    run.path.mkdir()
    if how != "missing":
        place.parent.mkdir()
        (tmp_path / "elsewhere").mkdir(0o700)
        if how == "open to others":
            place.mkdir()
            place.chmod(0o755)
        elif how == "a link":
            place.symlink_to(tmp_path / "elsewhere")
        else:
            place.write_text("theirs")
    run_dir.write_secrets(run, {"secrets": {"TOKEN": "a-secret"}})
    assert not run.secrets.is_symlink() and run.secrets.stat().st_mode & 0o777 == 0o600
    assert "a-secret" in run.secrets.read_text() and not (place.is_dir() and list(place.iterdir()))


def test_launches_are_told_apart(host: Host) -> None:
    """Goal: a launch that finds its run started says whether it was this very one. Red with one answer for both: the
    loser of two deploys followed another's job, and said done."""
    job = {**host.job(stage("sft", trainer(SLEEP))), "launch_id": "one"}
    assert json.loads(host.launch(job).stdout)["started"] is True
    assert json.loads(host.launch(job).stdout) | {"reason": ""} == {
        "started": False,
        "same": True,
        "reason": "",
    }
    other = json.loads(host.launch({**job, "launch_id": "two"}).stdout)
    assert (other["started"], other["same"]) == (False, False)
    module("stop", job["plan"]["run_path"])


@pytest.mark.parametrize("shared", ["GPU", "GPU by UUID", "port"])
def test_of_two_launches_at_once_one_starts(host: Host, shared: str) -> None:
    """Goal: what one run alone can have, a GPU or a port, is given to one of two launches in the same moment.
    Red without the lock of the home and the look under it: both started."""
    jobs = [
        {**host.job(stage("sft", trainer(SLEEP))), "launch_id": name} for name in ("one", "two")
    ]
    for number, job in enumerate(jobs):
        spec = job["plan"]["stages"][0]["trainer"]
        spec["env"] = {"CUDA_VISIBLE_DEVICES": f"{number},7" if shared == "GPU" else str(number)}
        if shared == "GPU by UUID":  # which a trainer's card has, and an engine's has not
            spec["env"] = {
                "CUDA_VISIBLE_DEVICES": ("GPU-52a3a85d", "7")[number],
                "ROLLOUTS_GPUS": "7",
            }
        if shared == "port":
            spec["ready_url"] = "http://127.0.0.1:7/ready"
    command = [sys.executable, "-m", "rollouts.worker.launch"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    launches = [subprocess.Popen(command, **pipes) for _ in jobs]
    for launch, job in zip(launches, jobs, strict=True):
        assert launch.stdin is not None
        launch.stdin.write(json.dumps(job))
        launch.stdin.close()
    answers = [json.loads(launch.stdout.read()) for launch in launches if launch.stdout]
    for launch in launches:
        launch.wait()
    assert sorted(answer["started"] for answer in answers) == [False, True], answers
    (refused,) = (answer for answer in answers if not answer["started"])
    assert refused["same"] is False and "is live and has" in refused["reason"]
    for run in host.launched:
        module("stop", str(run.path))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_listeners_are_known(family: socket.AddressFamily) -> None:
    """Goal: a socket that other machines reach is told from one on loopback. Red with the address's bytes in the order
    of the text."""
    any_address, loopback = ("0.0.0.0", "127.0.0.1") if family == socket.AF_INET else ("::", "::1")
    with socket.socket(family) as near, socket.socket(family) as far:
        near.bind((loopback, 0))
        far.bind((any_address, 0))
        near.listen()
        far.listen()
        places = {(found.address, found.port) for found in listeners([os.getpid()])}
        assert {(loopback, near.getsockname()[1]), (any_address, far.getsockname()[1])} <= places
        open_ports = {found.port for found in listeners([os.getpid()], beyond_loopback=True)}
        assert far.getsockname()[1] in open_ports and near.getsockname()[1] not in open_ports


def test_a_listener_beyond_loopback_is_told(host: Host) -> None:
    """Goal: a run that opens a port to other machines says so, once. Red without the look at its sockets."""
    text = "import socket, time; s = socket.create_server(('0.0.0.0', 0)); print('up', flush=True); time.sleep(600)"
    run = host.start(stage("sft", trainer(text)))
    told = wait_for(
        lambda: [row for row in events(run, "note") if "listens on 0.0.0.0" in row["message"]],
        "the note",
    )
    beat = as_status(run)["updated_at"]
    wait_for(lambda: as_status(run)["updated_at"] > beat, "another look")
    assert (
        len(told) == 1
        and len([row for row in events(run, "note") if "listens on" in row["message"]]) == 1
    )
    module("stop", str(run.path))
    wait_for_end(run)
