"""One command of an installer: bounded, shown while it works, and ended with who started it. Standard library only."""

import collections
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rollouts import run_dir
from rollouts.engines.diagnosis import diagnose_installation
from rollouts.run_dir import EnvironmentSpec, RunDir
from rollouts.worker.processes import SUPERVISOR_WINDOW
from rollouts.worker.supervise.console import say

LOG_TAIL_LINES = 50
POLL_S = 0.1
END_GRACE_S = 3.0
# between two lines of progress: the longer it takes, the fewer
PROGRESS_MIN_S, PROGRESS_MAX_S = 10.0, 30.0
DOWNLOAD = re.compile(r"\s*Downloading (\S+) \(([\d.]+) ?([kKMG]?)i?B\)")  # pip and uv
COLLECT = re.compile(r"(?:Collecting|Processing) ([^\s;(]+)")
INSTALL = re.compile(r"Installing collected packages: (.*)|Prepared (\d+) packages?")
UNITS = {"": 1e-6, "k": 1e-3, "K": 1e-3, "M": 1.0, "G": 1e3}
# Runs the installer in its own place, once the kernel is told to end it with its parent. A program, and no preexec_fn:
# that runs Python in a fork of a process with threads, where it may crash.
ENDS_WITH_PARENT = """
import os, sys
try:
    from ctypes import CDLL
    CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
except (ImportError, OSError):  # a Python that was built without libffi: the lock has to do
    pass
if os.getppid() == int(sys.argv[1]):  # else it ended before the kernel was told
    os.execv(sys.argv[2], sys.argv[2:])
"""


class BootstrapError(Exception):
    """The host could not be made ready. The message names the fix; `log_tail` is what `window` said last."""

    def __init__(
        self, message: str, log_tail: Sequence[str] = (), *, window: str = SUPERVISOR_WINDOW
    ) -> None:
        super().__init__(message)
        self.log_tail, self.window = list(log_tail), window


class InstallerFailed(BootstrapError):
    """An installer ended with another exit code than 0."""


class BootstrapDeadline:
    """The time limit of the whole bootstrap; calls `tick` in every wait."""

    def __init__(self, timeout_s: float, *, tick: Callable[[], None]) -> None:
        self.timeout_s, self.tick = timeout_s, tick
        self._deadline = time.monotonic() + timeout_s

    def wait(self, spec: EnvironmentSpec, last_seen: str, log_tail: Sequence[str] = ()) -> None:
        """Sleep shortly. Raises BootstrapError once it took too long, and whatever `tick` raises."""
        if time.monotonic() > self._deadline:
            raise BootstrapError(
                f"environment {spec.name!r}: not ready within limits.bootstrap_timeout_s={self.timeout_s:g};"
                f" {last_seen}. Raise the limit, or see in the log what took so long.",
                log_tail,
            )
        self.tick()
        time.sleep(POLL_S)


class Progress:
    """How far an environment is, read from what its installer says; told now and then, as a line and as an event."""

    def __init__(self, run: RunDir, spec: EnvironmentSpec) -> None:
        self.doing, self.packages, self.downloaded_mb = "starting", 0, 0.0
        self._run, self._spec = run, spec
        self._started = time.monotonic()
        self._next = PROGRESS_MIN_S

    def read(self, line: str) -> None:
        """Take in one line of pip or uv."""
        if found := DOWNLOAD.match(line):
            megabytes = float(found[2]) * UNITS[found[3]]
            self.downloaded_mb += megabytes
            self.doing = f"downloading {'-'.join(found[1].split('-')[:2])} ({megabytes:.1f} MB)"
        elif found := COLLECT.match(line):
            self.packages += 1
            self.doing = f"resolving {Path(found[1]).name}"
        elif found := INSTALL.match(line):
            self.packages = len(found[1].split(",")) if found[1] else int(found[2])
            self.doing = f"installing {self.packages} packages"

    def tell(self) -> None:
        """Say where it is, if it is time."""
        seconds = time.monotonic() - self._started
        if seconds < self._next:
            return
        self._next = seconds + min(PROGRESS_MAX_S, max(PROGRESS_MIN_S, seconds / 6))
        fields = {
            "seconds": round(seconds, 1),
            "doing": self.doing,
            "packages": self.packages,
            "downloaded_mb": round(self.downloaded_mb, 1),
            "installed_mb": round(_megabytes(Path(self._spec.path)), 1),
        }
        run_dir.append_event(self._run, "environment_progress", name=self._spec.name, **fields)
        say(
            f"environment {self._spec.name}: {seconds:.0f} s, {self.doing}; {self.packages} packages,"
            f" {self.downloaded_mb:.0f} MB downloaded, {fields['installed_mb']:.0f} MB installed"
        )


def _megabytes(directory: Path) -> float:
    """Return the size of the files under a directory that is being written; what vanishes meanwhile is left out."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total / 1e6


def run_installer(
    argv: Sequence[str],
    spec: EnvironmentSpec,
    deadline: BootstrapDeadline,
    progress: Progress,
    *,
    environment: Mapping[str, str],
    lock: int,
) -> None:
    """Run one command in a group of its own, its output passed on; ended when anything is raised here.

    The kernel ends it with this thread, and the lock is its own too: whoever dies, nobody else builds in its place
    while it lives.
    """
    say(f"$ {shlex.join(argv)}")
    program = shutil.which(argv[0], path=environment.get("PATH", os.defpath))
    if program is None:
        raise BootstrapError(f"environment {spec.name!r}: cannot start {argv[0]}: no such program")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", ENDS_WITH_PARENT, str(os.getpid()), program, *argv[1:]],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(lock,),
        start_new_session=True,  # a group of its own, from the start
    )
    tail: collections.deque[str] = collections.deque(maxlen=LOG_TAIL_LINES)
    reader = threading.Thread(target=_pass_on, args=(process, tail, progress), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            progress.tell()
            deadline.wait(spec, f"`{argv[0]}` was still running", tail)
    finally:
        _end_group(process)
    reader.join(END_GRACE_S)
    if process.returncode != 0:
        known = diagnose_installation(list(tail))
        fix = (
            known
            or f"Its last lines say why; check {inputs_of(spec)}, and that the host reaches its package index."
        )
        message = f"environment {spec.name!r}: `{shlex.join(argv)}` failed with exit code {process.returncode}. {fix}"
        raise InstallerFailed(message, tail)


def inputs_of(spec: EnvironmentSpec) -> str:
    """Return what decides an environment's content, in the config's words."""
    trainers = "host.constraints_file, host.requirements"
    inputs = "engine.requirements_file" if spec.name == "engine" else trainers
    return (
        inputs
        if spec.torch_build == "index"
        else f"{inputs}, host.torch_build={spec.torch_build!r}"
    )


def _pass_on(
    process: subprocess.Popen[bytes], tail: collections.deque[str], progress: Progress
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        text = line.decode(errors="replace").rstrip("\n")
        tail.append(text)
        progress.read(text)
        say(text)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the installer with its children, unless it has ended; not reaped yet, so the group is its own."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_GRACE_S)
