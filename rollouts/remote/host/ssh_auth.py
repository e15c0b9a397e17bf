"""Logging in by key, in OpenSSH's order, with paramiko: certificates, the agent's keys, key files.

Nothing asks for a password. A key that cannot be used is passed over, and the failure says why.
"""

import base64
import contextlib
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import paramiko
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    load_ssh_public_identity,
)
from paramiko.agent import AgentKey, AgentSSH
from paramiko.auth_strategy import AuthStrategy
from paramiko.ssh_exception import AuthenticationException, SSHException

from rollouts.remote.host.known_hosts import key_kind
from rollouts.remote.host.ssh_config import Hop

LOGIN_TIMEOUT_S = 60.0  # for each key: an agent may ask its user to confirm


class LoginTimeout(TimeoutError):
    """The host, or the agent, did not answer while a key was tried."""


@dataclass(eq=False)
class LoginFailed(Exception):
    """No key was accepted; the fields say what was learned."""

    # what the host accepts; [] when it did not say
    allowed: list[str] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    # keys that could not be tried, with the reason
    skipped: list[str] = field(default_factory=list)
    locked: bool = False  # one of them has a passphrase
    # what the host wants beside the accepted key
    second_factor: list[str] = field(default_factory=list)
    hung_up: bool = False  # it closed the connection
    from_agent: int = 0  # keys that the agent holds

    def __str__(self) -> str:
        return "; ".join([f"tried: {', '.join(self.tried) or 'no key'}", *self.skipped])


class Agent(AgentSSH):
    """An SSH agent at any socket: paramiko's agent class knows only $SSH_AUTH_SOCK."""

    def __init__(self, path: str) -> None:
        super().__init__()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(LOGIN_TIMEOUT_S)
        try:
            connection.connect(path)
            self._connect(connection)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._close()


@dataclass(frozen=True)
class Candidate:
    """A key to try. `load` raises what paramiko, cryptography and the file system raise."""

    label: str
    load: Callable[[], paramiko.PKey]


class KeyLogin(AuthStrategy):
    """Try every key that the settings allow."""

    def __init__(self, hop: Hop) -> None:
        super().__init__(ssh_config=paramiko.SSHConfig())
        self._hop, self._failure = hop, LoginFailed()

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Log in, or raise LoginFailed. Raises LoginTimeout when the host stops answering."""
        if self._offered(transport):
            return
        if self._failure.allowed and "publickey" not in self._failure.allowed:
            raise self._failure
        with contextlib.ExitStack() as stack:
            for candidate in self._candidates(stack):
                try:
                    key = candidate.load()
                except Exception as error:
                    # the readers of key files raise all kinds; the failure names each
                    self._skip(candidate.label, error)
                    continue
                self._failure.tried.append(candidate.label)
                if self._try(transport, key):
                    return
        raise self._failure

    def _offered(self, transport: paramiko.Transport) -> bool:
        """Ask what the host accepts; True when it lets everyone in."""
        try:
            transport.auth_none(self._hop.user)
        except paramiko.BadAuthenticationType as error:
            self._failure.allowed = list(error.allowed_types)
            return False
        except (SSHException, EOFError, OSError) as error:
            self._check_alive(transport, error)
            return False
        return True

    def _try(self, transport: paramiko.Transport, key: paramiko.PKey) -> bool:
        try:
            wanted = transport.auth_publickey(self._hop.user, key)
        except paramiko.BadAuthenticationType as error:
            self._failure.allowed = list(error.allowed_types)
            return False
        except (SSHException, EOFError, OSError) as error:
            self._check_alive(transport, error)
            return False
        if wanted:
            self._failure.second_factor = list(wanted)
            if "publickey" not in wanted:
                raise self._failure
        return not wanted

    def _check_alive(self, transport: paramiko.Transport, error: Exception) -> None:
        if isinstance(error, AuthenticationException) and "timeout" in str(error).lower():
            raise LoginTimeout(f"no answer within {LOGIN_TIMEOUT_S:.0f} s") from None
        if not transport.is_active():
            self._failure.hung_up = True
            raise self._failure from None

    def _skip(self, label: str, error: Exception) -> None:
        if isinstance(error, FileNotFoundError):
            return
        if isinstance(error, paramiko.PasswordRequiredException) or re.search(
            "encrypted|password", str(error), re.I
        ):
            self._failure.locked = True
            self._failure.skipped.append(f"{label} has a passphrase")
        else:
            self._failure.skipped.append(
                f"{label} was passed over: {error or type(error).__name__}"
            )

    def _agent_keys(self, stack: contextlib.ExitStack) -> list[AgentKey]:
        if self._hop.agent is None:
            return []
        try:
            agent = Agent(self._hop.agent)
        except (OSError, SSHException) as error:
            self._failure.skipped.append(f"the agent at {self._hop.agent} does not answer: {error}")
            return []
        stack.callback(agent.close)
        self._failure.from_agent = len(agent.get_keys())
        return list(agent.get_keys())

    def _candidates(self, stack: contextlib.ExitStack) -> Iterator[Candidate]:
        held = self._agent_keys(stack)
        named = {file: _public_blob(file) for file in self._hop.key_files}
        by_blob = {key.asbytes(): key for key in held}
        of_agent = [(file, by_blob[blob]) for file, blob in named.items() if blob in by_blob]
        yield from self._certificates(named, by_blob)
        for file, key in of_agent:
            yield Candidate(f"{file} (agent)", partial(_itself, key))
        if not self._hop.identities_only:
            chosen = [key for _, key in of_agent]
            for key in held:
                if key not in chosen:
                    yield Candidate(
                        f"{key.comment or key.get_name()} (agent)", partial(_itself, key)
                    )
        in_agent = {file for file, _ in of_agent}
        for file, blob in named.items():
            if file not in in_agent and (file.exists() or blob is not None):
                yield Candidate(str(file), partial(load_key, file))

    def _certificates(
        self, named: dict[Path, bytes | None], by_blob: dict[bytes, AgentKey]
    ) -> Iterator[Candidate]:
        beside = [Path(f"{file}-cert.pub") for file in named]
        for file in dict.fromkeys([*self._hop.certificate_files, *beside]):
            if file.is_file():
                yield Candidate(str(file), partial(certified_key, file, list(named), by_blob))


def _itself(key: AgentKey) -> paramiko.PKey:
    return key


def load_key(file: Path) -> paramiko.PKey:
    """Read a private key that only its owner can read, as ssh demands."""
    found = file.stat()
    if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
        raise ValueError(f"others may read it (chmod 600 '{file}')")
    if b"PRIVATE KEY" not in file.read_bytes():
        raise ValueError("it holds no private key, and no agent has that key")
    blob = _public_blob(file)
    if blob is not None and key_kind(blob).startswith("sk-"):
        raise ValueError("a security key works through an agent alone: ssh-add it")
    key = paramiko.PKey.from_path(file)
    key.public_blob = None  # a certificate beside it is tried by itself
    return key


def certified_key(
    certificate: Path, files: list[Path], by_blob: dict[bytes, AgentKey]
) -> paramiko.PKey:
    """Return the private key, of a file or the agent, that belongs to a certificate, with the certificate."""
    identity = load_ssh_public_identity(certificate.read_bytes())
    if not isinstance(identity, SSHCertificate):
        raise ValueError("it is not a certificate")
    public = identity.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    blob = base64.b64decode(public.split()[1])
    key: paramiko.PKey | None = by_blob.get(blob)
    if key is None:
        for file in files:
            if file.exists() and _public_blob(file) in (blob, None):
                loaded = load_key(file)
                if loaded.asbytes() == blob:
                    key = loaded
                    break
    if key is None:
        raise ValueError("its private key is in no IdentityFile, and no agent has it")
    key.load_certificate(str(certificate))
    return key


def _public_blob(file: Path) -> bytes | None:
    """Return the public key that lies beside a key file, or is that file; None where there is none."""
    for candidate in (Path(f"{file}.pub"), file):
        with contextlib.suppress(OSError, ValueError):
            words = candidate.read_bytes().split(None, 2)
            if (
                len(words) >= 2
                and (blob := base64.b64decode(words[1], validate=True))
                and key_kind(blob)
            ):
                return blob
    return None
