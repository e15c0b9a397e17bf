"""Virtual environments on the host: made once, reused by key, rebuilt when half-built. Standard library only.

An environment lies at <home>/envs/<key> and is complete when its marker is there, which is written last. Two runs that
want the same one take turns by a lock file beside it: one builds, the other waits and reuses. The caller's `tick` is
called in every wait; what it raises (a stop) ends the build, and what was built so far never counts.
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rollouts import run_dir
from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.console import say

MARKER_FILE = ".complete"
LOG_TAIL_LINES = 50
POLL_S = 0.1
END_GRACE_S = 3.0
UV_PLACES = ("~/.local/bin/uv", "~/.cargo/bin/uv")  # where its installer puts it; not on PATH in a bare ssh command


class BootstrapError(Exception):
    """An environment could not be made. The message names the fix; `log_tail` is what the installer said last."""

    def __init__(self, message: str, log_tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log_tail = list(log_tail)


class Patience:
    """How long the bootstrap as a whole may take, and what to do meanwhile."""

    def __init__(self, timeout_s: float, *, tick: Callable[[], None]) -> None:
        self.timeout_s, self.tick = timeout_s, tick
        self._deadline = time.monotonic() + timeout_s

    def wait(self, spec: EnvironmentSpec, last_seen: str, log_tail: Sequence[str] = ()) -> None:
        """One short sleep. Raises BootstrapError once it took too long, and whatever `tick` raises."""
        if time.monotonic() > self._deadline:
            raise BootstrapError(
                f"environment {spec.name!r}: not ready within limits.bootstrap_timeout_s={self.timeout_s:g};"
                f" {last_seen}. Raise the limit, or see in the log what took so long.",
                log_tail,
            )
        self.tick()
        time.sleep(POLL_S)


def ensure_environment(spec: EnvironmentSpec, run: RunDir, patience: Patience) -> None:
    """Have `spec` complete at its path on return.

    Raises BootstrapError for a failing or missing installer, or when patience runs out; and whatever its `tick` raises.
    """
    started = time.monotonic()

    def announce(action: str) -> None:
        seconds = round(time.monotonic() - started, 3)
        run_dir.append_event(run, "environment", name=spec.name, action=action, seconds=seconds)
        say(f"environment {spec.name}: {action} after {seconds:.2f} s ({spec.path})")

    path = Path(spec.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{path.name}.lock"), spec, patience):
        if is_complete(path):
            announce("reused")
            return
        announce("building")
        if path.exists():
            say(f"environment {spec.name}: {path} was left half-built; starting over")
            shutil.rmtree(path)
        _build(spec, path, patience)
        marker = {**dataclasses.asdict(spec), "completed_at": time.time()}
        run_dir.write_json_atomic(path / MARKER_FILE, marker)
        announce("ready")


def is_complete(path: Path) -> bool:
    """Whole, and its base interpreter still there (bin/python is a link to it)."""
    return (path / MARKER_FILE).is_file() and (path / "bin" / "python").exists()


def _build(spec: EnvironmentSpec, path: Path, patience: Patience) -> None:
    """Create the environment and install into it; its input files lie in it afterwards."""
    python = str(path / "bin" / "python")
    if spec.installer == "uv":
        uv = _find_uv()
        create = [uv, "venv", "--python", spec.base_python, str(path)]
        install = [uv, "pip", "install", "--python", python]
    else:
        create = [spec.base_python, "-m", "venv", str(path)]
        install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    _run(create, spec, patience)
    constraints = path / "constraints.txt"
    constraints.write_text(spec.constraints)
    passes = (
        ("requirements.txt", spec.requirements, ()),
        ("requirements-no-deps.txt", spec.requirements_no_deps, ("--no-deps",)),
    )
    for name, lines, options in passes:
        file = path / name
        file.write_text("".join(f"{line}\n" for line in lines))
        if lines:
            _run([*install, *options, "-c", str(constraints), "-r", str(file)], spec, patience)


def _find_uv() -> str:
    for place in ("uv", *(os.path.expanduser(place) for place in UV_PLACES)):
        if found := shutil.which(place):
            return found
    raise BootstrapError(
        "host.installer='uv', but this host has no uv (looked on PATH and in ~/.local/bin, ~/.cargo/bin)."
        " Install uv there, or set host.installer='pip'."
    )


@contextlib.contextmanager
def _locked(path: Path, spec: EnvironmentSpec, patience: Patience) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waiting = False
        while not _try_lock(descriptor):
            if not waiting:
                say(f"environment {spec.name}: another run is building it; waiting")
                waiting = True
            patience.wait(spec, "another run was still building it")
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _run(argv: list[str], spec: EnvironmentSpec, patience: Patience) -> None:
    """Run one installer command in a group of its own, its output passed on; ended when anything is raised here."""
    say(f"$ {shlex.join(argv)}")
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
        )
    except OSError as error:
        raise BootstrapError(f"environment {spec.name!r}: cannot start {argv[0]}: {error}") from None
    tail: collections.deque[str] = collections.deque(maxlen=LOG_TAIL_LINES)
    reader = threading.Thread(target=_pass_on, args=(process, tail), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            patience.wait(spec, f"`{argv[0]}` was still running", tail)
    finally:
        _end_group(process)
    reader.join(END_GRACE_S)
    if process.returncode != 0:
        trainers = "host.constraints_file, the requirements in pyproject.toml"
        inputs = "engine.requirements_file" if spec.name == "engine" else trainers
        fix = f"Its last lines say why; check {inputs}, and that the host reaches its package index."
        message = f"environment {spec.name!r}: `{shlex.join(argv)}` failed with exit code {process.returncode}. {fix}"
        raise BootstrapError(message, tail)


def _pass_on(process: subprocess.Popen[bytes], tail: collections.deque[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        text = line.decode(errors="replace")
        tail.append(text.rstrip("\n"))
        say(text.rstrip("\n"))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the installer with its children, unless it has ended; not reaped yet, so the group is its own."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_GRACE_S)
