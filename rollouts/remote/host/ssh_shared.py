"""Connections of the ssh command's that several commands share: their sockets, and what opens and leaves one."""

import contextlib
import hashlib
import os
import stat
import subprocess
import tempfile
from pathlib import Path

from rollouts.remote.host.ssh_config import Hop
from rollouts.remote.host.ssh_rsync import HOST_ALIAS

CONTROL_TIMEOUT_S = 10


def shared_by(socket: str, persist_s: int) -> list[str]:
    """Return options for ssh: go over the connection at `socket`, or log in and open it. It ends unused for so long."""
    options = "ControlMaster=auto", f"ControlPath={_escaped(socket)}", f"ControlPersist={persist_s}"
    return [word for option in options for word in ("-o", option)]


def leave_connection(socket: str) -> None:
    """Let nothing new go over a connection. It ends with what goes over it now."""
    if os.path.exists(socket):
        _control(socket, "stop")


def is_open(socket: str) -> bool:
    """Return whether a ControlMaster answers at a socket."""
    if not os.path.exists(socket):
        return False
    return _control(socket, "check")


def _control(socket: str, request: str) -> bool:
    """Return whether the master at a socket answers to a request."""
    path = f"ControlPath={_escaped(socket)}"
    argv = ["ssh", "-F", "/dev/null", "-o", path, "-O", request, HOST_ALIAS]
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(argv, capture_output=True, timeout=CONTROL_TIMEOUT_S, check=False)
        return done.returncode == 0
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
    # something of another user's lies there
    return Path(tempfile.mkdtemp(prefix="rollouts-ssh-", dir="/tmp"))


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


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
