#!/usr/bin/env python3
"""Answer for a security key, in place of ssh-sk-helper: what ssh and sshd do with it is their own.

The key handle is the seed of the private key, so that the program keeps nothing. `write_key` writes such a key.
"""

import base64
import hashlib
import os
import struct
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KIND = b"sk-ssh-ed25519@openssh.com"
APPLICATION = b"ssh:"
TOUCHED = b"\x01"
SIGN = 1


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def first_string(data: bytes) -> tuple[bytes, bytes]:
    (size,) = struct.unpack(">I", data[:4])
    return data[4 : 4 + size], data[4 + size :]


def write_key(file: Path) -> str:
    """Write a key as ssh-keygen -t ed25519-sk does; return its public line."""
    seed = os.urandom(32)
    own = string(Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw())
    public = string(KIND) + own + string(APPLICATION)
    private = b"same" * 2 + public + TOUCHED + string(seed) + string(b"") + string(b"a comment")
    private += bytes(range(1, 1 + -len(private) % 8))
    none = string(b"none")
    whole = b"openssh-key-v1\0" + none * 2 + string(b"") + struct.pack(">I", 1)
    text = base64.encodebytes(whole + string(public) + string(private)).decode()
    file.write_text(
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{text}-----END OPENSSH PRIVATE KEY-----\n"
    )
    file.chmod(0o600)
    line = f"{KIND.decode()} {base64.b64encode(public).decode()}\n"
    Path(f"{file}.pub").write_text(line)
    return line


def answer(request: bytes) -> bytes:
    """Sign what is asked for. A request: type, two settings of its log, the private key, a provider, the data."""
    key, rest = first_string(request[9:])
    _, rest = first_string(rest)
    data, _ = first_string(rest)
    for _ in range(3):
        _, key = first_string(key)
    seed, _ = first_string(key[1:])
    counter = struct.pack(">I", 1)
    signed = (
        hashlib.sha256(APPLICATION).digest() + TOUCHED + counter + hashlib.sha256(data).digest()
    )
    signature = Ed25519PrivateKey.from_private_bytes(seed).sign(signed)
    return struct.pack(">I", SIGN) + string(string(KIND) + string(signature) + TOUCHED + counter)


def main() -> None:
    (size,) = struct.unpack(">I", sys.stdin.buffer.read(4))
    message = sys.stdin.buffer.read(size)
    sys.stdout.buffer.write(string(message[:1] + answer(message[1:])))


if __name__ == "__main__":
    main()
