"""How the control side reaches a host: run a command, follow a command's lines, copy with rsync.

Two transports behind one protocol: `LocalTransport` here, `SSHTransport` in ssh.py. A command is always a list of
words; where a shell stands in between, it is one line that framing.py makes. `cwd` is entered on the host.
"""

import contextlib
import os
import re
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollouts.remote.bounded import STDERR_BYTES_MAX, Collected, bounded, run_here
from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.framing import LineSplitter
from rollouts.remote.rsync_version import PROTECTS_ARGUMENTS, TELLS_PROGRESS, rsync_version
from rollouts.remote.ssh_words import explain_words, shell_speaks

LOCAL_TARGET = "local"
PROGRESS_BYTES_MAX = 64 * 1024  # of a line of rsync's progress, the last ones are kept


@dataclass(frozen=True)
class Completed:
    """How a command ended, and all that it printed."""

    returncode: int
    stdout: bytes
    stderr: bytes
    noise: bytes = b""  # what the host's shell printed before the command; all of it, where the command never began

    @property
    def out(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        return self.stderr.decode(errors="replace").strip()


class Stream(Protocol):
    """A running command whose output is read line by line, and whose stdin stays open until `close`."""

    def lines(self, *, idle_timeout_s: float) -> Iterator[bytes]:
        """Each line with its end, until the command ends. TransportError(lost) when none came for that long."""
        ...

    def end(self) -> Completed:
        """After `lines` is exhausted: the exit code and the last of stderr (stdout is empty)."""
        ...

    def close(self) -> None:
        """End the command: stdin closed, and no waiting for it."""
        ...


class Transport(Protocol):
    """One host. Connections are made on first use and reused until `close`."""

    target: str  # as the user typed it

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", cwd: str | None = None, timeout_s: float) -> Completed:
        """Ends within timeout_s or raises TransportError."""
        ...

    def stream(self, argv: Sequence[str], *, first_line: bytes, cwd: str | None = None) -> Stream: ...

    def notes(self) -> tuple[str, ...]:
        """Settings for the way to the host that are not followed. Raises DeployError where they cannot be read."""
        ...

    def rsync_options(self) -> list[str]:
        """What an rsync command needs to reach the host."""
        ...

    def rsync_path(self, path: str) -> str:
        """`path` on the host, as rsync's source or destination."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Target:
    """user@host:port, taken apart. `host` may be an alias of ~/.ssh/config, whose user and port count then."""

    host: str
    user: str | None
    port: int | None


def parse_target(text: str) -> Target:
    """Take `[ssh://][user@]host[:port]` apart; an IPv6 address with a port stands in brackets. Raises DeployError."""
    match = re.fullmatch(
        r"(?:(?P<user>[^@\s:/]+)@)?(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\s:@\[\]/-][^\s:@\[\]/]*))(?::(?P<port>\d+))?",
        re.sub(r"^ssh://(.*?)/?$", r"\1", text),
    )
    if match is None:
        raise DeployError(
            f"--remote {text!r} is no host.",
            needed="[user@]host[:port], ssh://[user@]host[:port], or the name of a Host in ~/.ssh/config",
            fix="for example --remote ubuntu@203.0.113.7:2222",
        )
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 1 <= port <= 65535:
        raise DeployError(f"--remote {text!r}: port {port}", needed="a port from 1 to 65535")
    return Target(host=match["v6"] or match["host"], user=match["user"], port=port)


def in_directory(argv: Sequence[str], cwd: str | None) -> list[str]:
    """`argv`, run in `cwd`, as one command."""
    if cwd is None:
        return list(argv)
    return ["sh", "-c", 'cd "$0" && exec "$@"', cwd, *argv]


class LocalTransport:
    """This machine as the host."""

    target = LOCAL_TARGET

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", cwd: str | None = None, timeout_s: float) -> Completed:
        stdout = Collected(self.target)
        try:
            code, stderr = run_here(in_directory(argv, cwd), stdout.add, stdin=stdin, timeout_s=timeout_s)
        except FileNotFoundError as error:
            return Completed(127, b"", f"{error.filename}: not found".encode())
        except subprocess.TimeoutExpired:
            raise TransportError(f"{shlex.join(argv)[:200]}: no end after {timeout_s:.0f} s, given up") from None
        return Completed(code, stdout.all(), stderr)

    def stream(self, argv: Sequence[str], *, first_line: bytes, cwd: str | None = None) -> Stream:
        process = subprocess.Popen(
            in_directory(argv, cwd),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us: we close it
        )
        return LocalStream(process, first_line)

    def notes(self) -> tuple[str, ...]:
        return ()

    def rsync_options(self) -> list[str]:
        return []

    def rsync_path(self, path: str) -> str:
        return path

    def close(self) -> None:
        return None


class LocalStream:
    """Stream over a child's pipes."""

    def __init__(self, process: subprocess.Popen[bytes], first_line: bytes) -> None:
        assert process.stdin and process.stdout and process.stderr
        self._process = process
        self._stdout, self._stderr = process.stdout.fileno(), process.stderr.fileno()
        self._tail = b""
        with contextlib.suppress(BrokenPipeError):  # it ended at once: its exit code and stderr say why
            process.stdin.write(first_line)
            process.stdin.flush()

    def lines(self, *, idle_timeout_s: float) -> Iterator[bytes]:
        lines, open_pipes = LineSplitter(), {self._stdout, self._stderr}
        while self._stdout in open_pipes:
            ready, _, _ = select.select(list(open_pipes), [], [], idle_timeout_s)
            if not ready:
                raise TransportError(f"no sign of life for {idle_timeout_s:.0f} s", lost=True)
            for pipe in ready:
                data = os.read(pipe, 1 << 18)
                if not data:
                    open_pipes.discard(pipe)
                elif pipe == self._stderr:
                    self._tail = (self._tail + data)[-STDERR_BYTES_MAX:]
                else:
                    yield from bounded(LOCAL_TARGET, lines.feed, data)

    def end(self) -> Completed:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and select.select([self._stderr], [], [], 1)[0]:
            data = os.read(self._stderr, 1 << 16)
            if not data:
                break
            self._tail = (self._tail + data)[-STDERR_BYTES_MAX:]
        self.close()
        return Completed(self._process.wait(), b"", self._tail)

    def close(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run_rsync(
    transport: Transport,
    arguments: Sequence[str],
    *,
    stdin: bytes = b"",
    timeout_s: float | None,
    on_output: Callable[[str], None] | None = None,
) -> Completed:
    """One rsync to or from the host. Raises for a lost connection, a full disk, a missing rsync; returns the rest.

    `timeout_s` None: it may take as long as it needs; rsync's own --timeout ends one that stands still. `on_output`
    gets each line of stdout as it comes, those that end in a carriage return too; where this machine's rsync tells its
    progress at all.
    """
    rsync = shutil.which("rsync")
    if rsync is None:
        raise DeployError("rsync is not installed on this machine.", fix="apt-get install rsync, or brew install rsync")
    version = rsync_version(rsync)
    progress = ["--info=progress2"] if on_output is not None and version >= TELLS_PROGRESS else []
    if version >= PROTECTS_ARGUMENTS:
        arguments = ["-s", *arguments]
    else:  # the host's shell reads the paths
        prefix = transport.rsync_path("")
        arguments = [_quoted_path(argument, prefix) for argument in arguments]
    argv = [rsync, *progress, *transport.rsync_options(), *arguments]
    try:
        result = _run_told(argv, transport, stdin, timeout_s, on_output)
    except subprocess.TimeoutExpired:
        raise TransportError(f"rsync with {transport.target}: no end after {timeout_s:.0f} s", lost=True) from None
    if result.returncode == 0:
        return result
    if result.returncode == 1 and (
        unknown := re.search(r"[^\n]*(?:unknown|unrecognized|invalid) option[^\n]*", result.err)
    ):
        raise DeployError(
            f"this machine's rsync ({rsync}) is too old.",
            found=unknown[0][:300],
            needed="rsync 3.0 or newer",
            fix="brew install rsync, or apt-get install rsync",
        )
    if "No space left on device" in result.err:
        raise disk_full(transport.target, result.err)
    if result.returncode == 127 or "rsync: command not found" in result.err or "rsync: not found" in result.err:
        raise DeployError(f"{transport.target} has no rsync.", fix="on the host: apt-get install rsync")
    if result.returncode == 2 and "is your shell clean?" in result.err:
        raise shell_speaks(transport.target, result.err[-500:])
    if result.returncode == 255:
        raise explain_words(transport.target, result.err)
    if result.returncode in (10, 12, 30, 35):  # socket, protocol stream, time-outs
        raise TransportError(f"rsync with {transport.target} was cut off.", lost=True, found=result.err[-500:])
    return result


def _quoted_path(argument: str, prefix: str) -> str:
    """A path on the host in words of its shell; anything else as it is."""
    if not prefix or not argument.startswith(prefix):
        return argument
    return prefix + shlex.quote(argument.removeprefix(prefix))


def _run_told(
    argv: Sequence[str],
    transport: Transport,
    stdin: bytes,
    timeout_s: float | None,
    on_line: Callable[[str], None] | None,
) -> Completed:
    """Run rsync with its output kept, or told line by line while it runs."""
    english = {**os.environ, "LC_ALL": "C"}  # its words are read
    stdout, rest = Collected(transport.target), b""

    def tell(data: bytes) -> None:
        nonlocal rest
        assert on_line is not None
        *lines, rest = re.split(rb"[\r\n]", rest[-PROGRESS_BYTES_MAX:] + data)
        for line in lines:
            on_line(line.decode(errors="replace"))

    on_stdout = stdout.add if on_line is None else tell
    code, stderr = run_here(argv, on_stdout, stdin=stdin, timeout_s=timeout_s, environment=english)
    return Completed(code, stdout.all(), stderr)


def disk_full(target: str, detail: str) -> DeployError:
    where = re.search(r'"([^"]+)"', detail)
    return DeployError(
        f"{target}: its disk is full.",
        found=f"writing {where[1]}: no space left on device" if where else detail[-300:],
        fix="free some space there, or set ROLLOUTS_HOME on the host to a larger disk",
    )
