"""The keys that are known for one host, from known_hosts files as people and tools leave them.

Read as bytes, line by line: a line that cannot be understood, or is about other hosts, changes nothing. The names of a
line are matched as OpenSSH does: patterns, negation, [host]:port, hashes.
"""

import base64
import binascii
import contextlib
import fnmatch
import hashlib
import hmac
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

RSA_ALGORITHMS = ("rsa-sha2-512", "rsa-sha2-256")


@dataclass(frozen=True)
class KnownKey:
    """A key, and where it is written."""

    kind: str  # ssh-ed25519, ssh-rsa, ...
    blob: bytes
    where: str  # file:line

    def text(self) -> str:
        """Return the key as a line of such a file has it, after the names."""
        return f"{self.kind} {base64.b64encode(self.blob).decode()}"


@dataclass
class KnownKeys:
    """What the files say of one name."""

    keys: list[KnownKey] = field(default_factory=list)
    authorities: list[KnownKey] = field(default_factory=list)  # @cert-authority
    revoked: list[KnownKey] = field(default_factory=list)  # @revoked

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(key.kind for key in self.keys))

    def of_kind(self, kind: str) -> list[KnownKey]:
        return [key for key in self.keys if key.kind == kind]

    def lines(self, name: str) -> bytes:
        """Return these keys as a separate known_hosts file, under `name`."""
        groups = (
            ("", self.keys),
            ("@cert-authority ", self.authorities),
            ("@revoked ", self.revoked),
        )
        lines = [f"{marker}{name} {key.text()}\n" for marker, keys in groups for key in keys]
        return "".join(lines).encode()


def lookup_name(host: str, port: int) -> str:
    """Return the name under which OpenSSH looks a host up."""
    return host.lower() if port == 22 else f"[{host.lower()}]:{port}"


def read_known_keys(files: Iterable[Path], name: str) -> KnownKeys:
    """Return what `files` say of `name`. Raises OSError for a file that is there and cannot be read."""
    found = KnownKeys()
    groups = {b"": found.keys, b"@cert-authority": found.authorities, b"@revoked": found.revoked}
    for where, words in (line for file in files for line in _lines(file)):
        marker, rest = (words[0].lower(), words[1:]) if words[0].startswith(b"@") else (b"", words)
        if marker not in groups or len(rest) < 3 or not _matches(rest[0], name.lower()):
            continue
        try:
            blob = base64.b64decode(rest[2], validate=True)
        except (binascii.Error, ValueError):
            continue
        kind = key_kind(blob)
        if kind and kind.encode() == rest[1]:
            groups[marker].append(KnownKey(kind, blob, where))
    return found


def read_revoked(file: Path) -> list[KnownKey]:
    """Return the keys of a RevokedHostKeys file, one a line. Raises OSError: unread, ssh trusts no key.

    A KRL, which holds more than keys, has none here: `is_krl`.
    """
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        for word in line.split()[:2]:
            with contextlib.suppress(binascii.Error, ValueError):
                blob = base64.b64decode(word, validate=True)
                if kind := key_kind(blob):
                    found.append(KnownKey(kind, blob, f"{file}:{number}"))
    return found


def is_krl(file: Path) -> bool:
    """Tell whether a RevokedHostKeys file is one of ssh-keygen -k. Raises OSError."""
    return file.read_bytes()[:8] == b"SSHKRL\n\0"


def key_kind(blob: bytes) -> str:
    """Return the type that is written in a key's own bytes; "" where they are not a whole key."""
    fields, rest = [], blob
    while len(rest) >= 4:
        (size,) = struct.unpack(">I", rest[:4])
        fields.append(rest[4 : 4 + size])
        if len(fields[-1]) < size:
            return ""
        rest = rest[4 + size :]
    if rest or len(fields) < 2 or not re.fullmatch(rb"[a-z0-9@.-]{1,64}", fields[0]):
        return ""
    return fields[0].decode()


def algorithms(kinds: Iterable[str]) -> list[str]:
    """Return the signature algorithms with which a host proves that it has keys of these types."""
    return [name for kind in kinds for name in (RSA_ALGORITHMS if kind == "ssh-rsa" else (kind,))]


def _lines(file: Path) -> Iterator[tuple[str, list[bytes]]]:
    """Yield "file:line" and the words of each line that has enough of them."""
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        words = line.split()
        if len(words) >= 3 and not words[0].startswith(b"#"):
            yield f"{file}:{number}", words


def _matches(patterns: bytes, name: str) -> bool:
    """Tell whether a line's first word names this host: a hash, or patterns with commas, `!` before what it is not."""
    if patterns.startswith(b"|1|"):
        return _matches_hash(patterns, name.encode())
    matched = False
    for pattern in patterns.lower().decode("latin-1").split(","):
        negated = pattern.startswith("!")
        if _pattern_matches(pattern.removeprefix("!"), name):
            if negated:
                return False
            matched = True
    return matched


def _pattern_matches(pattern: str, name: str) -> bool:
    # only * and ? are special in known_hosts: [ is literal
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def _matches_hash(word: bytes, name: bytes) -> bool:
    parts = word.split(b"|")
    if len(parts) != 4:
        return False
    try:
        salt, expected = (
            base64.b64decode(parts[2], validate=True),
            base64.b64decode(parts[3], validate=True),
        )
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hmac.new(salt, name, hashlib.sha1).digest(), expected)
