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
from rollouts.plain_files import read_plain
from rollouts.run_dir import ExitRecord, LaunchPlan, ProcessRecord, ProcessSpec, RunDir
from rollouts.worker.engine_tools import with_tools
from rollouts.worker.on_end import room_s
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
from rollouts.worker.supervise.output import DRAIN_S, Output, was_removed

POLL_S = 0.1
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as a shell reports them


class Window:
    """The process of a stage's window, from its start to its exit record."""

    umask = 0o077  # its sockets and files in /tmp and /dev/shm are the user's alone

    def __init__(self, run: RunDir, plan: LaunchPlan, stage: str, window: str) -> None:
        self.run, self.plan, self.stage, self.window = run, plan, stage, window
        self.grace_s = plan.stop_grace_s
        self.output = Output(run, window)
        # signals to hand on, from handlers and threads
        self.requests: collections.deque[int] = collections.deque()
        self.kill_at: float | None = None

    def main(self) -> int:
        """Run the process to its end and return its exit code as a shell would give it."""
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(signum, lambda received, _frame: self.requests.append(received))
        adopt_orphans()
        started_at = time.time()
        try:
            child = self._start()
        except OSError as error:
            self.output.say(f"cannot start the {self.window} process: {error}\n")
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        else:
            code = self._wait(child)
        record = ExitRecord(
            window=self.window,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            started_at=started_at,
            ended_at=time.time(),
        )
        self._end(record, code)
        return record.code

    def _end(self, record: ExitRecord, code: int) -> None:
        """Write the record, end what the process left, and close the log.

        The record comes at once: the supervisor acts on it, and waits for this wrapper before it reads the log.
        """
        message = "" if code == 0 else self.output.cause()
        self._write_record(dataclasses.replace(record, message=message))
        self._report_left(code, self._end_leftovers())
        self.output.close()

    def _write_record(self, record: ExitRecord) -> None:
        path = self.run.exit(self.stage, self.window)
        if was_removed(self.run):
            return
        try:
            run_dir.write_on_full_disk(self.run, lambda: run_dir.write_json_atomic(path, record))
        except OSError as error:  # what is left of the process still has to be ended
            self.output.say(f"cannot write {path}: {error}\n")

    def _start(self) -> subprocess.Popen[bytes]:
        spec = self._spec()
        child = subprocess.Popen(
            spec.argv,
            env=self._environment(spec),
            cwd=self._directory(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=self.umask,
        )
        record = ProcessRecord(
            name=self.window, pid=child.pid, pgid=child.pid, started_at=time.time()
        )
        try:
            run_dir.write_json_atomic(self.run.process(self.window), record)
        except OSError as error:
            self.output.say(f"cannot write {self.run.process(self.window)}: {error}\n")
        assert child.stdout is not None
        self.output.follow(child.stdout.fileno())
        self._follow_supervisor()
        return child

    def _directory(self) -> Path | None:
        """Return where the process starts: in the user's repository. None: where this wrapper runs, in a clone."""
        return self.run.code_tree if self.plan.package_path else None

    def _spec(self) -> ProcessSpec:
        wanted = (self.stage, self.window)
        return next(spec for stage, spec in self.plan.processes() if (stage, spec.window) == wanted)

    def _environment(self, spec: ProcessSpec) -> dict[str, str]:
        """Return what the launcher had, then the plan's, then the secrets and engine keys, then the run's mark."""
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
        return environment

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """Wait for the process, handing on signals meanwhile. Return Popen's code: negative for a signal."""
        while child.poll() is None:
            while self.requests:
                # not reaped yet, so the group is still its own
                os.killpg(child.pid, self.requests.popleft())
                self.kill_at = self.kill_at or time.monotonic() + self.grace_s
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                os.killpg(child.pid, signal.SIGKILL)
            reap(spare=child.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=POLL_S)
        return int(child.returncode)

    def _end_leftovers(self) -> list[int]:
        """End what the process started and left, whatever group it moved to; return the ids that survived SIGKILL."""
        mark = window_mark(self.stage, self.window)
        return end_marked(
            self.run, {mark}, grace_s=self.plan.stop_grace_s, tick=reap, ancestors={os.getpid()}
        )

    def _report_left(self, code: int, left: list[int]) -> None:
        if left:
            self.output.say(
                f"[{self.window} ended with {code}; still there after SIGKILL: {left}]\n"
            )

    def _follow_supervisor(self) -> None:
        """End the process once the supervisor is dead."""

        def wait() -> None:
            # the run directory is being deleted, its supervisor is gone
            with contextlib.suppress(FileNotFoundError):
                run_dir.wait_until_dead(self.run)
            self.requests.append(signal.SIGTERM)

        threading.Thread(target=wait, daemon=True).start()


class SupervisorWindow(Window):
    """The supervisor's own window: it outlasts all others, and its record is the last file of the run."""

    umask = -1  # the user's own

    def __init__(self, run: RunDir, plan: LaunchPlan, stage: str, window: str) -> None:
        super().__init__(run, plan, stage, window)
        # It has to end all the others first, then to run the user's command
        self.grace_s = 2 * plan.stop_grace_s + SUPERVISOR_MARGIN_S + room_s(run)

    def _end(self, record: ExitRecord, code: int) -> None:
        """End everything of the run, then write the record: once it is there, nothing of the run is left."""
        self._report_left(code, self._end_leftovers())
        self.output.close()
        status = None if was_removed(self.run) else run_dir.read_status(self.run)
        self._write_record(dataclasses.replace(record, message=status.message if status else ""))

    def _directory(self) -> None:
        """Return None: the supervisor runs where this wrapper does, beside the user's repository."""

    def _spec(self) -> ProcessSpec:
        argv = [
            self.plan.base_python,
            "-E",
            "-u",
            "-m",
            "rollouts.worker.supervise.supervisor",
            str(self.run.path),
        ]
        environment = json.loads(read_plain(self.run.config))["host"]["env"]
        return ProcessSpec(
            window=self.window, argv=argv, env=environment, ready_url=None, ready_timeout_s=0
        )

    def _environment(self, spec: ProcessSpec) -> dict[str, str]:
        environment = super()._environment(spec)
        if "TMUX" in os.environ:
            environment["TMUX"] = os.environ["TMUX"]  # which server to open the other windows in
        return environment

    def _end_leftovers(self) -> list[int]:
        """End all that is left of the run.

        The other windows saw the supervisor die as well, and end their own; what they cannot is ended here.
        """
        super()._end_leftovers()
        deadline = time.monotonic() + 2 * self.plan.stop_grace_s + DRAIN_S
        while marked_processes(self.run) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        left = end_marked(self.run, None, grace_s=0, tick=reap)
        run_dir.remove_transient(self.run)
        return left

    def _follow_supervisor(self) -> None:
        """Do nothing: this window's process is the supervisor."""


def window_command(python: str, run: RunDir, stage: str, window: str) -> list[str]:
    """Return the command line of a window. `env` gives the wrapper the mark: the tmux server's environment is
    not ours."""
    module = [python, "-E", "-m", "rollouts.worker.supervise.window"]
    marks = [f"{name}={value}" for name, value in run_marks(run).items()]
    return [
        "/usr/bin/env",
        *marks,
        *module,
        "--run",
        str(run.path),
        "--stage",
        stage,
        "--window",
        window,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="rollouts.worker.supervise.window", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--window", required=True)
    arguments = parser.parse_args()
    run = RunDir(arguments.run)
    plan = run_dir.read_plan(run)
    assert plan is not None, f"{run.plan} is missing: the launcher writes it first"
    assert (arguments.stage == SUPERVISOR_STAGE) == (arguments.window == SUPERVISOR_WINDOW)
    kind = SupervisorWindow if arguments.stage == SUPERVISOR_STAGE else Window
    window = kind(run, plan, arguments.stage, arguments.window)
    try:
        code = window.main()
    except Exception:  # the pane closes with this process, so the log has to have it
        window.output.say(traceback.format_exc())
        raise
    sys.exit(code)


if __name__ == "__main__":
    main()
