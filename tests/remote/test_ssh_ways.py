"""Ways in that people's sites give them: chains of jump hosts, certificate authorities, agents, security keys.

All over real sshds. The security key alone is a stand-in: see stand_in_security_key.py.
"""

import getpass
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rollouts.remote.errors import TransportError
from rollouts.remote.host.open import open_transport
from rollouts.remote.host.rsync import run_rsync
from tests.remote import stand_in_security_key
from tests.remote.hosts import WAIT_S, Host, Laptop, keygen, public
from tests.remote.test_openssh import (
    Guarded,
    answering,
    connections_ended,
    guarded,
    needs_pam,
    runtime,
)
from tests.remote.test_ssh_config import agent, here, reach

__all__ = ["guarded", "here", "runtime"]
MakeHost = Callable[..., Host]


@pytest.fixture
def answers(
    runtime: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """This process answers ssh's questions."""
    for name, value in answering(tmp_path).items():
        monkeypatch.setenv(name, value)
    return runtime


def log_in(name: str, tmp_path: Path, *, accept_new: bool = False) -> str:
    """Run a command and send a file; how the client that got in describes itself."""
    transport = open_transport(name, accept_new_host_key=accept_new)
    try:
        assert transport.run(["echo", "in"], timeout_s=WAIT_S).out == "in\n"
        sent = tmp_path / "sent"
        done = run_rsync(transport, [__file__, transport.rsync_path(str(sent))], timeout_s=WAIT_S)
        assert done.returncode == 0 and sent.read_bytes() == Path(__file__).read_bytes(), done.err
        return transport.described()
    finally:
        transport.close()


def way(*hosts: Host) -> str:
    """A configuration where "far" is the last of `hosts`, and the others lead to it."""
    *jumps, last = hosts
    return (
        f"Host far\n  HostName 127.0.0.1\n  Port {last.port}\n"
        f"  ProxyJump {','.join(jump.target for jump in jumps) or 'none'}\n"
    )


def new_key(host: Host) -> None:
    """Give a host another key; every connection to it ends."""
    host.stop()
    for file in (host.host_key, Path(f"{host.host_key}.pub")):
        file.unlink()
    keygen(host.host_key)
    host.start()


@needs_pam
def test_new_keys_behind_a_jump_host_that_asks(
    guarded: Guarded, make_host: MakeHost, here: Laptop, answers: dict[str, str], tmp_path: Path
) -> None:
    """Goal: where ssh logs in since the first jump host asks, --accept-new-host-key counts for the hosts behind it as
    well: once, kept in the user's file, and a key that changes later never passes, not even in the same process.

    Red with ProxyJump given to the login: the jump host's words were lost, and no reason was said.
    """
    second, far = make_host(known=False), make_host(known=False)
    here.ssh_config(way(guarded.host, second, far))
    before = here.known_hosts.read_text()
    with pytest.raises(TransportError, match="does not accept the host's key") as caught:
        log_in("far", tmp_path)
    assert "--accept-new-host-key" in caught.value.text()
    assert here.known_hosts.read_text() == before
    transport = open_transport("far", accept_new_host_key=True)
    assert transport.run(["echo", "in"], timeout_s=WAIT_S).out == "in\n"
    lines = [f"[127.0.0.1]:{host.port} {public(host.host_key)}\n" for host in (second, far)]
    kept = before + "".join(lines)
    assert here.known_hosts.read_text() == kept
    guarded.host.stop()  # the connection ends
    connections_ended()
    guarded.host.start()
    assert "the ssh command logs in" in log_in("far", tmp_path)
    guarded.host.stop()
    connections_ended()
    guarded.host.start()
    new_key(far)
    with pytest.raises(TransportError, match="THE HOST'S KEY HAS CHANGED"):
        transport.run(["true"], timeout_s=WAIT_S)
    with pytest.raises(TransportError, match="THE HOST'S KEY HAS CHANGED") as caught:
        log_in("far", tmp_path, accept_new=True)
    assert here.known_hosts.read_text() == kept
    assert f"{here.known_hosts}:{len(kept.splitlines())}" in caught.value.text()
    fix = caught.value.problems[0].fix.partition(": ")[2].rpartition(", then")[0]
    subprocess.run(["sh", "-c", fix], check=True, capture_output=True)
    assert "the ssh command logs in" in log_in("far", tmp_path, accept_new=True)


class Authority:
    """It vouches for hosts and for users."""

    def __init__(self, file: Path) -> None:
        self.key = keygen(file)

    def sign(self, key: Path, principal: str, *options: str) -> Path:
        command = ["ssh-keygen", "-q", "-s", str(self.key), "-I", "x", *options, "-n", principal]
        subprocess.run([*command, f"{key}.pub"], check=True, capture_output=True)
        return Path(f"{key}-cert.pub")

    def vouch(self, host: Host, principal: str = "127.0.0.1") -> None:
        """The host shows a certificate, and lets in whoever has one, and nobody by key."""
        certificate = self.sign(host.host_key, principal, "-h")
        (host.directory / "authorized_keys").write_text("")
        own = (f"HostCertificate {certificate}", f"TrustedUserCAKeys {self.key}.pub")
        host.stop()
        host.settings = (*(s for s in host.settings if s.split()[0] not in str(own)), *own)
        host.start()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@needs_pam
@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("asks", [False, True], ids=["paramiko", "ssh"])
def test_an_authority_on_both_sides(
    asks: bool, authority: Authority, here: Laptop, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Goal: a site that knows no single key: hosts and users show certificates, on a jump host and behind it, for
    commands and for rsync, whichever client logs in. A host whose certificate is for another name never passes, not
    even as a new one.

    Red with paramiko's check of the certificate left out (its command ran), and with ssh told to accept every new key.
    """
    make_host: MakeHost = request.getfixturevalue("make_host")
    jump, far = request.getfixturevalue("guarded").host if asks else make_host(), make_host()
    for host in (jump, far):
        authority.vouch(host)
    authority.sign(here.key, getpass.getuser())
    here.known_hosts.write_text(
        f"@cert-authority 127.0.0.1,[127.0.0.1]:* {public(authority.key)}\n"
    )
    here.ssh_config(way(jump, far))
    said = log_in("far", tmp_path)
    client, refused = (
        ("the ssh command", "does not accept the host's key")
        if asks
        else ("paramiko", "certificate does not count")
    )
    assert f"{client} logs in" in said
    authority.vouch(far, "elsewhere.example.com")
    jump.stop()
    connections_ended()
    jump.start()
    with pytest.raises(TransportError, match=refused):
        log_in("far", tmp_path, accept_new=True)


def test_a_certificate_that_only_the_agent_has(
    authority: Authority, make_host: MakeHost, here: Laptop, tmp_path: Path
) -> None:
    """Goal: tools that hand out certificates for a day leave them in an agent (IdentityAgent), with no file at all. Red
    with the agent's certificates passed over."""
    host = make_host()
    authority.vouch(host)
    here.known_hosts.write_text(f"@cert-authority * {public(authority.key)}\n")
    authority.sign(here.key, getpass.getuser())
    socket = tmp_path / "a.sock"
    with agent(socket):
        plain = tmp_path / "plain.pub"  # without a certificate beside it
        plain.write_text(public(here.key))
        for words in ([str(here.key)], ["-d", str(plain)]):
            env = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
            subprocess.run(["ssh-add", "-q", *words], env=env, check=True, capture_output=True)
        for file in here.key.parent.glob("id_*"):
            file.unlink()
        here.ssh_config(f"{way(host)}  IdentityAgent {socket}\n")
        assert "paramiko logs in" in log_in("far", tmp_path)


def test_match_user(here: Laptop, make_host: MakeHost, tmp_path: Path) -> None:
    """Goal: Match user is about the user of --remote USER@HOST, as with ssh. Red with ssh -G not told the user."""
    name, host = getpass.getuser(), make_host()
    here.ssh_config(
        "Host gpu-7\n  HostName 127.0.0.1\n  User nobody-here\n"
        f"Match originalhost gpu-7 user {name}\n  Port {host.port}\n"
        "Match originalhost gpu-7 user nobody-here\n  Port 1\n"
    )
    assert "127.0.0.1" in reach(f"{name}@gpu-7", tmp_path)
    with pytest.raises(TransportError, match=r"nobody is listening|refused"):
        reach("gpu-7", tmp_path)


def test_a_security_key(
    here: Laptop,
    make_host: MakeHost,
    runtime: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Goal: a key that needs a touch is left to the ssh command, sshd takes its signature, and the client and why are
    said. Red with such a key no reason for the ssh command: the login was refused."""
    host = make_host()
    here.ssh_config(way(host))
    line = stand_in_security_key.write_key(here.home / ".ssh/id_ed25519_sk")
    (host.directory / "authorized_keys").write_text(line)
    helper = tmp_path / "helper"
    helper.write_text(f"#!/bin/sh\nexec {sys.executable} {stand_in_security_key.__file__}\n")
    helper.chmod(0o755)
    monkeypatch.setenv("SSH_SK_HELPER", str(helper))
    said = log_in("far", tmp_path)
    assert "the ssh command logs in, since" in said and "takes a security key" in said
