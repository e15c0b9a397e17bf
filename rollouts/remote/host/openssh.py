"""A host over the OpenSSH client, for logins that paramiko cannot do: one shared connection for commands and rsync.

The connection is a ControlMaster of the user's that is open already, or one that is opened here: its socket lies in a
directory of this user's alone, and it ends PERSIST_S after its last use. So a host with a second factor asks once.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO

from rollouts.remote.errors import TransportError
from rollouts.remote.host.framing import SHELL_COMMAND
from rollouts.remote.host.ssh_choice import LoginWay
from rollouts.remote.host.ssh_commands import SSHCommands
from rollouts.remote.host.ssh_config import OF_LOGINS, PASSED_ON, Hop, way_words
from rollouts.remote.host.ssh_errors import changed_by_ssh, unwritable
from rollouts.remote.host.ssh_process import ProcessChannel
from rollouts.remote.host.ssh_rsync import (
    HOST_ALIAS,
    JUMP_WORDS,
    KNOWN_HOSTS,
    keep_new_keys,
    write_settings,
    write_shared,
)
from rollouts.remote.host.ssh_shared import is_open, shared_by, socket_directory, socket_name
from rollouts.remote.host.ssh_words import explain_words

PERSIST_S = 600
KEEPALIVE_S = 15
LOGIN_TIMEOUT_S = 60
ASKING_TIMEOUT_S = 600  # a person looks for a telephone
STDERR_BYTES_MAX = 64 * 1024


class OpenSSHTransport(SSHCommands):
    """Transport over one connection of the ssh command's. `open_socket`: of one that is open already."""

    def __init__(
        self,
        target: str,
        hops: tuple[Hop, ...],
        choice: LoginWay,
        *,
        open_socket: str | None = None,
        accept_new: bool = False,
    ) -> None:
        self.target = target
        self._accept_new = accept_new
        self._hops, self._choice, self._open_socket = hops, choice, open_socket
        self._directory = Path(tempfile.mkdtemp(prefix="rollouts-ssh-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._socket = open_socket or ""
        self._lock = threading.Lock()
        self._was_open = False

    def described(self) -> str:
        users = self._open_socket is not None and self._open_socket == self._hops[-1].control_path
        end = "is the user's own" if users else f"ends {PERSIST_S // 60} minutes after its last use"
        return (
            f"{way_words(self._hops)}: the ssh command logs in, since {self._choice.why}; commands and files share one"
            f" connection, which {end}"
        )

    def notes(self) -> tuple[str, ...]:
        """Return settings that the ssh command is not given either."""
        followed = (*PASSED_ON, *OF_LOGINS)
        return tuple(
            f"{hop.name}: {note}"
            for hop in self._hops
            for note in hop.not_followed
            if note.partition(" ")[0] not in followed
        )

    def connect(self) -> Path:
        """Open the shared connection unless it is open; return the configuration that leads over it.

        Raises TransportError: lost, where one that was open before has ended.
        """
        with self._lock:
            if not self._socket:
                self._socket = str(socket_directory() / socket_name(self._hops))
            if not is_open(self._socket):
                if self._open_socket is not None:
                    raise TransportError(
                        f"{self.target}: the open connection has ended.", lost=True
                    )
                self._log_in()
            return write_shared(self._directory, self._socket)

    def _log_in(self) -> None:
        """Open it. Once it was open, no failure is the last word: an agent is locked while a laptop sleeps."""
        # each time anew: a key that the last login accepted is known by now, and no other one passes
        config = write_settings(
            self._directory,
            self._hops,
            keepalive_s=KEEPALIVE_S,
            login=True,
            asks=self._choice.asks,
            accept_new=self._accept_new,
        )
        try:
            self._open(config)
        except TransportError as error:
            error.lost = error.lost or self._was_open
            raise
        self._was_open = True

    def _open(self, config: Path) -> None:
        """Start the master: it logs in, asking on the terminal what it has to, and goes to the background."""
        asks = self._choice.asks
        if asks:
            _tell(f"{self.target}: {self._choice.why}. ssh asks for what it needs:")
        argv = [
            "ssh",
            "-F",
            str(config),
            *("-o", "ControlMaster=yes", *shared_by(self._socket, PERSIST_S)),
            "-N",
            "-f",
            HOST_ALIAS,
        ]
        limit_s = ASKING_TIMEOUT_S if asks else LOGIN_TIMEOUT_S
        (self._directory / JUMP_WORDS).unlink(missing_ok=True)
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        said = _Said(process.stderr, echo=asks, jumps=self._directory / JUMP_WORDS)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise TransportError(
                f"{self.target}: the login did not end within {limit_s} s.",
                found=said.text(),
                lost=not asks,
            ) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        try:
            keep_new_keys(self._directory, self._hops)
        except OSError as error:
            raise unwritable(self.target, error) from None
        if code != 0:
            words, copy = said.text(), self._directory / KNOWN_HOSTS
            changed = changed_by_ssh(self.target, self._hops, copy, words)
            raise changed or explain_words(self.target, words, client="ssh")

    def open_channel(self) -> ProcessChannel:
        return ProcessChannel([*self.ssh_argv(), HOST_ALIAS, SHELL_COMMAND])

    def ssh_argv(self) -> list[str]:
        return ["ssh", "-F", str(self.connect())]

    def rsync_path(self, path: str) -> str:
        return f"{HOST_ALIAS}:{path}"

    def close(self) -> None:
        """Leave the connection to the next command, and to its own end: others may be using it."""


class _Said:
    """What a process writes to stderr, kept and shown while it runs: instructions come there."""

    def __init__(self, pipe: IO[bytes], *, echo: bool, jumps: Path) -> None:
        self._data, self._pipe, self._echo, self._jumps = b"", pipe, echo, jumps
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self._pipe.fileno(), 4096):
            self._data = (self._data + data)[-STDERR_BYTES_MAX:]
            if self._echo:
                _tell(data.decode(errors="replace").replace("\r", "").rstrip("\n"))

    def text(self) -> str:
        """Return its words, after those of the jump hosts: theirs say why, its own only that the way is cut."""
        self._thread.join(2)
        with contextlib.suppress(FileNotFoundError):
            self._data = self._jumps.read_bytes()[-STDERR_BYTES_MAX:] + self._data
        return self._data.decode(errors="replace").strip()


def _tell(text: str) -> None:
    """Print to stderr; what steers a terminal is spelled out, since a host may have written it."""
    readable = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
    print(readable, file=sys.stderr, flush=True)


def can_ask(environment: Callable[[str], str | None] = os.environ.get) -> bool:
    """Return whether ssh could ask its user: on the terminal, or by a program (SSH_ASKPASS)."""
    required = environment("SSH_ASKPASS_REQUIRE") or ""
    if required == "never" or not environment("SSH_ASKPASS"):
        pass
    elif required in ("force", "prefer") or environment("DISPLAY"):
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
