"""A host over the OpenSSH client, for logins that paramiko cannot do: one shared connection for commands and rsync.

The connection is a ControlMaster of the user's that is open already, or one that is opened here: its socket lies in a
directory of this user's alone, and it ends PERSIST_S after its last use. So a host with a second factor asks once.
"""

import contextlib
import hashlib
import os
import shlex
import shutil
import stat
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
from rollouts.remote.host.ssh_process import ProcessChannel
from rollouts.remote.host.ssh_rsync import HOST_ALIAS, write_settings, write_shared
from rollouts.remote.host.ssh_words import explain_words

PERSIST_S = 600
KEEPALIVE_S = 15
CHECK_TIMEOUT_S = 10
LOGIN_TIMEOUT_S = 60
ASKING_TIMEOUT_S = 600  # a person looks for a telephone
STDERR_BYTES_MAX = 64 * 1024


class OpenSSHTransport(SSHCommands):
    """Transport over one connection of the ssh command's. `open_socket`: of one that is open already."""

    def __init__(self, target: str, hops: tuple[Hop, ...], choice: LoginWay, *, open_socket: str | None = None) -> None:
        self.target = target
        self._hops, self._choice, self._open_socket = hops, choice, open_socket
        self._directory = Path(tempfile.mkdtemp(prefix="rollouts-ssh-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._login: Path | None = None
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
            if self._open_socket is None and self._login is None:
                self._login = write_settings(
                    self._directory, self._hops, keepalive_s=KEEPALIVE_S, login=True, asks=self._choice.asks
                )
                self._socket = str(socket_directory() / socket_name(self._hops))
            if not is_open(self._socket):
                if self._login is None:
                    raise TransportError(f"{self.target}: the open connection has ended.", lost=True)
                self._log_in(self._login)
            return write_shared(self._directory, self._socket)

    def _log_in(self, config: Path) -> None:
        """Open it. Once it was open, no failure is the last word: an agent is locked while a laptop sleeps."""
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
        options = ("ControlMaster=yes", f"ControlPath={_escaped(self._socket)}", f"ControlPersist={PERSIST_S}")
        argv = [
            "ssh",
            "-F",
            str(config),
            *(word for option in options for word in ("-o", option)),
            "-N",
            "-f",
            HOST_ALIAS,
        ]
        limit_s = ASKING_TIMEOUT_S if asks else LOGIN_TIMEOUT_S
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        said = _Said(process.stderr, echo=asks)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise TransportError(
                f"{self.target}: the login did not end within {limit_s} s.", found=said.text(), lost=not asks
            ) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code != 0:
            raise explain_words(self.target, said.text(), client="ssh")

    def open_channel(self) -> ProcessChannel:
        return ProcessChannel(["ssh", "-F", str(self.connect()), HOST_ALIAS, SHELL_COMMAND])

    def rsync_options(self) -> list[str]:
        return ["-e", shlex.join(["ssh", "-F", str(self.connect())]), "--rsync-path=env LC_ALL=C rsync"]

    def rsync_path(self, path: str) -> str:
        return f"{HOST_ALIAS}:{path}"

    def close(self) -> None:
        """Leave the connection to the next command, and to its own end: others may be using it."""


class _Said:
    """What a process writes to stderr, kept and shown while it runs: instructions come there."""

    def __init__(self, pipe: IO[bytes], *, echo: bool) -> None:
        self._data, self._pipe, self._echo = b"", pipe, echo
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self._pipe.fileno(), 4096):
            self._data = (self._data + data)[-STDERR_BYTES_MAX:]
            if self._echo:
                _tell(data.decode(errors="replace").replace("\r", "").rstrip("\n"))

    def text(self) -> str:
        self._thread.join(2)
        return self._data.decode(errors="replace").strip()


def _tell(text: str) -> None:
    """Print to stderr; what steers a terminal is spelled out, since a host may have written it."""
    readable = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    print(readable, file=sys.stderr, flush=True)


def is_open(socket: str) -> bool:
    """Return whether a ControlMaster answers at a socket."""
    if not os.path.exists(socket):
        return False
    argv = ["ssh", "-F", "/dev/null", "-o", f"ControlPath={_escaped(socket)}", "-O", "check", HOST_ALIAS]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(argv, capture_output=True, timeout=CHECK_TIMEOUT_S, check=False).returncode == 0
    return False


def open_connection(hops: tuple[Hop, ...]) -> str | None:
    """Return the socket of a connection that a command of ours opened to this host, by this way, and that is open."""
    sockets = [str(path / socket_name(hops)) for path in _directories() if _is_ours(path)]
    return next((socket for socket in sockets if is_open(socket)), None)


def socket_name(hops: tuple[Hop, ...]) -> str:
    """Return a short name for the way to a host: other settings are another connection."""
    return hashlib.sha256(repr(hops).encode(errors="surrogateescape")).hexdigest()[:16]


def socket_directory() -> Path:
    """Make and return a directory of this user's alone, with a short name: a socket's path has about 100 characters."""
    for path in _directories():
        with contextlib.suppress(OSError):
            path.mkdir(mode=0o700, exist_ok=True)
        if _is_ours(path):
            return path
    return Path(tempfile.mkdtemp(prefix="rollouts-ssh-", dir="/tmp"))  # something of another user's lies there


def _directories() -> list[Path]:
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    bases = [own] if own and len(own) < 40 and os.path.isdir(own) else []
    return [Path(base) / f"rollouts-ssh-{os.getuid()}" for base in (*bases, "/tmp")]


def _is_ours(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


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


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
