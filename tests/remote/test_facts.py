"""One look at a host: what the script prints on this machine, and how nvidia-smi's lines are read."""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rollouts.remote.errors import TransportError
from rollouts.remote.host import facts as facts_module
from rollouts.remote.host.facts import gather_facts, parse_facts
from rollouts.remote.host.host_probe import LOCKS_PYTHON, run_row, run_rows
from rollouts.remote.host.local import LocalTransport
from rollouts.run_dir import RunDir, Status, append_jsonl, hold_lock, run_path, write_json_atomic
from tests.remote.hosts import tool_directory


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: the answers are true. Red with the port asked by connecting to it (a full backlog hangs)."""
    home = tmp_path / "home with space"
    monkeypatch.setenv("ROLLOUTS_HOME", str(home))
    (home / "envs/abc").mkdir(parents=True)
    (home / "envs/abc/.complete").touch()
    (home / "envs/half").mkdir()
    (home / "runs/taken").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        facts = gather_facts(
            LocalTransport(),
            ports=[port],
            paths=[str(tmp_path), "/no/such", "/etc/passwd"],
            run_id="taken",
        )
    assert facts.home == str(home) and facts.host == os.uname().nodename
    assert (
        facts.python
        and facts.python_version.startswith("3.")
        and facts.platform.startswith("linux")
    )
    assert facts.ports_in_use == (port,) and facts.run_exists
    assert facts.paths == {str(tmp_path): True, "/etc/passwd": False}
    assert facts.environments == ("abc",)
    assert {"tmux", "rsync"} <= set(facts.tools) and facts.versions["tmux"].startswith("tmux ")
    assert facts.disk_free_bytes > 0


def test_deploys_own_python_counts_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: the Python that runs deploy will do on this machine, on no PATH. Red with PATH alone searched."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tool_directory(tmp_path / "bin", python=False)))
    facts = gather_facts(LocalTransport())
    assert facts.python and os.path.samefile(facts.python, sys.executable)


def test_names_of_python_that_are_slow_scripts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Goal: a version manager's `python3`, a script of a tenth of a second, is run once; names that the locks' Python
    makes needless are not run. Red with two starts a candidate, with the probe run by that name, with all names asked.
    """
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    names, log = tool_directory(tmp_path / "bin", python=False), tmp_path / "log"
    real = os.path.realpath(sys.executable)
    for name in "python3", "python3.12", "python3.13":
        (names / name).write_text(f'#!/bin/sh\necho {name} >> {log}\nexec {real} "$@"\n')
        (names / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(names))
    facts = gather_facts(LocalTransport())
    assert facts.python == real and facts.has_venv and facts.pythons_seen[0].startswith("python3 ")
    asked = [] if sys.version_info[:2] == LOCKS_PYTHON else ["python3", "python3.12", "python3.13"]
    assert sorted(log.read_text().split()) == sorted(["python3", *asked])
    assert sorted(path for path, _ in facts.pythons) == sorted(str(names / n) for n in asked)


def test_a_port_that_was_just_left_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: a port in TIME_WAIT does not block the next run. Red without SO_REUSEADDR."""
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the server's side closes first: its port goes to TIME_WAIT
        client.close()
    assert gather_facts(LocalTransport(), ports=[port]).ports_in_use == ()


def test_a_first_look_without_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Goal: a host whose tool hangs is told of with how long was waited, and what shows why. Red without `late`: the
    bare command line and its time."""
    tools = tool_directory(tmp_path / "bin", without=("tmux",))
    (tools / "tmux").write_text("#!/bin/sh\nexec sleep 600\n")
    (tools / "tmux").chmod(0o755)
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(facts_module, "FACTS_TIMEOUT_S", 1)
    with pytest.raises(
        TransportError, match=r"local: the first look at the host did not end within 1 s\."
    ) as caught:
        gather_facts(LocalTransport())
    assert "run the same command again; `uptime` and `df -h` show" in caught.value.text()


LINES = """home=/h
path=/bin
tool=tmux /usr/bin/tmux
version=tmux tmux 3.3a
gpu=0, GPU-5a, NVIDIA H200, 143771, 143226
gpu=1, GPU-5b, NVIDIA GB10, [N/A], [N/A]
gpu_process=GPU-5a, 4711, 1024, /usr/bin/python3, with a comma
gpu_process=GPU-5b, 4712, [N/A], x
driver=570.124.06
python_seen=python3 3.9.2
"""


def test_reading_nvidia_smi() -> None:
    """Goal: memory in MiB, [N/A] understood, commas in names kept. Red with int() over every cell."""
    facts = parse_facts(
        [(k, v) for k, _, v in (line.partition("=") for line in LINES.splitlines())]
    )
    assert [(g.index, g.name, g.memory_total_mib, g.memory_free_mib) for g in facts.gpus] == [
        (0, "NVIDIA H200", 143771, 143226),
        (1, "NVIDIA GB10", 0, 0),
    ]
    assert [(p.pid, p.memory_mib, p.name) for p in facts.gpu_processes] == [
        (4711, 1024, "/usr/bin/python3, with a comma"),
        (4712, None, "x"),
    ]
    assert (
        facts.driver == "570.124.06"
        and facts.python is None
        and facts.pythons_seen == ("python3 3.9.2",)
    )


def test_nvidia_smi_that_fails() -> None:
    """Goal: what it says instead of devices is kept. Red with lines that do not parse dropped."""
    line = "Failed to initialize NVML: Driver/library version mismatch"
    facts = parse_facts([("home", "/h"), ("gpu", line)])
    assert facts.gpus == () and facts.gpu_problem == line


def write_status(run: RunDir, **changes: object) -> None:
    fields: dict[str, object] = {
        "run_id": run.run_id,
        "experiment_name": "e",
        "state": "running",
        "stage": "rl",
    }
    fields |= {"message": "m", "started_at": 5.0, "updated_at": 6.0, "exit_code": None, **changes}
    write_json_atomic(run.status, Status(**fields))  # type: ignore[arg-type]


def test_runs_of_a_home(tmp_path: Path) -> None:
    """Goal: live, died and done are told apart by the lock. Red with the state taken from status.json alone."""
    live, died, done = (RunDir(tmp_path / "runs" / name) for name in ("live", "died", "done"))
    held = hold_lock(live)
    for run, at in ((live, 3.0), (died, 2.0), (done, 1.0)):
        run.path.mkdir(parents=True, exist_ok=True)
        write_status(
            run, started_at=at, **({"state": "done", "exit_code": 0} if run is done else {})
        )
        if run is not live:
            run.lock.touch()
    append_jsonl(live.metrics, {"stage": "rl", "step": 7})
    (tmp_path / "runs/not-launched/code").mkdir(parents=True)
    (tmp_path / "runs/foreign").mkdir()
    (tmp_path / "runs/foreign/status.json").write_text("[]")
    rows = run_rows(tmp_path)
    assert [(r["run_id"], r["state"], r["live"], r["step"]) for r in rows] == [
        ("done", "done", False, None),
        ("died", "died", False, None),
        ("live", "running", True, 7),
    ]
    assert held is not None
    held.close()
    row = run_row(live)
    assert row is not None and row["state"] == "died"
    assert json.dumps(rows)


def made(
    home: Path, run_id: str, state: Any, started_at: float, *, exit_code: int | None = None
) -> RunDir:
    run = RunDir(run_path(home, run_id))
    status = Status(
        run_id=run_id,
        experiment_name="exp",
        state=state,
        stage="rl",
        message="",
        started_at=started_at,
        updated_at=started_at,
        exit_code=exit_code,
    )
    write_json_atomic(run.status, status)
    return run


def test_every_state_of_a_run(tmp_path: Path) -> None:
    """Goal: every state, with `died` for an unfinished run without a supervisor; oldest first. Red with the status
    believed, and with the rows in the file system's order."""
    made(tmp_path, "b-done", "done", 20.0, exit_code=0)
    rows = [{"stage": "rl", "step": step} for step in (3, 12)]
    append_jsonl(made(tmp_path, "a-failed", "failed", 30.0, exit_code=7).metrics, *rows)
    made(tmp_path, "c-died", "running", 10.0).lock.touch()
    running = made(tmp_path, "d-running", "running", 40.0)
    made(tmp_path, "e-starting", "starting", time.time())
    made(tmp_path, "f-never-started", "starting", 50.0)
    (tmp_path / "runs" / "only-synced" / "code" / "tree").mkdir(parents=True)
    with hold_lock(running):
        rows = run_rows(tmp_path)
    assert [(row["run_id"], row["state"], row["exit_code"], row["live"]) for row in rows] == [
        ("c-died", "died", None, False),
        ("b-done", "done", 0, False),
        ("a-failed", "failed", 7, False),
        ("d-running", "running", None, True),
        ("f-never-started", "died", None, False),
        ("e-starting", "starting", None, True),
    ]
    assert (rows[2]["experiment_name"], rows[2]["stage"], rows[2]["step"]) == ("exp", "rl", 12)


def test_a_damaged_file_does_not_hide_the_others(tmp_path: Path) -> None:
    """Goal: damaged metrics hide no run, a damaged status only its own. Red with the errors let through."""
    made(tmp_path, "good", "done", 1.0, exit_code=0).metrics.write_text("not json\n")
    made(tmp_path, "bad", "done", 2.0).status.write_text("{")
    (row,) = run_rows(tmp_path)
    assert (row["run_id"], row["state"], row["step"]) == ("good", "done", None)
