"""Check a host's key against known_hosts files. Strict: a key passes only if one of these files has it.

A new key is added only when told to, once, before anything is sent; a changed, other or revoked key never passes.
"""

import base64
import fnmatch
import hashlib
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import paramiko
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
)

from rollouts.remote.host.known_hosts import (
    KnownKey,
    KnownKeys,
    algorithms,
    is_krl,
    read_known_keys,
    read_revoked,
)
from rollouts.remote.host.ssh_config import Hop

CERTIFICATE = "-cert-v01@openssh.com"


class HostKeyError(Exception):
    """The host's key is refused. `key` is what it showed."""

    def __init__(self, key: paramiko.PKey) -> None:
        super().__init__(fingerprint(key))
        self.key = key


class UnknownHostKey(HostKeyError):
    """No file knows this host."""


class ChangedHostKey(HostKeyError):
    """A key of this type is known, and it is another one."""

    def __init__(self, key: paramiko.PKey, expected: list[KnownKey]) -> None:
        super().__init__(key)
        self.expected = expected


class OtherHostKey(ChangedHostKey):
    """Keys of other types are known, and the host has none of them."""


class RevokedHostKey(HostKeyError):
    """A @revoked line or RevokedHostKeys names the key, or the authority that signed it."""

    def __init__(self, key: paramiko.PKey, where: str) -> None:
        super().__init__(key)
        self.where = where


class BadHostCertificate(HostKeyError):
    """A @cert-authority is known, and the host's certificate is not valid by it."""

    def __init__(self, key: paramiko.PKey, reason: str) -> None:
        super().__init__(key)
        self.reason = reason


class UnwritableKnownHosts(HostKeyError):
    """A new key passes, and cannot be written down."""

    def __init__(self, key: paramiko.PKey, reason: OSError) -> None:
        super().__init__(key)
        self.reason = reason


@dataclass(frozen=True)
class Trust:
    """What is known of one hop."""

    known: KnownKeys  # under its own name
    without_port: (
        KnownKeys  # under its name alone: such a key passes, and says nothing against another
    )
    authorities: list[KnownKey]
    revoked: list[KnownKey]
    revocation_lists: tuple[Path, ...] = ()  # KRLs: ssh-keygen knows what they say

    @property
    def is_new(self) -> bool:
        """Nothing is known that another key would contradict: it may be accepted, where the user says so."""
        return not self.known.keys and not self.authorities

    def key_types(self, possible: list[str]) -> list[str]:
        """Return those of the `possible` algorithms that are offered: of the known keys alone, where any is known."""
        if self.known.keys:
            return [name for name in algorithms(self.known.kinds) if name in possible]
        if self.authorities:
            return [name for name in possible if name.endswith(CERTIFICATE)]
        first = algorithms(self.without_port.kinds)
        return sorted(plain(possible), key=lambda name: name not in first)


def plain(names: list[str]) -> list[str]:
    """Return the algorithms without certificates."""
    return [name for name in names if not name.endswith(CERTIFICATE)]


def read_trust(hop: Hop) -> Trust:
    files = (*hop.known_hosts, *hop.global_known_hosts)
    known = read_known_keys(files, hop.known_as[0])
    without_port = read_known_keys(files, hop.known_as[1]) if len(hop.known_as) > 1 else KnownKeys()
    both = (known, without_port)
    return Trust(
        known,
        without_port,
        authorities=[key for found in both for key in found.authorities],
        revoked=[key for found in both for key in found.revoked]
        + [key for file in hop.revoked_keys for key in read_revoked(file)],
        revocation_lists=tuple(file for file in hop.revoked_keys if is_krl(file)),
    )


def known_hosts_lines(hop: Hop) -> bytes:
    """Return a known_hosts file with all that is known of a hop, as this module reads it."""
    files = (*hop.known_hosts, *hop.global_known_hosts)
    return b"".join(read_known_keys(files, name).lines(name) for name in hop.known_as)


class HostKeyPolicy(paramiko.MissingHostKeyPolicy):
    """Asked about every key: the client itself is given no known_hosts."""

    def __init__(self, hop: Hop, trust: Trust, *, accept_new: bool) -> None:
        self._hop, self._trust, self._accept_new = hop, trust, accept_new

    def missing_host_key(
        self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey
    ) -> None:
        trust, blob = self._trust, key.asbytes()
        for revoked in trust.revoked:
            if revoked.blob == blob:
                raise RevokedHostKey(key, revoked.where)
        for file in trust.revocation_lists:
            _check_revocation(file, key)
        if any(known.blob == blob for known in (*trust.known.keys, *trust.without_port.keys)):
            return
        if key.public_blob is not None and trust.authorities:
            self._check_certificate(key)
            return
        if same := trust.known.of_kind(key.get_name()):
            raise ChangedHostKey(key, same)
        if trust.known.keys:
            raise OtherHostKey(key, trust.known.keys)
        if trust.authorities:
            raise BadHostCertificate(key, "it shows a key without a certificate")
        if not self._accept_new:
            raise UnknownHostKey(key)
        try:
            add_key(self._hop.known_hosts[0], self._hop.known_as[0], key)
        except OSError as error:
            raise UnwritableKnownHosts(key, error) from None

    def _check_certificate(self, key: paramiko.PKey) -> None:
        assert key.public_blob is not None
        text = f"{key.public_blob.key_type} {base64.b64encode(key.public_blob.key_blob).decode()}"
        try:
            identity = load_ssh_public_identity(text.encode())
        except (ValueError, TypeError) as error:
            raise BadHostCertificate(key, str(error)) from None
        if not isinstance(identity, SSHCertificate):
            raise BadHostCertificate(key, "it shows no certificate")
        signer = base64.b64decode(
            identity.signature_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
        )
        for revoked in self._trust.revoked:
            if revoked.blob == signer:
                raise RevokedHostKey(key, revoked.where)
        reason = _certificate_problem(identity, self._hop.known_as[-1])
        if not reason and all(authority.blob != signer for authority in self._trust.authorities):
            reason = "another authority signed its certificate"
        if reason:
            raise BadHostCertificate(key, reason)


def _check_revocation(file: Path, key: paramiko.PKey) -> None:
    """Raise RevokedHostKey for a key, or a certificate, that a KRL names, or where ssh-keygen cannot tell."""
    shown = [(key.get_name(), key.asbytes())]
    if key.public_blob is not None:
        shown.append((key.public_blob.key_type, key.public_blob.key_blob))
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as asked:
        for kind, blob in shown:
            asked.seek(0)
            asked.truncate()
            asked.write(f"{kind} {base64.b64encode(blob).decode()}\n")
            asked.flush()
            command = ["ssh-keygen", "-Q", "-f", str(file), asked.name]
            if (
                subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, check=False
                ).returncode
                != 0
            ):
                raise RevokedHostKey(key, str(file))


def _certificate_problem(certificate: SSHCertificate, name: str) -> str:
    """Say why a host's certificate does not count for `name`; "" when it does."""
    principals = [principal.decode(errors="replace") for principal in certificate.valid_principals]
    now = time.time()
    try:
        certificate.verify_cert_signature()
    except InvalidSignature:
        return "the signature of its certificate is wrong"
    checks = (
        (
            certificate.type == SSHCertificateType.HOST,
            "its certificate is for users, not for hosts",
        ),
        (
            certificate.valid_after <= now < certificate.valid_before,
            "its certificate is not valid now",
        ),
        (not certificate.critical_options, "its certificate has options that are not known here"),
        (
            any(fnmatch.fnmatchcase(name, principal.lower()) for principal in principals),
            f"its certificate is for {', '.join(principals) or 'no name'}, not for {name}",
        ),
    )
    return next((reason for ok, reason in checks if not ok), "")


def add_key(file: Path, name: str, key: paramiko.PKey) -> None:
    """Append a key to a known_hosts file. Raises OSError."""
    add_lines(file, f"{name} {key.get_name()} {key.get_base64()}\n".encode())


def add_lines(file: Path, lines: bytes) -> None:
    """Append lines, if there are any, to a known_hosts file. Raises OSError."""
    if not lines:
        return
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = file.read_bytes() if file.exists() else b""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as stream:
        stream.write(lines if not before or before.endswith(b"\n") else b"\n" + lines)


def fingerprint(key: paramiko.PKey | KnownKey) -> str:
    """Return a key's fingerprint as ssh-keygen -l prints it."""
    kind, blob = (
        (key.kind, key.blob) if isinstance(key, KnownKey) else (key.get_name(), key.asbytes())
    )
    return f"{kind} SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"
