"""How the control side reaches a host: run a command, follow a command's lines, copy with rsync.

Transports behind one protocol: this machine (local.py); over SSH paramiko (ssh.py) or the ssh command (openssh.py). A
command is always a list of words; where a shell is in between, it is one line that framing.py makes. `cwd` is entered
on the host.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollouts.remote.errors import DeployError

LOCAL_TARGET = "local"


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
        """Yield each line with its end, until the command ends. TransportError(lost) when none came for that long."""
        ...

    def end(self) -> Completed:
        """Return the exit code and the last of stderr, after `lines` is exhausted (stdout is empty)."""
        ...

    def close(self) -> None:
        """End the command: stdin closed, and no waiting for it."""
        ...


class Transport(Protocol):
    """One host. Connections are made on first use and reused until `close`."""

    target: str  # as the user typed it

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", cwd: str | None = None, timeout_s: float
    ) -> Completed:
        """Run a command. It ends within timeout_s, or TransportError is raised."""
        ...

    def stream(
        self, argv: Sequence[str], *, first_line: bytes, cwd: str | None = None
    ) -> Stream: ...

    def notes(self) -> tuple[str, ...]:
        """Return settings for the way to the host that are not followed. Raises DeployError if they cannot be read."""
        ...

    def described(self) -> str:
        """Return how the host is reached, and why so; once a command was run."""
        ...

    def rsync_options(self) -> list[str]:
        """Return what an rsync command needs to reach the host."""
        ...

    def rsync_path(self, path: str) -> str:
        """Return `path` on the host, as rsync's source or destination."""
        ...

    def shell_argv(self, line: str, *, terminal: bool) -> list[str]:
        """Return a command of this machine that runs a line of sh on the host, with its own input and output.

        `terminal`: the line gets one there.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Target:
    """user@host:port, taken apart. `host` may be an alias of ~/.ssh/config, whose user and port count then."""

    host: str
    user: str | None
    port: int | None


def parse_target(text: str) -> Target:
    """Take `[ssh://][user@]host[:port]` apart; an IPv6 address with a port is in brackets. Raises DeployError."""
    match = re.fullmatch(
        r"(?:(?P<user>[^@\s:/]+)@)?(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\s:@\[\]/-][^\s:@\[\]/]*))(?::(?P<port>\d+))?",
        re.sub(r"^ssh://(.*?)/?$", r"\1", text),
    )
    if match is None:
        raise DeployError(
            f"--remote {text!r} is not a valid host.",
            needed="[user@]host[:port], ssh://[user@]host[:port], or the name of a Host in ~/.ssh/config",
            fix="for example --remote ubuntu@203.0.113.7:2222",
        )
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 1 <= port <= 65535:
        raise DeployError(f"--remote {text!r}: port {port}", needed="a port from 1 to 65535")
    return Target(host=match["v6"] or match["host"], user=match["user"], port=port)
