"""A host over SSH: fabric/paramiko for commands, the OpenSSH client under rsync for bulk.

All rsyncs share one connection of that client's, which the first of them opens: a login takes ten round trips.
Both clients get the same settings, those of `ssh -G` (ssh_config.py), and both are strict about host keys
(ssh_host_key.py). A new key is added only with --accept-new-host-key, once, before anything is sent; a changed key is
never accepted. There is no password prompt here: what paramiko cannot do, openssh.py does.
"""

import contextlib
import logging
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import fabric
import paramiko
from paramiko.ssh_exception import ChannelException, IncompatiblePeer, SSHException

from rollouts.remote.errors import TransportError
from rollouts.remote.host.framing import SHELL_COMMAND
from rollouts.remote.host.ssh_auth import LOGIN_TIMEOUT_S, KeyLogin, LoginFailed
from rollouts.remote.host.ssh_commands import SSHCommands
from rollouts.remote.host.ssh_config import CONNECT_TIMEOUT_S, Hop, read_hops, way_words
from rollouts.remote.host.ssh_errors import explain
from rollouts.remote.host.ssh_host_key import HostKeyError, HostKeyPolicy, Trust, plain, read_trust
from rollouts.remote.host.ssh_rsync import HOST_ALIAS, write_settings
from rollouts.remote.host.ssh_shared import leave_connection, shared_by, socket_directory
from rollouts.remote.host.ssh_socket import Proxy, open_tcp, open_through
from rollouts.remote.host.transport import Target

KEEPALIVE_S = 15
RSYNCS_PERSIST_S = 60  # the connection outlives a killed deploy, and the last rsync, by so long


class SSHTransport(SSHCommands):
    """Transport over one SSH connection for commands, and one that the ssh command keeps open for rsyncs."""

    def __init__(self, text: str, target: Target, *, accept_new_host_key: bool) -> None:
        self.target = text
        self._target = target
        self._accept_new = accept_new_host_key
        self._hops: tuple[Hop, ...] | None = None
        self._connection: fabric.Connection | None = None
        self._open = contextlib.ExitStack()  # what belongs to the connection, jump hosts included
        self._lock = threading.Lock()
        self._settings: Path | None = None
        # of the rsyncs' connection: its socket, and what leaves it, at this process's end at the latest
        self._shared: tuple[str, weakref.finalize] | None = None
        # else its tracebacks land on stderr
        logging.getLogger("paramiko").addHandler(logging.NullHandler())

    # --- connecting -------------------------------------------------------------------------------------------------

    def hops(self) -> tuple[Hop, ...]:
        """Return the way to the host, as the configuration says; read once. Raises DeployError."""
        if self._hops is None:
            self._hops = read_hops(self._target)
        return self._hops

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{hop.name}: {note}" for hop in self.hops() for note in hop.not_followed)

    def described(self) -> str:
        why = "a key or a certificate will do" if self._connection is not None else "not connected"
        way = way_words(self.hops())
        return f"{way}: paramiko logs in ({why}); rsyncs share one connection of ssh's, with the same settings"

    def connect(self) -> None:
        """Log in now. Raises TransportError: RefusedLogin where no key will do."""
        self._transport()

    def _transport(self) -> paramiko.Transport:
        with self._lock:
            if self._connection is None or not self._connection.is_connected:
                self._close()
                self._connect()
            assert self._connection is not None
            transport = self._connection.transport
            assert transport is not None
            return transport

    def _connect(self) -> None:
        """Open every hop in turn, so that a fault is that of the machine which has it."""
        connection: fabric.Connection | None = None
        with contextlib.ExitStack() as opened:
            for hop in self.hops():
                connection = self._open_hop(hop, connection, opened)
            assert connection is not None
            connection.transport.set_keepalive(KEEPALIVE_S)
            self._connection, self._open = connection, opened.pop_all()

    def _open_hop(
        self,
        hop: Hop,
        via: fabric.Connection | None,
        opened: contextlib.ExitStack,
        *,
        any_key: bool = False,
    ) -> fabric.Connection:
        started, proxy = time.monotonic(), None
        try:
            trust = read_trust(hop)
            if hop.proxy_command is not None:
                proxy = Proxy(hop.proxy_command)
                opened.callback(proxy.close)
            if proxy is not None:
                way = proxy.socket
            else:
                way = open_tcp(hop) if via is None else open_through(via.transport, hop)
            opened.callback(way.close)
            connection = _connection(hop, way, trust, any_key=any_key)
            opened.callback(connection.close)
            connection.client.set_missing_host_key_policy(
                HostKeyPolicy(hop, trust, accept_new=self._accept_new)
            )
            connection.open()
        except IncompatiblePeer as error:
            # it has no key of a known type
            if trust.known.keys and not any_key and "host key" in str(error):
                # shows which one it has, and is refused
                return self._open_hop(hop, via, opened, any_key=True)
            raise explain(self.target, hop, error, waited_s=0.0) from None
        except Exception as error:
            # every kind is told apart and given its fix; a bug of ours goes on as it is
            cause = (
                proxy.ended()
                if proxy is not None and not isinstance(error, LoginFailed | HostKeyError)
                else None
            ) or error
            raise explain(self.target, hop, cause, waited_s=time.monotonic() - started) from None
        return connection

    # --- commands ---------------------------------------------------------------------------------------------------

    def open_channel(self) -> paramiko.Channel:
        for attempt in (1, 2):
            try:
                channel = self._transport().open_session(timeout=CONNECT_TIMEOUT_S)
                channel.exec_command(SHELL_COMMAND)
                return channel
            except (SSHException, OSError, EOFError) as error:
                self.close()  # a connection that died while idle: once more with a new one
                if isinstance(error, ChannelException):
                    raise TransportError(
                        f"{self.target}: the host lets the key in, but opens no session.",
                        found=error.text or str(error),
                        fix="see MaxSessions in the host's sshd_config, and its log",
                    ) from None
                if attempt == 2:
                    words = str(error) or type(error).__name__
                    raise TransportError(
                        f"{self.target}: connection lost: {words}", lost=True
                    ) from None
        raise AssertionError("unreachable")

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._connection = None
        self._open.close()
        if self._shared is not None:
            # an rsync that runs goes on; the next one logs in anew, so that none waits for a dead connection
            self._shared[1]()
            self._shared = None

    # --- rsync ------------------------------------------------------------------------------------------------------

    def ssh_argv(self) -> list[str]:
        """Write the same settings into a file for the ssh command, which reads nothing else."""
        with self._lock:
            if self._settings is None:
                self._settings = Path(tempfile.mkdtemp(prefix="rollouts-ssh-"))
                weakref.finalize(self, shutil.rmtree, self._settings, ignore_errors=True)
            config = write_settings(self._settings, self.hops(), keepalive_s=KEEPALIVE_S)
        return ["ssh", "-F", str(config)]

    def rsync_options(self) -> list[str]:
        with self._lock:
            if self._shared is None:
                socket = str(socket_directory() / secrets.token_hex(8))
                self._shared = socket, weakref.finalize(self, leave_connection, socket)
            socket = self._shared[0]
        return self.rsync_over(*self.ssh_argv(), *shared_by(socket, RSYNCS_PERSIST_S))

    def rsync_path(self, path: str) -> str:
        return f"{HOST_ALIAS}:{path}"


def _connection(hop: Hop, way: object, trust: Trust, *, any_key: bool) -> fabric.Connection:
    """Return a connection over `way` that reads no configuration file."""
    timeout_s = hop.connect_timeout_s

    def transport(sock: object, **options: object) -> paramiko.Transport:
        made = paramiko.Transport(sock, **options)
        made.handshake_timeout = timeout_s
        security = made.get_security_options()
        security.ciphers = _common(hop.list_of("ciphers"), security.ciphers)
        security.digests = _common(hop.list_of("macs"), security.digests)
        security.kex = _common(hop.list_of("kexalgorithms"), security.kex)
        possible = [
            name
            for name in hop.list_of("hostkeyalgorithms")
            if name in paramiko.Transport._key_info
        ]
        security.key_types = tuple((not any_key and trust.key_types(possible)) or plain(possible))
        return made

    return fabric.Connection(
        hop.host,
        user=hop.user,
        port=hop.port,
        config=fabric.Config(lazy=True, ssh_config=paramiko.SSHConfig()),
        connect_timeout=timeout_s,
        connect_kwargs={
            "sock": way,
            "auth_strategy": KeyLogin(hop),
            "transport_factory": transport,
            "banner_timeout": timeout_s,
            "auth_timeout": LOGIN_TIMEOUT_S,
            "channel_timeout": max(timeout_s, CONNECT_TIMEOUT_S),
        },
    )


def _common(wanted: list[str], possible: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in wanted if name in possible)
