"""The settings of an SSH connection, read by `ssh -G` alone and handed to both clients.

Only OpenSSH knows what Include, Match, tokens, canonical names and the system's files come to. Each machine on the way,
the host and every jump host, is asked for by itself, as ssh does. What the result holds is all that either client gets.
"""

import getpass
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.known_hosts import lookup_name
from rollouts.remote.host.ssh_home import config_for_home, home
from rollouts.remote.host.transport import Target, parse_target
from rollouts.run_dir import machine_dir

CONNECT_TIMEOUT_S = 20.0  # ConnectTimeout overrides it. Generous: a loaded host is slow, not gone
# where the configuration names no file that keeps anything
OWN_KNOWN_HOSTS = Path("~/.rollouts/known_hosts")
READ_TIMEOUT_S = 30  # Match exec and canonical names may ask the network
JUMPS_MAX = 8

# Taken over for rsync's ssh as they are. Nothing that a user sets for interactive sessions is among them.
PASSED_ON = (
    "addressfamily",
    "bindaddress",
    "bindinterface",
    "casignaturealgorithms",
    "checkhostip",
    "ciphers",
    "compression",
    "connectionattempts",
    "hostkeyalgorithms",
    "ipqos",
    "kexalgorithms",
    "macs",
    "pkcs11provider",
    "preferredauthentications",
    "proxyusefdpass",
    "pubkeyacceptedalgorithms",
    "pubkeyauthentication",
    "requiredrsasize",
    "revokedhostkeys",
    "securitykeyprovider",
    "tcpkeepalive",
)
# Taken over besides where the OpenSSH client is what logs in
OF_LOGINS = (
    "gssapiauthentication",
    "gssapidelegatecredentials",
    "hostbasedauthentication",
    "kbdinteractiveauthentication",
    "numberofpasswordprompts",
    "passwordauthentication",
)
# keyword, the values that change nothing, what commands do without it
NOT_FOLLOWED = (
    ("bindinterface", ("", "none"), "connections leave by the interface that the system chooses"),
    ("hostbasedauthentication", ("no", "false"), "login is by key alone"),
    ("knownhostscommand", ("", "none"), "known_hosts files alone are read"),
    (
        "nohostauthenticationforlocalhost",
        ("no", "false"),
        "the key of a host on this machine is checked like any other",
    ),
    ("pkcs11provider", ("", "none"), "keys on smart cards work through an agent"),
    ("proxyusefdpass", ("no", "false"), "the proxy's own input and output are used"),
    ("stricthostkeychecking", ("ask", "yes", "true"), "a new key needs --accept-new-host-key"),
    ("securitykeyprovider", ("", "internal", "none"), "security keys work through an agent"),
    ("verifyhostkeydns", ("no", "false"), "keys that DNS vouches for are new keys like any other"),
)


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One machine of the way, and how it is reached. `jump` hosts come before it."""

    name: str  # as the user or a ProxyJump wrote it
    host: str
    port: int
    user: str
    key_files: tuple[Path, ...]
    certificate_files: tuple[Path, ...]
    identities_only: bool
    agent: str | None  # the socket
    # names in known_hosts; the first counts, others where it is not found
    known_as: tuple[str, ...]
    known_hosts: tuple[Path, ...]  # the user's; a new key goes into the first
    global_known_hosts: tuple[Path, ...]
    revoked_keys: tuple[Path, ...]  # RevokedHostKeys: at most one
    proxy_command: str | None
    is_jump: bool
    connect_timeout_s: float
    values: dict[str, str]  # of PASSED_ON, with those of the algorithms, and of OF_LOGINS
    control_path: str | None  # where a ControlMaster of the user's listens, if there is one
    not_followed: tuple[str, ...]  # settings that commands go without, and what that means

    @property
    def login(self) -> str:
        return f"{self.user}@{self.host}"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def list_of(self, keyword: str) -> list[str]:
        return [word for word in self.values.get(keyword, "").split(",") if word]


def read_hops(target: Target) -> tuple[Hop, ...]:
    """Return every machine on the way to `target`, in the order of connecting; the last one is the host.

    Raises DeployError without ssh, TransportError where ssh cannot read its configuration.
    """
    if shutil.which("ssh") is None:
        raise DeployError(
            "ssh is not installed on this machine.", fix="apt-get install openssh-client"
        )
    hops: list[Hop] = []
    jumps: str | None = None  # of the hop asked for, where the line before decided it
    asked: Target | None = target
    while asked is not None:
        values = ask_ssh(asked, jumps)
        hops.append(_hop(asked.host, values, is_jump=bool(hops)))
        if len(hops) > JUMPS_MAX:
            raise TransportError(
                f"{target.host}: more than {JUMPS_MAX} jump hosts.",
                found=" <- ".join(hop.name for hop in hops),
                fix="ProxyJump in ~/.ssh/config leads in a circle: ProxyJump none for the outermost host",
            )
        via = next(iter(values.get("proxyjump", [])), "none")
        *earlier, last = via.split(",")
        asked = None if via == "none" else parse_target(last)
        jumps = ",".join(earlier) or None
    return tuple(reversed(hops))


def ask_ssh(target: Target, jumps: str | None) -> dict[str, list[str]]:
    """Return what `ssh -G` prints for a host: keyword -> its values, in order."""
    arguments = ["-J", jumps] if jumps else []
    arguments += ["-l", target.user] if target.user else []
    arguments += ["-p", str(target.port)] if target.port else []
    with tempfile.TemporaryDirectory(prefix="rollouts-ssh-") as directory:
        rented = machine_dir(target.host) / "ssh_config"
        own, names = (
            (["-F", str(rented)], {}) if rented.is_file() else config_for_home(Path(directory))
        )
        command = ["ssh", "-G", *own, *arguments, "--", target.host]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=READ_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TransportError(
                f"{target.host}: ssh did not read its configuration within {READ_TIMEOUT_S} s.",
                fix=f"try `ssh -G {target.host}`: a Match exec, or looking up a canonical name, does not end",
            ) from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()
        for made, original in names.items():
            words = words.replace(made, original)
        raise TransportError(
            f"{target.host}: ssh cannot read its configuration.",
            found=words or f"ssh -G {target.host}: exit code {done.returncode}",
            fix=f"correct that file; `ssh -G {target.host}` shows when it is",
        )
    values: dict[str, list[str]] = {}
    for line in done.stdout.decode(errors="surrogateescape").splitlines():
        keyword, _, value = line.partition(" ")
        values.setdefault(keyword.lower(), []).append(value.strip())
    return values


def _hop(name: str, values: dict[str, list[str]], *, is_jump: bool) -> Hop:
    first = {keyword: found[0] for keyword, found in values.items()}
    host, port = first["hostname"].lower(), int(first["port"])
    user = first.get("user") or getpass.getuser()
    alias = first.get("hostkeyalias", "none")
    fallback = (lookup_name(host, port), *((host,) if port != 22 else ()))
    proxy_command = first.get("proxycommand", "none")
    timeout = first.get("connecttimeout", "none")
    tokens = _tokens(name, host, port, user, first)
    return Hop(
        name=name,
        host=host,
        port=port,
        user=user,
        key_files=tuple(
            Path(expand(value, tokens))
            for value in values.get("identityfile", [])
            if value != "none"
        ),
        certificate_files=tuple(
            Path(expand(value, tokens)) for value in values.get("certificatefile", [])
        ),
        identities_only=first.get("identitiesonly") == "yes",
        agent=_agent(first.get("identityagent", "SSH_AUTH_SOCK"), tokens),
        known_as=fallback if alias == "none" else (alias.lower(),),
        known_hosts=_files(first.get("userknownhostsfile", ""), tokens)
        or (OWN_KNOWN_HOSTS.expanduser(),),
        global_known_hosts=_files(first.get("globalknownhostsfile", ""), tokens),
        revoked_keys=_files(first.get("revokedhostkeys", "none"), tokens),
        proxy_command=None
        if proxy_command == "none"
        else expand(proxy_command, tokens, tilde=False),
        is_jump=is_jump,
        connect_timeout_s=float(timeout)
        if timeout.isdigit() and int(timeout) > 0
        else CONNECT_TIMEOUT_S,
        values={
            keyword: first[keyword] for keyword in (*PASSED_ON, *OF_LOGINS) if keyword in first
        },
        control_path=None if first.get("controlpath", "none") == "none" else first["controlpath"],
        not_followed=tuple(
            f"{keyword} {first[keyword]}: not followed, {instead}"
            for keyword, harmless, instead in NOT_FOLLOWED
            if first.get(keyword, harmless[0]).lower() not in harmless
        ),
    )


def way_words(hops: Sequence[Hop]) -> str:
    """Say the way to the host, the last of `hops`."""
    return " via ".join(f"{hop.login} port {hop.port}" for hop in reversed(hops))


def _tokens(name: str, host: str, port: int, user: str, first: dict[str, str]) -> dict[str, str]:
    node = os.uname().nodename
    alias = first.get("hostkeyalias", "none")
    return {
        "%": "%",
        "d": str(home()),
        "h": host,
        "i": str(os.getuid()),
        "k": name if alias == "none" else alias,
        "L": node.partition(".")[0],
        "l": node,
        "n": name,
        "p": str(port),
        "r": user,
        "u": getpass.getuser(),
    }


def expand(text: str, tokens: dict[str, str], *, tilde: bool = True) -> str:
    """Return `text` with ssh's %-tokens, ${VARIABLES} and a leading ~ filled in; unknown ones stay."""
    if tilde:
        text = re.sub(r"\$\{(\w+)\}", lambda match: os.environ.get(match[1], match[0]), text)
    text = re.sub(r"%(.)", lambda match: tokens.get(match[1], match[0]), text)
    if tilde and text.startswith("~/"):
        return str(home() / text[2:])
    return os.path.expanduser(text) if tilde and text.startswith("~") else text


def _agent(value: str, tokens: dict[str, str]) -> str | None:
    if value == "none":
        return None
    if value == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    if value.startswith("$") and not value.startswith("${"):
        return os.environ.get(value[1:]) or None
    return expand(value, tokens)


def _files(value: str, tokens: dict[str, str]) -> tuple[Path, ...]:
    """Return the files of a list that ssh prints with spaces between: a name with spaces is one where it exists."""
    words, files = value.split(" "), []
    while words:
        sizes = range(len(words), 0, -1)
        size = next((n for n in sizes if Path(expand(" ".join(words[:n]), tokens)).exists()), 1)
        name, words = expand(" ".join(words[:size]), tokens), words[size:]
        if name not in ("", "none", "/dev/null"):
            files.append(Path(name))
    return tuple(files)
