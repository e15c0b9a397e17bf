"""A host over SSH: fabric/paramiko for commands, the OpenSSH client under rsync for bulk.

Both read `~/.ssh/config` and one known_hosts file, `~/.ssh/known_hosts`, and both are strict about host keys. A new
key is added only with --accept-new-host-key, once, before anything is sent; a changed key is never accepted. There is
no password prompt anywhere.
"""

import base64
import contextlib
import hashlib
import logging
import os
import queue
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fabric
import paramiko
from paramiko.ssh_exception import (
    AuthenticationException,
    BadHostKeyException,
    NoValidConnectionsError,
    PasswordRequiredException,
    SSHException,
)

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.transport import STDERR_BYTES_MAX, Completed, Stream, Target, in_directory

CONNECT_TIMEOUT_S = 20  # ConnectTimeout in ~/.ssh/config overrides it. Generous: a loaded host is slow, not gone
KEEPALIVE_S = 15
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


class UnknownHostKey(Exception):
    """The host's key is in no known_hosts file."""

    def __init__(self, name: str, key: paramiko.PKey) -> None:
        super().__init__(name)
        self.name, self.key = name, key


class StrictPolicy(paramiko.MissingHostKeyPolicy):
    """Refuse an unknown key, or add it to the known_hosts file when told to."""

    def __init__(self, known_hosts: Path, *, accept_new: bool) -> None:
        self._known_hosts, self._accept_new = known_hosts, accept_new

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        if not self._accept_new:
            raise UnknownHostKey(hostname, key)
        self._known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = self._known_hosts.read_bytes() if self._known_hosts.exists() else b""
        line = f"{hostname} {key.get_name()} {key.get_base64()}\n".encode()
        descriptor = os.open(self._known_hosts, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as stream:
            stream.write(line if not before or before.endswith(b"\n") else b"\n" + line)
        client.get_host_keys().add(hostname, key.get_name(), key)


def fingerprint(key: paramiko.PKey) -> str:
    """As ssh-keygen -l prints it."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name()} SHA256:{digest}"


class SSHTransport:
    """Transport over one SSH connection, plus one per rsync."""

    def __init__(self, text: str, target: Target, *, accept_new_host_key: bool) -> None:
        self.target = text
        self._target = target
        ssh_dir = Path("~/.ssh").expanduser()
        self._config_file, self._known_hosts = ssh_dir / "config", ssh_dir / "known_hosts"
        self._accept_new = accept_new_host_key
        self._connection: fabric.Connection | None = None
        self._lock = threading.Lock()
        logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else its tracebacks land on stderr

    # --- connecting -------------------------------------------------------------------------------------------------

    def _transport(self) -> paramiko.Transport:
        with self._lock:
            if self._connection is None or not self._connection.is_connected:
                self._connection = self._connect()
            transport = self._connection.transport
            assert transport is not None
            return transport

    def _connect(self) -> fabric.Connection:
        try:
            ssh_config = paramiko.SSHConfig()
            if self._config_file.is_file():
                ssh_config = paramiko.SSHConfig.from_path(str(self._config_file))
            connection = fabric.Connection(
                self._target.host,
                user=self._target.user,
                port=self._target.port,
                config=fabric.Config(ssh_config=ssh_config, overrides={"timeouts": {"connect": CONNECT_TIMEOUT_S}}),
            )
        except (SSHException, ValueError, KeyError) as error:
            raise TransportError(f"{self._config_file} cannot be read: {error}", fix="correct that file") from None
        hop: fabric.Connection | str | None = connection
        while isinstance(hop, fabric.Connection):  # the host itself, then each jump host
            timeout_s = hop.connect_timeout or CONNECT_TIMEOUT_S
            hop.connect_kwargs.update(banner_timeout=timeout_s, auth_timeout=timeout_s, channel_timeout=timeout_s)
            if self._known_hosts.is_file():
                hop.client.load_host_keys(str(self._known_hosts))
            hop.client.set_missing_host_key_policy(StrictPolicy(self._known_hosts, accept_new=self._accept_new))
            hop = hop.gateway
        try:
            connection.open()
        except Exception as error:  # every kind is told apart and given its fix; a bug of ours goes on as it is
            raise self._explain(connection, error) from None
        connection.transport.set_keepalive(KEEPALIVE_S)
        return connection

    def _explain(self, connection: fabric.Connection, error: Exception) -> Exception:
        """The error a user can act on, for whatever connecting raised."""
        return (
            self._explain_host_key(connection, error)
            or self._explain_login(connection, error)
            or self._explain_network(connection, error)
            or error
        )

    def _explain_host_key(self, connection: fabric.Connection, error: Exception) -> TransportError | None:
        if isinstance(error, UnknownHostKey):
            return TransportError(
                f"{self.target}: the host's key is not known here.",
                found=f"{error.name} shows {fingerprint(error.key)}",
                needed=f"that key in {self._known_hosts}",
                fix="compare the fingerprint with the host's, then run again with --accept-new-host-key",
            )
        if isinstance(error, BadHostKeyException):
            name = connection.host if connection.port == 22 else f"[{connection.host}]:{connection.port}"
            return TransportError(
                f"{self.target}: THE HOST'S KEY HAS CHANGED. Someone may be intercepting the connection.",
                found=f"{name} now shows {fingerprint(error.key)}",
                needed=f"{fingerprint(error.expected_key)}, as in {self._known_hosts}",
                fix=f"only if you know why it changed: ssh-keygen -R '{name}', then connect again",
            )
        return None

    def _explain_login(self, connection: fabric.Connection, error: Exception) -> TransportError | None:
        login = f"{connection.user}@{connection.host}"
        if isinstance(error, PasswordRequiredException):
            return TransportError(
                f"{self.target}: the private key for {login} has a passphrase, and no agent holds it.",
                fix="ssh-add the key first; deploy never asks for a password",
            )
        if not isinstance(error, AuthenticationException) and "No authentication methods" not in str(error):
            return None
        allowed = getattr(error, "allowed_types", None) or _methods_offered(connection)
        if allowed and "publickey" not in allowed:
            return TransportError(
                f"{self.target}: the host wants a password for {login}; deploy never asks for one.",
                found=f"the host accepts {', '.join(allowed)}",
                needed="login by key",
                fix=f"ssh-copy-id {login}, or allow public keys in the host's sshd_config",
            )
        return TransportError(
            f"{self.target}: the host accepts none of the keys tried for {login}.",
            found=str(error),
            fix=f"ssh-copy-id {login}, or name the right user, or set IdentityFile for it in {self._config_file}",
        )

    def _explain_network(self, connection: fabric.Connection, error: Exception) -> TransportError | None:
        where = f"{connection.host}:{connection.port}"
        if isinstance(error, socket.gaierror):
            return TransportError(
                f"{self.target}: the name {connection.host!r} does not resolve.",
                found=str(error),
                fix=f"check the spelling, or add a Host {connection.host} with its HostName to {self._config_file}",
                lost=True,
            )
        if isinstance(error, NoValidConnectionsError | ConnectionRefusedError):
            return TransportError(
                f"{self.target}: {where} refused the connection.",
                found="; ".join(str(e) for e in getattr(error, "errors", {}).values()) or str(error),
                fix="check the port, and that sshd runs there",
                lost=True,
            )
        # paramiko's words when its time is up before the banner, or before the key exchange
        if isinstance(error, TimeoutError) or "banner" in str(error) or "No existing session" in str(error):
            return TransportError(
                f"{self.target}: {where} did not answer as an SSH server within "
                f"{connection.connect_timeout or CONNECT_TIMEOUT_S} s.",
                fix="check host and port, firewall and VPN; ConnectTimeout in ~/.ssh/config waits longer",
                lost=True,
            )
        if isinstance(error, FileNotFoundError | PermissionError):
            return TransportError(f"{self.target}: {error}", fix=f"correct IdentityFile in {self._config_file}")
        if isinstance(error, OSError | SSHException | EOFError):
            return TransportError(
                f"{self.target}: cannot connect to {where}: {error or type(error).__name__}", lost=True
            )
        return None

    # --- commands ---------------------------------------------------------------------------------------------------

    def _channel(self, argv: Sequence[str], cwd: str | None) -> paramiko.Channel:
        for attempt in (1, 2):
            try:
                channel = self._transport().open_session(timeout=CONNECT_TIMEOUT_S)
                channel.exec_command(shlex.join(in_directory(argv, cwd)))
                return channel
            except (SSHException, OSError, EOFError) as error:
                self.close()  # a connection that died while idle: once more with a new one
                if attempt == 2:
                    raise TransportError(f"{self.target}: connection lost: {error}", lost=True) from None
        raise AssertionError("unreachable")

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", cwd: str | None = None, timeout_s: float) -> Completed:
        channel = self._channel(argv, cwd)
        output = _ChannelOutput(channel, stdin, close_stdin=True)
        deadline = time.monotonic() + timeout_s
        chunks = []
        try:
            while (data := output.next(deadline - time.monotonic())) != b"":
                if data is None:
                    raise TransportError(
                        f"{self.target}: {shlex.join(argv)[:200]}: no end after {timeout_s:.0f} s, given up", lost=True
                    )
                chunks.append(data)
            code, stderr = output.end(self.target)
            return Completed(code, b"".join(chunks), stderr)
        finally:
            channel.close()

    def stream(self, argv: Sequence[str], *, first_line: bytes, cwd: str | None = None) -> Stream:
        return SSHStream(self.target, self._channel(argv, cwd), first_line)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    # --- rsync ------------------------------------------------------------------------------------------------------

    def rsync_options(self) -> list[str]:
        if shutil.which("ssh") is None:
            raise DeployError("ssh is not installed on this machine.", fix="apt-get install openssh-client")
        options = ["-F", str(self._config_file) if self._config_file.is_file() else "/dev/null"]
        settings = (
            f"UserKnownHostsFile={self._known_hosts}",
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=yes",
            "BatchMode=yes",
            f"ServerAliveInterval={KEEPALIVE_S}",
            "ControlPath=none",
        )
        for setting in settings:
            options += ["-o", setting]
        # OpenSSH looks for keys in the account's home directory, not in $HOME as paramiko does: name them
        for file in DEFAULT_KEYS:
            if (self._known_hosts.parent / file).is_file():
                options += ["-o", f"IdentityFile={self._known_hosts.parent / file}"]
        if self._target.user:
            options += ["-l", self._target.user]
        if self._target.port:
            options += ["-p", str(self._target.port)]
        return ["-e", shlex.join(["ssh", *options])]

    def rsync_path(self, path: str) -> str:
        host = f"[{self._target.host}]" if ":" in self._target.host else self._target.host
        return f"{host}:{path}"


def _methods_offered(connection: fabric.Connection) -> list[str]:
    """What the host accepts for this user; [] when it does not say."""
    transport = connection.client.get_transport()
    if transport is None or not transport.is_active():
        return []
    try:
        transport.auth_none(connection.user)
    except paramiko.BadAuthenticationType as error:
        return list(error.allowed_types)
    except SSHException:
        pass
    return []


class _ChannelOutput:
    """stdout, stderr and stdin of a channel, each in a thread of its own.

    Both outputs share the channel's flow control: whoever reads one to its end before the other waits for ever once
    the other has filled the window (paramiko#1778), and so does whoever waits for the exit status first.
    """

    def __init__(self, channel: paramiko.Channel, stdin: bytes, *, close_stdin: bool) -> None:
        self._channel = channel
        self._stdout: queue.Queue[bytes] = queue.Queue(maxsize=64)  # bounded: a slow reader slows the host down
        self._stderr = b""
        self._threads = [
            threading.Thread(target=work, daemon=True, args=arguments)
            for work, arguments in (
                (self._read_stdout, ()),
                (self._read_stderr, ()),
                (self._write, (stdin, close_stdin)),
            )
        ]
        for thread in self._threads:
            thread.start()

    def _read_stdout(self) -> None:
        while data := _received(self._channel.recv):
            self._stdout.put(data)
        self._stdout.put(b"")

    def _read_stderr(self) -> None:
        while data := _received(self._channel.recv_stderr):
            self._stderr = (self._stderr + data)[-STDERR_BYTES_MAX:]

    def _write(self, stdin: bytes, close_stdin: bool) -> None:
        with contextlib.suppress(OSError):  # the command ended without reading all of it; its exit code says why
            self._channel.sendall(stdin)
            if close_stdin:
                self._channel.shutdown_write()

    def next(self, timeout_s: float) -> bytes | None:
        """The next bytes of stdout; b"" at its end, None when nothing came in time."""
        try:
            return self._stdout.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            return None

    def end(self, target: str) -> tuple[int, bytes]:
        self._threads[1].join(timeout=10)
        if not self._channel.status_event.wait(timeout=10) or self._channel.exit_status == -1:
            raise TransportError(f"{target}: connection lost", lost=True)
        return self._channel.exit_status, self._stderr


def _received(receive: Callable[[int], bytes]) -> bytes:
    try:
        return receive(1 << 18)
    except OSError:  # the connection is gone: the end of this output; the missing exit status tells
        return b""


class SSHStream:
    """Stream over a channel."""

    def __init__(self, target: str, channel: paramiko.Channel, first_line: bytes) -> None:
        self._target, self._channel = target, channel
        self._output = _ChannelOutput(channel, first_line, close_stdin=False)

    def lines(self, *, idle_timeout_s: float) -> Iterator[bytes]:
        buffer = b""
        while (data := self._output.next(idle_timeout_s)) != b"":
            if data is None:
                raise TransportError(f"{self._target}: no sign of life for {idle_timeout_s:.0f} s", lost=True)
            *lines, buffer = (buffer + data).split(b"\n")
            yield from (line + b"\n" for line in lines)

    def end(self) -> Completed:
        code, stderr = self._output.end(self._target)
        return Completed(code, b"", stderr)

    def close(self) -> None:
        self._channel.close()
