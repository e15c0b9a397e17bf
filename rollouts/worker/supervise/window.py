"""The wrapper around each tmux window's process: output to pane and log, the true exit code to a file.

    python3 -m rollouts.worker.supervise.window --run <run_path> --stage rl --window engine-0

What runs, and with which environment, stands in plan.json under that stage and window, so that nothing of it goes
through command lines. The process leads a session of its own; the wrapper stays between it and tmux: it forwards
signals, ends the process when the supervisor is dead, writes exit/<stage>-<window>.json when it has ended, and ends
what it left behind: whatever carries the run's mark, and whatever descends from it. It writes nothing into a run
directory that was removed. Standard library only.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from rollouts import run_dir
from rollouts.plain_files import appending, read_plain
from rollouts.run_dir import ExitRecord, LaunchPlan, ProcessRecord, ProcessSpec, RunDir
from rollouts.worker.engine_tools import with_tools
from rollouts.worker.processes import (
    SUPERVISOR_MARGIN_S,
    SUPERVISOR_STAGE,
    SUPERVISOR_WINDOW,
    WINDOW_VARIABLE,
    adopt_orphans,
    end_marked,
    marked_processes,
    reap,
    run_marks,
    window_mark,
)
from rollouts.worker.supervise.causes import cause_of

READ_BYTES = 1 << 16
PANE_BACKLOG_BYTES = 1 << 20  # what a slow pane may owe; the log has everything
DRAIN_S = 5.0  # for the last output, once the processes are gone
PANE_CLOSE_S = 1.0  # a paused pane may keep what it has
LAST_WORDS_S = 0.5  # for a failed process's last output, before it is looked at for the cause
CAUSE_LINES = 400  # of the log, from its end
UNLOGGED_BYTES = 1 << 13  # of what a full disk kept from the log, the end is written once there is room
POLL_S = 0.1
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as a shell reports them


class Pane:
    """Writes to the tmux pane from a thread of its own: a paused or vanished pane never holds up the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._chunks: collections.deque[bytes] = collections.deque()
        self._bytes = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def offer(self, data: bytes) -> None:
        with self._changed:
            self._chunks.append(data)
            self._bytes += len(data)
            while self._bytes > PANE_BACKLOG_BYTES:
                self._bytes -= len(self._chunks.popleft())
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Let it write what it owes, for so long at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks or self._closing)
                if not self._chunks:
                    return
                data = self._chunks.popleft()
                self._bytes -= len(data)
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # the pane is gone; offers go on being dropped at the bound
                return


class Window:
    """One window's process from start to exit record."""

    def __init__(self, run: RunDir, plan: LaunchPlan, stage: str, window: str) -> None:
        self.run, self.plan, self.stage, self.window = run, plan, stage, window
        self.is_supervisor = stage == SUPERVISOR_STAGE
        self.grace_s = plan.stop_grace_s
        if self.is_supervisor:  # it has to end all the others first
            self.grace_s = 2 * plan.stop_grace_s + SUPERVISOR_MARGIN_S
        self.pane = Pane(sys.stdout.fileno())
        self.requests: collections.deque[int] = collections.deque()  # signals to hand on, from handlers and threads
        self.kill_at: float | None = None
        self._pump_thread: threading.Thread | None = None
        self._unlogged = b""  # the end of what did not get into the log
        log = run.log(window)
        self._log_start = log.stat().st_size if log.exists() else 0  # an engine's earlier lives come before

    def main(self) -> int:
        """Run the process to its end. Returns its exit code as a shell would give it."""
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(signum, lambda received, _frame: self.requests.append(received))
        adopt_orphans()
        started_at = time.time()
        try:
            child = self._start()
        except OSError as error:
            self.say(f"cannot start the {self.window} process: {error}\n")
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        else:
            code = self._attend(child)
        record = ExitRecord(
            window=self.window,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            started_at=started_at,
            ended_at=time.time(),
        )
        if not self.is_supervisor:  # at once: the supervisor acts on it, and waits for us before it reads the log
            self._write_record(dataclasses.replace(record, message=self._cause(code)))
        self._end_leftovers(code)
        if self._pump_thread is not None:
            self._pump_thread.join(DRAIN_S)
        self._log_rest()
        self.pane.close(PANE_CLOSE_S)
        if self.is_supervisor:  # last: where it stands, nothing of the run is left
            status = None if self._is_gone() else run_dir.read_status(self.run)
            self._write_record(dataclasses.replace(record, message=status.message if status else ""))
        return record.code

    def _is_gone(self) -> bool:
        """Was the run's directory removed? What is written into it would bring a part of it back."""
        return not self.run.plan.exists()

    def _cause(self, code: int) -> str:
        if code == 0 or self._pump_thread is None:
            return ""
        self._pump_thread.join(LAST_WORDS_S)
        lines = run_dir.tail_lines(self.run.log(self.window), CAUSE_LINES, start=self._log_start)
        return cause_of([*lines, *self._unlogged.decode(errors="replace").splitlines()]) or ""

    def _write_record(self, record: ExitRecord) -> None:
        path = self.run.exit(self.stage, self.window)
        if self._is_gone():
            return
        try:
            run_dir.write_on_full_disk(self.run, lambda: run_dir.write_json_atomic(path, record))
        except OSError as error:  # what is left of the process still has to be ended
            self.say(f"cannot write {path}: {error}\n")

    def _log_rest(self) -> None:
        """Write the end of what a full disk kept from the log, now that the process needs no more room."""
        rest, self._unlogged = self._unlogged, b""
        if rest and not self._is_gone():
            with contextlib.suppress(OSError):
                run_dir.write_on_full_disk(
                    self.run, lambda: self._log(b"\n[a full disk; the last lines were]\n" + rest)
                )

    def _log(self, data: bytes) -> None:
        with appending(self.run.log(self.window)) as log:
            while data:
                data = data[log.write(data) :]

    def _start(self) -> subprocess.Popen[bytes]:
        spec = self._spec()
        child = subprocess.Popen(
            spec.argv,
            env=self._environment(spec),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=-1 if self.is_supervisor else 0o077,  # sockets and files in /tmp and /dev/shm are the user's alone
        )
        record = ProcessRecord(name=self.window, pid=child.pid, pgid=child.pid, started_at=time.time())
        try:
            run_dir.write_json_atomic(self.run.process(self.window), record)
        except OSError as error:
            self.say(f"cannot write {self.run.process(self.window)}: {error}\n")
        assert child.stdout is not None
        self._pump_thread = threading.Thread(target=self._pump, args=(child.stdout.fileno(),), daemon=True)
        self._pump_thread.start()
        if not self.is_supervisor:
            threading.Thread(target=self._follow_supervisor, daemon=True).start()
        return child

    def _spec(self) -> ProcessSpec:
        if self.is_supervisor:
            argv = [self.plan.base_python, "-E", "-u", "-m", "rollouts.worker.supervise.supervisor", str(self.run.path)]
            environment = json.loads(read_plain(self.run.config))["host"]["env"]
            return ProcessSpec(window=self.window, argv=argv, env=environment, ready_url=None, ready_timeout_s=0)
        wanted = (self.stage, self.window)
        return next(spec for stage, spec in self.plan.processes() if (stage, spec.window) == wanted)

    def _environment(self, spec: ProcessSpec) -> dict[str, str]:
        """What the launcher had, then the plan's, then the secrets and engine keys, then the run's mark."""
        given = json.loads(read_plain(self.run.secrets))
        environment = {
            **given["inherited"],
            **spec.env,
            **given["secrets"],
            **given["engine_keys"],
            "PYTHONUNBUFFERED": "1",
            "SPT_NOENV": "1",  # setproctitle would overwrite /proc/pid/environ, and with it the mark
            **run_marks(self.run),
            WINDOW_VARIABLE: window_mark(self.stage, self.window),
        }
        if spec.tools_of:
            declared = {**spec.env, **given["secrets"]}
            environment = with_tools(environment, Path(spec.tools_of), declared=declared)
        if self.is_supervisor and "TMUX" in os.environ:
            environment["TMUX"] = os.environ["TMUX"]  # which server to open the other windows in
        return environment

    def _attend(self, child: subprocess.Popen[bytes]) -> int:
        """Wait for the process, handing on signals meanwhile. Returns Popen's code: negative for a signal."""
        while child.poll() is None:
            while self.requests:
                os.killpg(child.pid, self.requests.popleft())  # not reaped yet, so the group is still its own
                self.kill_at = self.kill_at or time.monotonic() + self.grace_s
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                os.killpg(child.pid, signal.SIGKILL)
            reap(spare=child.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=POLL_S)
        return int(child.returncode)

    def _end_leftovers(self, code: int) -> None:
        """End what the process started and left, whatever group it moved to; all of the run after the supervisor."""
        grace_s = self.plan.stop_grace_s
        mark = window_mark(self.stage, self.window)
        left = end_marked(self.run, {mark}, grace_s=grace_s, tick=reap, ancestors={os.getpid()})
        if self.is_supervisor:
            # The other windows saw the supervisor die as well and end their own; what they cannot, we do.
            deadline = time.monotonic() + 2 * grace_s + DRAIN_S
            while marked_processes(self.run) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            left = end_marked(self.run, None, grace_s=0, tick=reap)
            run_dir.remove_transient(self.run)
        if left:
            self.say(f"[{self.window} ended with {code}; still there after SIGKILL: {left}]\n")

    def _follow_supervisor(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the run directory is being deleted: nobody supervises it
            run_dir.wait_until_dead(self.run)
        self.requests.append(signal.SIGTERM)

    def _pump(self, source: int) -> None:
        """Copy bytes as they come to the log and the pane, until the last writer is gone."""
        with contextlib.suppress(OSError):
            self.run.log(self.window).parent.mkdir(exist_ok=True)
        while data := os.read(source, READ_BYTES):
            try:
                self._log(data)
            except OSError as error:  # disk full: the process must not block on its output for that
                self.pane.offer(f"[{self.run.log(self.window)}: {error}]\r\n".encode())
                self._unlogged = (self._unlogged + data)[-UNLOGGED_BYTES:]
            self.pane.offer(data)

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, or a directory that was removed
            self.run.log(self.window).parent.mkdir(exist_ok=True)
            self._log(text.encode())
        self.pane.offer(text.encode())


def window_command(python: str, run: RunDir, stage: str, window: str) -> list[str]:
    """The command line of a window. `env` gives the wrapper the mark: the tmux server's environment is not ours."""
    module = [python, "-E", "-m", "rollouts.worker.supervise.window"]
    marks = [f"{name}={value}" for name, value in run_marks(run).items()]
    return ["/usr/bin/env", *marks, *module, "--run", str(run.path), "--stage", stage, "--window", window]


def main() -> None:
    parser = argparse.ArgumentParser(prog="rollouts.worker.supervise.window", description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--window", required=True)
    arguments = parser.parse_args()
    run = RunDir(arguments.run)
    plan = run_dir.read_plan(run)
    assert plan is not None, f"{run.plan} is missing: the launcher writes it first"
    assert (arguments.stage == SUPERVISOR_STAGE) == (arguments.window == SUPERVISOR_WINDOW)
    window = Window(run, plan, arguments.stage, arguments.window)
    try:
        code = window.main()
    except Exception:  # whatever it was: the pane closes with us, so the log is where someone will look
        window.say(traceback.format_exc())
        raise
    sys.exit(code)


if __name__ == "__main__":
    main()
