"""Turn what connecting raised into an error that a user can act on: which machine failed, why, and the fix."""

import os
import pwd
import re
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

from paramiko.ssh_exception import ChannelException, IncompatiblePeer, SSHException

from rollouts.remote.errors import TransportError
from rollouts.remote.host.known_hosts import KnownKey
from rollouts.remote.host.ssh_auth import LoginFailed, LoginTimeout
from rollouts.remote.host.ssh_config import Hop
from rollouts.remote.host.ssh_host_key import (
    BadHostCertificate,
    ChangedHostKey,
    HostKeyError,
    OtherHostKey,
    RevokedHostKey,
    UnwritableKnownHosts,
    fingerprint,
    read_trust,
)

CONFIG = "~/.ssh/config"


class ProxyEnded(Exception):
    """The ProxyCommand ended before the host answered; the message is its exit code and its last words."""


class RefusedLogin(TransportError):
    """No key got in at `hop`; `failure` is what was learned. Another client may get in."""

    def __init__(self, hop: Hop, failure: LoginFailed, said: TransportError) -> None:
        problem = said.problems[0]
        super().__init__(
            problem.message,
            lost=said.lost,
            found=problem.found,
            needed=problem.needed,
            fix=problem.fix,
        )
        self.hop, self.failure = hop, failure


def explain(target: str, hop: Hop, error: Exception, *, waited_s: float) -> Exception:
    """Return the TransportError for `error`, which `hop` caused after `waited_s`; a bug of ours as it is."""
    who = f"{target}: jump host {hop.name}" if hop.is_jump else target
    return (
        (unwritable(who, error.reason) if isinstance(error, UnwritableKnownHosts) else None)
        or _host_key(who, hop, error)
        or (
            RefusedLogin(hop, error, _login(who, hop, error))
            if isinstance(error, LoginFailed)
            else None
        )
        or _login_timeout(who, hop, error)
        or _network(who, hop, error)
        or _protocol(who, hop, error, waited_s)
        or error
    )


def _host_key(who: str, hop: Hop, error: Exception) -> TransportError | None:
    if not isinstance(error, HostKeyError):
        return None
    name, files = hop.known_as[0], ", ".join(map(str, hop.known_hosts))
    shows = f"{name} shows {fingerprint(error.key)}"
    if isinstance(error, RevokedHostKey):
        return TransportError(
            f"{who}: the host's key was revoked.",
            found=f"{shows}\nrevoked by {error.where}",
            fix="do not connect",
        )
    if isinstance(error, BadHostCertificate):
        return TransportError(
            f"{who}: the host's certificate does not count.",
            found=f"{shows}\n{error.reason}",
            needed=f"a certificate for {hop.known_as[-1]} by a @cert-authority of {files}",
            fix="ask the host's administrator",
        )
    if isinstance(error, OtherHostKey):
        return TransportError(
            f"{who}: the host has no key of a type that is known here.",
            found=shows,
            needed=_as_known(error.expected),
            fix=f"compare the fingerprint with the host's, then: {_forget(name, error.expected)}, and connect with"
            " --accept-new-host-key",
        )
    if isinstance(error, ChangedHostKey):
        return _changed(who, name, fingerprint(error.key), error.expected)
    return TransportError(
        f"{who}: the host's key is not known here.",
        found=shows,
        needed=f"that key in {files}",
        fix="compare the fingerprint with the host's, then run again with --accept-new-host-key",
    )


def unwritable(who: str, reason: OSError) -> TransportError:
    """Return the error for a new key that passes, and cannot be kept."""
    return TransportError(
        f"{who}: the new key of a host cannot be kept: {reason}",
        fix="make that file writable, or name another: UserKnownHostsFile in ~/.ssh/config",
    )


def changed_by_ssh(
    target: str, hops: tuple[Hop, ...], copy: Path, words: str
) -> TransportError | None:
    """Return the error for a key that the ssh command found changed; None where its words do not say so.

    They name a line of the copy that it was given. What has to change is where that key comes from.
    """
    named, shown = (
        re.search(r"Offending \S+ key in .*:(\d+)", words),
        re.search(r"SHA256:[\w+/]+", words),
    )
    if named is None:
        return None
    line = copy.read_bytes().splitlines()[int(named[1]) - 1]
    for hop in hops:
        keys = [key for key in read_trust(hop).known.keys if key.text().encode() in line]
        if keys:
            who = f"{target}: jump host {hop.name}" if hop.is_jump else target
            return _changed(who, hop.known_as[0], shown[0] if shown else "another key", keys)
    return None


def _changed(who: str, name: str, shown: str, expected: Sequence[KnownKey]) -> TransportError:
    return TransportError(
        f"{who}: THE HOST'S KEY HAS CHANGED. Someone may be intercepting the connection.",
        found=f"{name} now shows {shown}",
        needed=_as_known(expected),
        fix=f"only if you know why it changed: {_forget(name, expected)}, then connect again",
    )


def _as_known(keys: Sequence[KnownKey]) -> str:
    return "\n".join(f"{fingerprint(key)}, as in {key.where}" for key in keys)


def _forget(name: str, keys: Sequence[KnownKey]) -> str:
    """Return the commands that take a name's keys out of every file that has one of these."""
    # ssh-keygen asks the system, not $HOME
    default = f"{pwd.getpwuid(os.getuid()).pw_dir}/.ssh/known_hosts"
    files = dict.fromkeys(key.where.rpartition(":")[0] for key in keys)
    options = ("" if file == default else f" -f {shlex.quote(file)}" for file in files)
    return " && ".join(f"ssh-keygen -R '{name}'{option}" for option in options)


def _login(who: str, hop: Hop, error: LoginFailed) -> TransportError:
    found = str(error)
    if error.second_factor:
        return TransportError(
            f"{who}: {hop.login} wants a second factor beside the key, and there is no terminal to ask on.",
            found=f"{found}\nthe key was accepted; the host still wants {', '.join(error.second_factor)}",
            needed="a terminal, where ssh asks for it once, or SSH_ASKPASS; or login by key alone",
            fix="run it in a terminal; or allow keys alone for this account: AuthenticationMethods in the host's"
            " sshd_config",
        )
    if error.hung_up:
        many = f"; the agent holds {error.from_agent} keys" if error.from_agent else ""
        return TransportError(
            f"{who}: {hop.address} closed the connection while logging in as {hop.user}.",
            found=f"{len(error.tried)} keys were tried{many}\n{found}",
            needed="a key that the host accepts among the first: most servers allow 6 tries",
            fix=f"for Host {hop.name} in {CONFIG}: IdentitiesOnly yes, with IdentityFile"
            if len(error.tried) > 1
            else "see the host's sshd log; run again if the host is busy",
            lost=len(error.tried) <= 1,
        )
    if error.allowed and "publickey" not in error.allowed:
        return TransportError(
            f"{who}: the host wants a password for {hop.login}; deploy never asks for one.",
            found=f"the host accepts {', '.join(error.allowed)}",
            needed="login by key",
            fix=f"{_copy_id(hop)}, or allow public keys in the host's sshd_config",
        )
    if error.locked:
        return TransportError(
            f"{who}: the private key for {hop.login} has a passphrase, and no agent holds it.",
            found=found,
            fix="ssh-add the key first; deploy never asks for a password",
        )
    return TransportError(
        f"{who}: the host accepts none of the keys tried for {hop.login}.",
        found=found,
        fix=f"{_copy_id(hop)}, or name the right user, or set IdentityFile for it in {CONFIG}",
    )


def _login_timeout(who: str, hop: Hop, error: Exception) -> TransportError | None:
    if not isinstance(error, LoginTimeout):
        return None
    return TransportError(
        f"{who}: {hop.address} stopped answering while logging in as {hop.user}.",
        found=str(error),
        fix="run again; if the agent asks for a confirmation, give it",
        lost=True,
    )


def _copy_id(hop: Hop) -> str:
    port = "" if hop.port == 22 else f"-p {hop.port} "
    return f"ssh-copy-id {port}{hop.login}"


def _network(who: str, hop: Hop, error: Exception) -> TransportError | None:
    if isinstance(error, socket.gaierror):
        alias = (
            f"add a Host {hop.name} with its HostName to"
            if hop.host == hop.name.lower()
            else "correct HostName in"
        )
        return TransportError(
            f"{who}: the name {hop.host!r} does not resolve.",
            found=str(error),
            fix=f"check the spelling, or {alias} {CONFIG}",
            lost=True,
        )
    if isinstance(error, ConnectionRefusedError):
        return TransportError(
            f"{who}: {hop.address} refused the connection.",
            found=str(error),
            fix="check the port, and that sshd runs there",
            lost=True,
        )
    if isinstance(error, ChannelException):
        return TransportError(
            f"{who}: the jump host before it cannot reach {hop.address}.",
            found=error.text or str(error),
            fix="check the address as the jump host sees it, and that the jump host allows forwarding"
            " (AllowTcpForwarding)",
            lost=error.code != 1,  # 1: forbidden
        )
    if isinstance(error, ProxyEnded):
        return TransportError(
            f"{who}: the ProxyCommand for {hop.address} ended before the host answered.",
            found=f"{hop.proxy_command}\n{error}",
            fix=f"try that command by itself, and correct it in {CONFIG}",
            lost=True,
        )
    return None


def _protocol(who: str, hop: Hop, error: Exception, waited_s: float) -> TransportError | None:
    text = str(error) or type(error).__name__
    if isinstance(error, TimeoutError) or (
        isinstance(error, SSHException) and waited_s >= hop.connect_timeout_s
    ):
        return TransportError(
            f"{who}: {hop.address} did not answer as an SSH server within {hop.connect_timeout_s:.0f} s.",
            fix=f"check host and port, firewall and VPN; ConnectTimeout in {CONFIG} waits longer",
            lost=True,
        )
    if isinstance(error, IncompatiblePeer):
        return TransportError(
            f"{who}: {hop.address} and the SSH client of deploy (paramiko) have no algorithm in common.",
            found=f"{text}; the ssh command may know more",
            fix=f"see Ciphers, MACs, KexAlgorithms and HostKeyAlgorithms in {CONFIG} and on the host",
        )
    if "Indecipherable protocol" in text:
        return TransportError(
            f"{who}: {hop.address} answers, but not as an SSH server.",
            found=text,
            fix="check the port",
        )
    if "banner" in text or isinstance(error, ConnectionResetError | EOFError):
        return TransportError(
            f"{who}: {hop.address} closed the connection before the login.",
            found=text,
            fix="run again if the host is busy (MaxStartups); else check the port, and whom the host lets in",
            lost=True,
        )
    if isinstance(error, OSError | SSHException):
        return TransportError(f"{who}: cannot connect to {hop.address}: {text}", lost=True)
    return None
