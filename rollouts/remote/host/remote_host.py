"""A host over SSH by whichever client gets in: paramiko first; the ssh command where that login is beyond paramiko.

A ControlMaster of the user's that is open is used as it is. ssh_choice.py decides; here it is only asked.
"""

import threading
from collections.abc import Sequence

from rollouts.remote.host.openssh import OpenSSHTransport, can_ask
from rollouts.remote.host.ssh import SSHTransport
from rollouts.remote.host.ssh_choice import LoginWay, choose_client
from rollouts.remote.host.ssh_errors import RefusedLogin
from rollouts.remote.host.ssh_shared import is_open, open_connection
from rollouts.remote.host.transport import Completed, Stream, Target


class RemoteTransport:
    """Transport over SSH. The client is chosen at the first use, and again where a connection of the user's ended."""

    def __init__(self, text: str, target: Target, *, accept_new_host_key: bool) -> None:
        self.target = text
        self._accept_new = accept_new_host_key
        self._paramiko = SSHTransport(text, target, accept_new_host_key=accept_new_host_key)
        self._chosen: SSHTransport | OpenSSHTransport | None = None
        self._was_in = False  # then a refusal may pass: an agent is locked while a laptop sleeps
        self._keeps = False  # the choice outlives a lost connection
        self._lock = threading.Lock()

    def _client(self) -> SSHTransport | OpenSSHTransport:
        with self._lock:
            if self._chosen is None:
                self._chosen = self._choose()
            return self._chosen

    def _choose(self) -> SSHTransport | OpenSSHTransport:
        hops = self._paramiko.hops()
        socket = hops[-1].control_path
        if socket is not None and is_open(socket):
            choice = LoginWay(why="your connection to it is open")
            return OpenSSHTransport(self.target, hops, choice, open_socket=socket)
        if (socket := open_connection(hops)) is not None:
            return OpenSSHTransport(
                self.target,
                hops,
                LoginWay(why="an earlier login of deploy's is open"),
                open_socket=socket,
            )
        try:
            self._paramiko.connect()
        except RefusedLogin as refused:
            found = choose_client(refused.hop, refused.failure, can_ask=can_ask())
            if found is None:
                refused.lost = refused.lost or self._was_in
                raise
            self._keeps = True
            return OpenSSHTransport(self.target, hops, found, accept_new=self._accept_new)
        self._was_in = True
        return self._paramiko

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", cwd: str | None = None, timeout_s: float
    ) -> Completed:
        return self._client().run(argv, stdin=stdin, cwd=cwd, timeout_s=timeout_s)

    def stream(self, argv: Sequence[str], *, first_line: bytes, cwd: str | None = None) -> Stream:
        return self._client().stream(argv, first_line=first_line, cwd=cwd)

    def notes(self) -> tuple[str, ...]:
        return (self._chosen or self._paramiko).notes()

    def described(self) -> str:
        return self._client().described()

    def rsync_options(self) -> list[str]:
        return self._client().rsync_options()

    def shell_argv(self, line: str, *, terminal: bool) -> list[str]:
        return self._client().shell_argv(line, terminal=terminal)

    def rsync_path(self, path: str) -> str:
        return self._paramiko.rsync_path(path)  # the same for both

    def close(self) -> None:
        with self._lock:
            self._paramiko.close()
            if not self._keeps:
                self._chosen = None
