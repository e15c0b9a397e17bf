"""known_hosts as people leave it: what is about this host counts, and nothing else stops anything."""

import base64
import hashlib
import hmac
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.remote.errors import TransportError
from rollouts.remote.host.known_hosts import read_known_keys
from tests.remote.hosts import WAIT_S, Host, Laptop, keygen, public
from tests.remote.test_ssh_config import here, reach, transport_to

__all__ = ["here"]
MakeHost = Callable[..., Host]

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPBj5b8oEGX8lNKUkWpEF3rEkN8bYvhyNZmm2kcYkDp"
NAME = "[gpu-7.example.com]:2222"


def hashed(name: str) -> str:
    salt = b"0123456789abcdefghij"
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


@pytest.mark.parametrize(
    "line",
    [
        f"{NAME} {KEY}",
        f"other.example,{NAME} {KEY} a comment",
        f"{NAME.upper()} {KEY}",
        f"[gpu-*.example.com]:2222 {KEY}",
        f"[gpu-?.example.com]:*,!nothing {KEY}",
        f"* {KEY}",
        f"{hashed(NAME)} {KEY}",
        f"\t{NAME}\t{KEY}\t\r",
        f"\ufeff{NAME} {KEY}\r",
    ],
)
def test_lines_that_name_the_host(line: str, tmp_path: Path) -> None:
    """Goal: every way to write a host's name is understood. Red with the first word compared as it is."""
    file = tmp_path / "known_hosts"
    file.write_text(line + "\n", newline="")
    assert read_known_keys([tmp_path / "missing", file], NAME).kinds == ["ssh-ed25519"]


@pytest.mark.parametrize(
    "line",
    [
        f"gpu-7.example.com {KEY}",
        f"[gpu-8.example.com]:2222 {KEY}",
        f"*,!{NAME} {KEY}",
        f"{hashed('gpu-7.example.com')} {KEY}",
        f"|1|?|? {KEY}",
        f"|1|{'A' * 40} {KEY}",
        f"# {NAME} {KEY}",
        f"{NAME} {KEY[:-1]}",
        f"{NAME} {KEY[:40]}",
        f"{NAME} ssh-rsa {KEY.split()[1]}",
        f"{NAME} ssh-ed25519 !!!!",
        f"{NAME} 2048 65537 1234567890",
        f"@frobnicate {NAME} {KEY}",
        f"@cert-authority {NAME}",
        "x" * 3_000_000,
        f"{'h.example.com,' * 200_000}z {KEY}",
        "caf\xe9.example.com ssh-ed25519 AAAA",
        "\x00\x01\x02",
        "",
    ],
)
def test_lines_that_change_nothing(line: str, tmp_path: Path) -> None:
    """Goal: a line about others, or none at all, neither counts nor stops the next one. Red with paramiko's reader:
    InvalidHostKey, UnicodeDecodeError."""
    file = tmp_path / "known_hosts"
    file.write_bytes(line.encode("latin-1"))
    assert not read_known_keys([file], NAME).keys
    file.write_bytes(line.encode("latin-1") + b"\n" + f"{NAME} {KEY}".encode())
    assert len(read_known_keys([file], NAME).keys) == 1


def test_strange_lines_beside_a_good_one(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: both clients get in past lines that cannot be read. Red with paramiko's reader: a traceback."""
    host = make_host()
    strange = f"@cert-authority *.example.com {public(keygen(tmp_path / 'ca', 'ecdsa'))}\n".encode()
    strange += (
        b"old.example.com ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI\ncaf\xe9.example.com ssh-rsa AAAA\n"
    )
    here.known_hosts.write_bytes(strange + here.known_hosts.read_bytes().replace(b"\n", b"\r\n"))
    reach(host.target, tmp_path)


def test_a_host_with_one_more_type_of_key(
    here: Laptop, make_host: MakeHost, tmp_path: Path
) -> None:
    """Goal: a host that has a key which is known, and others that are not, is the host that is known.

    Red with paramiko's one preferred type: "THE HOST'S KEY HAS CHANGED".
    """
    host = make_host(host_key_kinds=("rsa", "ed25519"))
    gone = keygen(tmp_path / "gone", "ecdsa")
    name = f"[127.0.0.1]:{host.port}"
    here.known_hosts.write_text(
        f"{name} {public(gone)}\n{name} {public(host.directory / 'host_rsa')}\n"
    )
    reach(host.target, tmp_path)


def test_a_host_with_other_types_alone(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: no key of a known type is told apart from a changed key, and never accepted. Red with "changed" said."""
    host = make_host(host_key_kinds=("ed25519",))
    here.known_hosts.write_text(
        f"[127.0.0.1]:{host.port} {public(keygen(tmp_path / 'gone', 'ecdsa'))}\n"
    )
    for accept_new in (False, True):
        with pytest.raises(TransportError, match="no key of a type that is known here") as caught:
            reach(host.target, tmp_path, accept_new=accept_new)
    assert (
        "ssh-ed25519 SHA256:" in caught.value.text()
        and "ecdsa-sha2-nistp256 SHA256:" in caught.value.text()
    )
    assert len(here.known_hosts.read_text().splitlines()) == 1


def test_a_key_that_changed(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: another key of a known type is refused, with the file and line of the known one. Red with any key of the
    type let through."""
    host = make_host()
    here.known_hosts.write_text(
        f"#\n[127.0.0.1]:{host.port} {public(keygen(tmp_path / 'other'))}\n"
    )
    with pytest.raises(TransportError, match="THE HOST'S KEY HAS CHANGED") as caught:
        reach(host.target, tmp_path, accept_new=True)
    assert f"{here.known_hosts}:2" in caught.value.text()


def test_the_same_host_without_its_port(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: as ssh does, a key that is known for the name alone passes; another one says nothing of this port.

    Red with the name alone taken for the host's: "changed" for every container of a machine.
    """
    host = make_host()
    here.known_hosts.write_text(f"127.0.0.1 {public(host.host_key)}\n")
    reach(host.target, tmp_path)
    here.known_hosts.write_text(f"127.0.0.1 {public(keygen(tmp_path / 'other'))}\n")
    with pytest.raises(TransportError, match="not known here"):
        reach(host.target, tmp_path)


def test_a_revoked_key(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: @revoked refuses, though another line knows the key. Red with the line skipped."""
    host = make_host()
    with here.known_hosts.open("a") as known:
        known.write(f"@revoked * {public(host.host_key)}\n")
    with pytest.raises(TransportError, match="revoked") as caught:
        reach(host.target, tmp_path)
    assert f"{here.known_hosts}:2" in caught.value.text()


@pytest.mark.parametrize("form", ["a list of keys", "a KRL", "missing"])
def test_a_key_that_a_file_revokes(
    form: str, here: Laptop, make_host: MakeHost, tmp_path: Path
) -> None:
    """Goal: RevokedHostKeys, as an administrator hands it out, refuses before the first command, in both of its forms;
    one that names others changes nothing, and one that cannot be read lets nobody in, as with ssh. Red with the setting
    given to rsync's ssh alone: every command before the first rsync ran."""
    host = make_host()
    other, file = keygen(tmp_path / "other"), tmp_path / "revoked"
    here.ssh_config(
        f"Host gpu-7\n HostName 127.0.0.1\n Port {host.port}\n RevokedHostKeys {file}\n"
    )

    def write(key: Path) -> None:
        if form == "a KRL":
            subprocess.run(["ssh-keygen", "-q", "-k", "-f", str(file), f"{key}.pub"], check=True)
        elif form == "a list of keys":
            file.write_text(f"# gone\n\n{public(key)} a comment\n")

    if form != "missing":
        write(other)
        reach("gpu-7", tmp_path)
    write(host.host_key)
    with pytest.raises(TransportError, match="revoked"), transport_to("gpu-7") as transport:
        transport.run(["true"], timeout_s=WAIT_S)


def test_a_certificate_of_the_host(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: a host that a @cert-authority vouches for gets in, for both clients; for another name it does not, nor
    when the authority is revoked. Red with @cert-authority skipped (the host is unknown), with the principals not
    compared, and with @revoked compared with the host's key alone."""
    authority = keygen(tmp_path / "ca", "ecdsa")
    host = make_host(known=False)

    def certify(principal: str) -> None:
        command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "host", "-h", "-n", principal]
        subprocess.run([*command, f"{host.host_key}.pub"], check=True, capture_output=True)
        host.stop()
        host.settings = (f"HostCertificate {host.host_key}-cert.pub",)
        host.start()

    line = f"@cert-authority 127.0.0.* {public(authority)}\n"
    here.known_hosts.write_text(line)
    certify("127.0.0.1")
    reach(host.target, tmp_path)
    here.known_hosts.write_text(f"{line}@revoked * {public(authority)}\n")
    with pytest.raises(TransportError, match="revoked"):
        reach(host.target, tmp_path)
    here.known_hosts.write_text(line)
    certify("elsewhere.example.com")
    with pytest.raises(TransportError, match="certificate does not count") as caught:
        reach(host.target, tmp_path)
    assert "is for elsewhere.example.com, not for 127.0.0.1" in caught.value.text()


def test_a_file_that_cannot_be_read(here: Laptop, make_host: MakeHost) -> None:
    """Goal: a known_hosts that is a directory is one line, not a traceback. Red with the OSError let through."""
    host = make_host()
    here.known_hosts.unlink()
    here.known_hosts.mkdir()
    with pytest.raises(TransportError, match="known_hosts"), transport_to(host.target) as transport:
        transport.run(["true"], timeout_s=WAIT_S)


def test_a_file_that_cannot_be_written(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: a new key that cannot be kept is refused with the file and the fix, and not tried again. Red with the
    OSError taken for a lost connection."""
    host = make_host(known=False)
    (tmp_path / "file").write_text("")
    here.ssh_config(f"Host *\n  UserKnownHostsFile {tmp_path}/file/known_hosts\n")
    with pytest.raises(TransportError, match="new key of a host cannot be kept") as caught:
        reach(host.target, tmp_path, accept_new=True)
    assert f"{tmp_path}/file" in caught.value.text() and not caught.value.lost
