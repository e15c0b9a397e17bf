"""`deploy ssh`: a shell, or one command, on a run's host and in its directory, over the way that all verbs take."""

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from rollouts.remote.errors import DeployError
from rollouts.remote.host.transport import LOCAL_TARGET
from rollouts.remote.run.connection import RunConnection
from rollouts.remote.run.open_run import open_run
from rollouts.remote.run.other_hosts import on_host

PASSED_ON = (signal.SIGTERM, signal.SIGHUP)


def run_shell(name: str, command: Sequence[str], *, remote: str | None, host: str | None) -> int:
    """Run a shell, or `command`, in the run's directory on its host. Returns the exit code. Raises DeployError.

    `name` may be RUN@HOST, as `host` says it, of a run on several hosts.
    """
    run_id, _, named = name.partition("@")
    if named and host not in (None, named):
        raise DeployError(f"{name} names another host than --host {host}.", fix="leave out one")
    if command and command[0].startswith("-"):
        raise DeployError(
            f"`deploy ssh` has no option {command[0]}.", needed="--remote, --host; then the command"
        )
    with (
        open_run(run_id, remote, adopt=False, needs_files=True) as run,
        contextlib.ExitStack() as stack,
    ):
        run.progress.reached = "nothing"  # what goes wrong here is of the shell, not of the run
        connection = RunConnection(run.entry, run.facts.python or "", run.transport)
        if host or named:
            connection = on_host(connection, host or named, stack)
        entry = connection.entry
        line = shell_line(entry.run_path, command, login=entry.target != LOCAL_TARGET)
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        return run_in_front(connection.transport.shell_argv(line, terminal=terminal))


def shell_line(directory: str, command: Sequence[str], *, login: bool) -> str:
    """Return the line of sh that does it. One word is a line of its own, with pipes; several are a command as it is.

    `login`: the shell reads the files that it reads after a login.
    """
    if not command:
        last = f'exec "${{SHELL:-/bin/sh}}"{" -l" if login else ""}'
    else:
        last = command[0] if len(command) == 1 else shlex.join(command)
    return f"cd {shlex.quote(directory)} || exit 1\n{last}"


def run_in_front(argv: Sequence[str]) -> int:
    """Run a program that has this process's input, output and terminal. Returns its exit code, 128 + N for a signal's.

    Ctrl-C is the program's own affair; a signal that ends this process ends the program.
    """
    process: subprocess.Popen[bytes] | None = None
    on_terminal = any(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process is not None and (number in PASSED_ON or not on_terminal):
            process.send_signal(number)

    heeded = [n for n in (signal.SIGINT, *PASSED_ON) if signal.getsignal(n) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, pass_on) for number in heeded}
    try:
        process = subprocess.Popen(argv)
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
