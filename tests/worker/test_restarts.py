"""Engines that die or hang under the real supervisor: started again within the budget."""

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from rollouts import run_dir
from rollouts.run_dir import RunDir
from rollouts.training.weight_sync import SGLangEngine
from rollouts.view.fold import View, fold
from rollouts.worker.builders.engines import build_pool
from tests.example_config import example_config, replace_at
from tests.ports import free_port
from tests.worker.stands import (
    PATIENCE_S,
    Host,
    alive,
    as_status,
    engine,
    events,
    log,
    parent_of,
    process,
    recorded_pid,
    script,
    stage,
    trainer,
    wait_for,
    wait_for_end,
)

HANG_S = 6.0  # for what hangs, and what answers beside it; all else has PATIENCE_S
ENGINE = """
import http.server, os, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        life = str(os.getpid()).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(life))); self.end_headers()
        self.wfile.write(life)
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("engine serves", os.getpid(), flush=True)
server.serve_forever()
"""
# A child in a session of its own, as an engine's scheduler that holds the GPU may be.
WITH_CHILD = """
import subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print("child", child.pid, flush=True)
"""
# Ends with 0 once that many lives of the engine have answered it, and the supervisor has met as many as it should: a
# trainer that outlives its engine. A life that is killed while it answers leaves half an answer, which counts for none.
OUTLIVING = """
import http.client, os, pathlib, sys, time, urllib.request
seen = []
events = pathlib.Path(os.environ["ROLLOUTS_RUN_PATH"], "events.jsonl")
while len(seen) < int(sys.argv[2]) or events.read_text().count('"engine_ready"') < int(sys.argv[3]):
    time.sleep(0.02)
    try:
        life = urllib.request.urlopen(sys.argv[1], timeout=0.5).read()
    except (OSError, http.client.HTTPException):
        continue
    if life not in seen:
        seen.append(life)
        print("met", life.decode(), flush=True)
"""


def outliving(port: int, lives: int, *, ready: int) -> Any:
    return process(
        "trainer", script(OUTLIVING, f"http://127.0.0.1:{port}/", str(lives), str(ready))
    )


def start(
    host: Host,
    port: int,
    text: str = ENGINE,
    *,
    lives: int = 2,
    restarts_max: int = 3,
    hang_s: float = PATIENCE_S,
    **options: Any,
) -> RunDir:
    return host.start(
        stage("rl", outliving(port, lives, ready=lives), engine(port, text, **options)),
        engine_restarts_max=restarts_max,
        engine_hang_timeout_s=hang_s,
    )


def await_life(run: RunDir, number: int) -> int:
    """The process id of the engine's life of this number (from 1), once it serves and the trainer has met it."""

    def met() -> list[str]:
        return re.findall(r"met (\d+)\n", log(run, "trainer"))

    return int(wait_for(lambda: len(met()) >= number and met()[number - 1], f"life {number}"))


def child_of(run: RunDir) -> int:
    """The process id of the engine's child."""
    return int(wait_for(lambda: re.findall(r"child (\d+)\n", log(run, "engine-0")), "its child")[0])


def await_end(run: RunDir) -> dict[str, Any]:
    wait_for_end(run)
    return as_status(run)


def test_a_killed_engine_is_started_again(host: Host) -> None:
    """Goal: kill -9 of an engine costs one restart, not the run: trainer untouched, both lives in one log, an exit
    record each, reason and budget in the events and on the laptop. Red before there were restarts."""
    run = start(host, free_port(), WITH_CHILD + ENGINE)
    child = child_of(run)
    os.kill(await_life(run, 1), signal.SIGKILL)
    await_life(run, 2)
    assert not alive(child), "a child that the dead engine left would hold its GPU"
    assert await_end(run)["state"] == "done"
    (restart,) = events(run, "engine_restarted")
    assert (restart["stage"], restart["window"], restart["restarts_left"]) == ("rl", "engine-0", 2)
    assert restart["reason"] == "engine-0 was ended by SIGKILL"
    assert log(run, "engine-0").count("engine serves") == 2
    first, last = (
        run_dir.read_exit(run, "rl", "engine-0.life-1"),
        run_dir.read_exit(run, "rl", "engine-0"),
    )
    assert first is not None and last is not None
    assert (first.signal, last.signal) == (signal.SIGKILL, signal.SIGTERM)
    kinds = [row["kind"] for row in events(run)]
    assert kinds[2:6] == ["engine_ready", "process_ended", "engine_restarted", "engine_ready"]
    view = fold(View(), "events.jsonl", restart)
    assert view.phases == (
        ("engine-0", "started again: engine-0 was ended by SIGKILL; 2 more left"),
    )


@pytest.mark.parametrize("stopped", ["server", "child"])
def test_a_stopped_engine_is_killed_and_started_again(host: Host, stopped: str) -> None:
    """Goal: SIGSTOP of the server, or of a child alone behind a server that still answers, is known by its silence and
    ends in SIGKILL and a restart. Red with heartbeats off, and with processes not looked at (child)."""
    run = start(host, free_port(), WITH_CHILD + ENGINE, hang_s=HANG_S)
    child = child_of(run)
    server = await_life(run, 1)
    os.kill(server if stopped == "server" else child, signal.SIGSTOP)
    await_life(run, 2)
    assert not alive(server) and not alive(child)
    assert await_end(run)["state"] == "done"
    (restart,) = events(run, "engine_restarted")
    assert (
        "hung" in restart["reason"]
        and f"limits.engine_hang_timeout_s={HANG_S:g}" in restart["reason"]
    )


def test_an_engine_that_is_slow_or_paused_is_left_alone(host: Host) -> None:
    """Goal: an answer that takes less than the limit, every time, is no hang, nor is 503, which SGLang's /ready gives
    while it is paused. Red with heartbeats of 0.1 s, and with only 200 an answer."""
    paused = "Handler.asked += 1; self.send_response(200 if Handler.asked < 3 else 503)"
    slow = ENGINE.replace(
        "self.send_response(200)",
        f"time.sleep({HANG_S * 0.1}); print('asked', flush=True); {paused}",
    )
    slow = slow.replace("def do_GET", "asked = 0\n    def do_GET")
    waiting = """
import os, pathlib, time
log = pathlib.Path(os.environ["ROLLOUTS_RUN_PATH"], "logs", "engine-0.log")
while log.read_text().count("asked") < 5: time.sleep(0.05)
"""
    spec = engine(free_port(), slow)
    run = host.finish(
        stage("rl", trainer(waiting), spec), engine_restarts_max=3, engine_hang_timeout_s=HANG_S
    )
    assert as_status(run)["state"] == "done"
    assert events(run, "engine_restarted") == []


def test_the_budget(host: Host) -> None:
    """Goal: one death more than engine.restarts_max ends the run with the engine's code, its log tail and the budget in
    the message; the trainer is ended too. Red with the budget not counted down."""
    run = start(host, free_port(), lives=9, restarts_max=2)
    for life in (1, 2, 3):
        os.kill(await_life(run, life), signal.SIGKILL)
    status = await_end(run)
    assert (status["state"], status["exit_code"]) == ("failed", 137)
    (error,) = events(run, "error")
    assert error["window"] == "engine-0"
    assert error["message"] == (
        "stage rl: engine-0 was ended by SIGKILL (engine.restarts_max=2, of which 0 are left)"
    )
    assert error["log_tail"][-1].startswith("engine serves")
    assert [row["restarts_left"] for row in events(run, "engine_restarted")] == [1, 0]
    record = run_dir.read_exit(run, "rl", "trainer")
    assert record is not None and record.signal == signal.SIGTERM


def test_a_hang_without_budget(host: Host) -> None:
    """Goal: with restarts_max=0 a hung engine ends the run, naming the limit, instead of waiting for the stage's. Red
    with heartbeats only where there is a budget."""
    run = start(host, free_port(), restarts_max=0, hang_s=HANG_S)
    os.kill(await_life(run, 1), signal.SIGSTOP)
    assert await_end(run)["state"] == "failed"
    assert "engine-0 hung" in events(run, "error")[0]["message"]


def test_death_before_ready(host: Host) -> None:
    """Goal: an engine that is killed while it starts gets another life; one that gives up with an exit code does not,
    since nothing has changed. Red with either taken for the other."""
    host.home.mkdir(parents=True)
    born = host.home / "born"
    holding = f"""
import pathlib, time
born = pathlib.Path({str(born)!r})
if not born.exists():
    born.touch()
    print("loading", flush=True)
    time.sleep(600)
{ENGINE}"""
    run = start(host, free_port(), holding, lives=1)
    wait_for(lambda: "loading" in log(run, "engine-0"), "the engine's start")
    os.kill(recorded_pid(run, "engine-0"), signal.SIGKILL)
    assert await_end(run)["state"] == "done"
    assert len(events(run, "engine_restarted")) == 1
    run = start(host, free_port(), "import sys; print('no such model'); sys.exit(3)")
    status = await_end(run)
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert events(run, "engine_restarted") == []


def test_a_second_life_that_gets_stuck(host: Host) -> None:
    """Goal: an engine that has served, and gets stuck on its next start (a port of its own choice that is taken), gets
    another one. Red with the ready limit of a first start."""
    host.home.mkdir(parents=True)
    lives = host.home / "lives"
    stuck = f"""
import pathlib, time
lives = pathlib.Path({str(lives)!r})
is_second = lives.exists() and lives.stat().st_size == 1
lives.open("a").write("x")
if is_second:
    time.sleep(600)
{ENGINE}"""
    run = start(host, free_port(), stuck, ready_timeout_s=20.0)
    os.kill(await_life(run, 1), signal.SIGKILL)
    await_life(run, 2)
    assert await_end(run)["state"] == "done"
    reasons = [row["reason"] for row in events(run, "engine_restarted")]
    assert len(reasons) == 2 and "limits.engine_ready_timeout_s=20" in reasons[1]


def test_the_wrapper_dies(host: Host) -> None:
    """Goal: with the window's wrapper killed the orphaned engine is ended, and another one started. Red when the
    orphan kept the port."""
    run = start(host, free_port())
    first = await_life(run, 1)
    os.kill(parent_of(first), signal.SIGKILL)
    await_life(run, 2)
    assert not alive(first)
    assert await_end(run)["state"] == "done"
    assert "how it ended is unknown" in events(run, "engine_restarted")[0]["reason"]


def test_the_port_is_looked_at_again(host: Host) -> None:
    """Goal: a stranger that takes the port between two lives is named, not taken for the engine. Red without the
    second look, and with a full queue taken for a free port: the engine failed to bind, once for each restart."""
    # a socket's path has to be short
    port, path = free_port(), f"/tmp/rt-{os.getpid()}-{free_port()}"
    giving = ENGINE.replace(
        "server.serve_forever()",
        "import socket; giver = socket.socket(socket.AF_UNIX)\n"
        f"if not giver.connect_ex({path!r}): socket.send_fds(giver, [b'x'], [server.fileno()])\n"
        "server.serve_forever()",
    )
    with socket.socket(socket.AF_UNIX) as taker:
        taker.bind(path)
        taker.listen()
        try:
            run = start(host, port, giving)
            server = await_life(run, 1)
            # this process is the stranger
            _, (held, *_), _, _ = socket.recv_fds(taker.accept()[0], 1, 1)
        finally:
            os.unlink(path)
    os.kill(server, signal.SIGKILL)
    assert await_end(run)["state"] == "failed"
    os.close(held)
    assert f"cannot use 127.0.0.1:{port}" in events(run, "error")[0]["message"]


def test_a_stop_during_a_restart(host: Host) -> None:
    """Goal: a stop while an engine starts again ends the run as stopped, with nothing left. Red with the stop heeded
    only once all engines serve."""
    slow = f"import time; print('loading', flush=True); time.sleep(600 if 'x' in open(__LOG__).read() else 0)\n{ENGINE}"
    port = free_port()
    marker = host.home / "marker"
    host.home.mkdir(parents=True, exist_ok=True)
    marker.write_text("")
    run = start(host, port, slow.replace("__LOG__", repr(str(marker))))
    server = await_life(run, 1)
    marker.write_text("x")
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: events(run, "engine_restarted"), "the restart")
    os.kill(recorded_pid(run, "supervisor"), signal.SIGTERM)
    assert await_end(run)["state"] == "stopped"


def test_replicas_share_the_budget(host: Host) -> None:
    """Goal: two engines that die together are both started again, and counted. Red with one taken for the trainer."""
    ports = free_port(), free_port()
    replicas = [engine(port, ENGINE) for port in ports]
    replicas[1] = process("engine-1", replicas[1].argv, ready_url=replicas[1].ready_url)
    run = host.start(
        stage("rl", outliving(ports[1], 2, ready=4), *replicas),
        engine_restarts_max=2,
        engine_hang_timeout_s=PATIENCE_S,
    )
    second = await_life(run, 1)
    os.kill(recorded_pid(run, "engine-0"), signal.SIGKILL)
    os.kill(second, signal.SIGKILL)
    assert await_end(run)["state"] == "done"
    found = sorted((row["window"], row["restarts_left"]) for row in events(run, "engine_restarted"))
    assert found in ([("engine-0", 1), ("engine-1", 0)], [("engine-0", 0), ("engine-1", 1)])


@pytest.mark.parametrize(("restarts_max", "timeout_s"), [(0, 30.0), (1, 30.0), (4, 120.0)])
def test_the_trainer_waits_for_as_many_lives(
    tmp_path: Path, restarts_max: int, timeout_s: float
) -> None:
    """Goal: the trainer runs a request again as often as engines may be restarted, and waits for them as long as that
    may take by the config's limits. Red with a constant in place of each."""
    config = example_config()
    changes = {"limits.engine_hang_timeout_s": 10.0, "limits.engine_ready_timeout_s": 20.0}
    for path, value in {**changes, "engine.restarts_max": restarts_max}.items():
        config = replace_at(config, path, value)
    reruns = build_pool(config, RunDir(tmp_path), [SGLangEngine("http://127.0.0.1:1")]).reruns
    assert reruns is not None and (reruns.times_max, reruns.recover_timeout_s) == (
        restarts_max,
        timeout_s,
    )


def test_a_life_is_not_blamed_for_the_one_before(host: Host) -> None:
    """Goal: each life's end is explained by what that life said: the log goes on through all of them. Red with the
    whole log read: the second end was put down to the first one's memory."""
    host.home.mkdir(parents=True)
    born = host.home / "born"
    twice = f"""
import pathlib, sys
born = pathlib.Path({str(born)!r})
if born.exists():
    sys.exit(3)
born.touch()
print("torch.OutOfMemoryError: CUDA out of memory.", flush=True)
{ENGINE}"""
    run = start(host, free_port(), twice, restarts_max=1)
    os.kill(await_life(run, 1), signal.SIGKILL)
    assert await_end(run)["state"] == "failed"
    (restart,) = events(run, "engine_restarted")
    assert restart["reason"].startswith("engine-0 was ended by SIGKILL. Out of memory.")
    (error,) = events(run, "error")
    assert (
        error["message"]
        == "stage rl: engine-0 ended with exit code 3 (engine.restarts_max=1, of which 0 are left)"
    )
