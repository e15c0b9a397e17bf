"""Stand-ins for a host: runs made of tiny scripts, a private tmux server, and a look at what is left in /proc."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rollouts import run_dir
from rollouts.run_dir import EnvironmentSpec, LaunchPlan, ProcessSpec, RunDir, StageSpec

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 200.0  # of a test, for what takes seconds on an idle machine; below the limit that pytest has for one

NO_RESTARTS = {"engine_restarts_max": 0, "engine_hang_timeout_s": PATIENCE_S}

ENGINE = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("engine serves", flush=True)
server.serve_forever()
"""


def script(text: str, *arguments: str) -> list[str]:
    """The command line of a Python script given as text."""
    return [sys.executable, "-c", text, *arguments]


def process(
    window: str,
    argv: Sequence[str],
    *,
    env: dict[str, str] | None = None,
    ready_url: str | None = None,
    ready_timeout_s: float = PATIENCE_S,
    tools_of: str = "",
) -> ProcessSpec:
    return ProcessSpec(
        window=window,
        argv=list(argv),
        env=env or {},
        ready_url=ready_url,
        ready_timeout_s=ready_timeout_s,
        tools_of=tools_of,
    )


def trainer(text: str, **options: Any) -> ProcessSpec:
    return process("trainer", script(text), **options)


def engine(port: int, text: str = ENGINE, **options: Any) -> ProcessSpec:
    return process(
        "engine-0", script(text, str(port)), ready_url=f"http://127.0.0.1:{port}/ready", **options
    )


def stage(name: Any, trainer_spec: ProcessSpec, *engines: ProcessSpec, **options: Any) -> StageSpec:
    fields: dict[str, Any] = {"timeout_s": PATIENCE_S, "needs_checkpoint": None, **options}
    return StageSpec(name=name, engines=list(engines), trainer=trainer_spec, **fields)


class Host:
    """A home directory with runs in it, and the commands that the control side would run there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.launched: list[RunDir] = []

    def job(
        self,
        *stages: StageSpec,
        environments: Sequence[EnvironmentSpec] = (),
        secrets: dict[str, str] | None = None,
        host_env: dict[str, str] | None = None,
        **plan_options: Any,
    ) -> dict[str, Any]:
        """A job for `launch` with its code tree in place."""
        run_id = f"t-{uuid.uuid4().hex[:12]}"
        run = RunDir(run_dir.run_path(self.home, run_id))
        run.code.mkdir(parents=True)
        run.code_tree.symlink_to(REPOSITORY)
        self.launched.append(run)
        fields: dict[str, Any] = {
            "bootstrap_timeout_s": PATIENCE_S,
            "stop_grace_s": 1.0,
            **NO_RESTARTS,
            **plan_options,
        }
        plan = LaunchPlan(
            run_id=run_id,
            experiment_name="test",
            home=str(self.home),
            run_path=str(run.path),
            base_python=sys.executable,
            environments=list(environments),
            stages=list(stages),
            **fields,
        )
        config = {
            "host": {"env": host_env or {}},
            "output": {"mode": "+".join(item.name for item in stages)},
        }
        files = {"code/commit.txt": "0123abc\n"}
        return {"config": config, "plan": plan.to_json(), "files": files, "secrets": secrets or {}}

    def launch(self, job: dict[str, Any], **options: Any) -> subprocess.CompletedProcess[str]:
        return module("launch", stdin=json.dumps(job), **options)

    def start(self, *stages: StageSpec, **options: Any) -> RunDir:
        """Launch a run of these stages; it goes on in the background."""
        job = self.job(*stages, **options)
        done = self.launch(job)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["started"] is True
        return RunDir(Path(job["plan"]["run_path"]))

    def finish(self, *stages: StageSpec, **options: Any) -> RunDir:
        """Launch a run and wait for its end."""
        run = self.start(*stages, **options)
        wait_for_end(run)
        return run


def module(
    name: str, *arguments: str, stdin: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run one of the worker's commands to its end."""
    return subprocess.run(
        [sys.executable, "-m", f"rollouts.worker.{name}", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=REPOSITORY,
        check=False,
        **options,
    )


def wait_for(condition: Callable[[], Any], what: str, *, timeout_s: float = PATIENCE_S) -> Any:
    """Poll until `condition` gives something true, and return it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def wait_for_end(run: RunDir) -> None:
    """Until the supervisor and all that carries the run's mark is gone."""
    wait_for(lambda: run.lock.exists() and not run_dir.is_live(run), "the supervisor's end")
    wait_for(lambda: not survivors(run), f"the end of {survivors(run)}")


def survivors(run: RunDir) -> list[str]:
    """Every process that carries the run's id, read from /proc independently of the worker's own code."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                environment = (entry / "environ").read_bytes()
                if f"{run_dir.RUN_ID_VARIABLE}={run.run_id}".encode() in environment.split(b"\0"):
                    command = (
                        (entry / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    found.append(f"{entry.name}: {command}")
    return found


def events(run: RunDir, kind: str | None = None) -> list[dict[str, Any]]:
    return [row for row in run_dir.read_jsonl(run.events) if kind in (None, row["kind"])]


def log(run: RunDir, window: str) -> str:
    path = run.log(window)
    return path.read_text(errors="replace") if path.exists() else ""


def recorded_pid(run: RunDir, name: str) -> int:
    """The process id that a window recorded, waiting for it."""
    wait_for(run.process(name).exists, f"a record of {name}")
    return int(json.loads(run.process(name).read_text())["pid"])


def kill_at_once(*pids: int) -> None:
    """SIGKILL all of them before any can do something about another's death, as an OOM killer or a reboot does."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)


def remove(directory: Path) -> None:
    """Remove a directory that a live run still writes into: what comes while its rest goes is removed too."""
    wait_for(
        lambda: shutil.rmtree(directory, ignore_errors=True) or not directory.exists(),
        f"the removal of {directory}",
    )


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def tmux_sessions() -> list[str]:
    done = subprocess.run(
        ["tmux", "ls", "-F", "#{session_name}"], capture_output=True, text=True, check=False
    )
    return done.stdout.split()


@contextlib.contextmanager
def private_tmux(directory: Path) -> Iterator[None]:
    """tmux's default server for everything in here, under a directory of its own; it ends with the block."""
    saved = {name: os.environ.pop(name, None) for name in ("TMUX", "TMUX_PANE", "TMUX_TMPDIR")}
    os.environ["TMUX_TMPDIR"] = str(directory)
    try:
        yield
    finally:
        subprocess.run(["tmux", "kill-server"], capture_output=True, check=False)
        del os.environ["TMUX_TMPDIR"]
        os.environ.update({name: value for name, value in saved.items() if value is not None})


def as_status(run: RunDir) -> dict[str, Any]:
    status = run_dir.read_status(run)
    assert status is not None
    return dataclasses.asdict(status)
