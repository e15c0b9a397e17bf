"""What rsync's ssh is given: a configuration with the settings that `ssh -G` gave, and nothing else.

Commands, forwardings, terminals and shared connections of interactive sessions are not in it, so none of them acts.
The OpenSSH client gets the same where it is the one to log in (openssh.py).
"""

import shlex
from pathlib import Path

from rollouts.remote.host.known_hosts import KnownKeys, read_known_keys
from rollouts.remote.host.ssh_config import OF_LOGINS, PASSED_ON, Hop
from rollouts.remote.host.ssh_host_key import add_lines, known_hosts_lines, read_trust

HOST_ALIAS = "rollouts-host"
KNOWN_HOSTS = "known_hosts"
LOGIN = "login"
JUMP_WORDS = "jumps"  # what the ssh of each jump host said


def write_settings(
    directory: Path,
    hops: tuple[Hop, ...],
    *,
    keepalive_s: int,
    login: bool = False,
    asks: bool = False,
    accept_new: bool = False,
) -> Path:
    """Write the configuration and the known keys of all `hops`; return its path. Raises OSError.

    `login`: for the one connection that all commands share, with every way to log in; `asks`: it may ask its user;
    `accept_new`: it lets hosts pass of which nothing is known, and adds their keys to the copy (see keep_new_keys).
    """
    known_hosts = directory / KNOWN_HOSTS
    _replace(known_hosts, b"".join(map(known_hosts_lines, hops)))
    blocks = []
    for index, hop in enumerate(hops):
        rows = settings(
            hop, known_hosts, keepalive_s=keepalive_s, batch=not asks, accept_new=accept_new
        )
        # else it tells of each key file that is not there
        rows += [("LogLevel", "ERROR")] if login else []
        rows += [(name, hop.values[name]) for name in OF_LOGINS if login and name in hop.values]
        if hop.proxy_command is not None:
            rows.append(("ProxyCommand", hop.proxy_command.replace("%", "%%")))
        elif index > 0 and login:
            rows.append(("ProxyCommand", _jump(directory, _alias(hops, index - 1))))
        elif index > 0:
            rows.append(("ProxyJump", _alias(hops, index - 1)))
        blocks.append(
            "\n  ".join(
                [f"Host {_alias(hops, index)}", *(f"{name} {value}" for name, value in rows)]
            )
        )
    config = directory / (LOGIN if login else "config")
    _replace(config, ("\n".join(blocks) + "\n").encode(errors="surrogateescape"))
    return config


def settings(
    hop: Hop, known_hosts: Path, *, keepalive_s: int, batch: bool = True, accept_new: bool = False
) -> list[tuple[str, str]]:
    """Return the settings for one hop, but for the way to it."""
    alias = [("HostKeyAlias", hop.known_as[0])] if hop.known_as[-1] != hop.host else []
    # in so many words: given a list, ssh does not put the types that are known first
    trust = read_trust(hop)
    key_types = trust.key_types(hop.list_of("hostkeyalgorithms"))
    return [
        ("HostName", _escaped(hop.host)),
        ("Port", str(hop.port)),
        ("User", _quoted(hop.user)),
        *(("IdentityFile", _quoted(_escaped(str(file)))) for file in hop.key_files),
        *(("CertificateFile", _quoted(_escaped(str(file)))) for file in hop.certificate_files),
        ("IdentitiesOnly", "yes" if hop.identities_only else "no"),
        ("IdentityAgent", _quoted(_escaped(hop.agent)) if hop.agent else "none"),
        *alias,
        ("UserKnownHostsFile", _quoted(_escaped(str(known_hosts)))),
        ("GlobalKnownHostsFile", "/dev/null"),
        ("StrictHostKeyChecking", "accept-new" if accept_new and trust.is_new else "yes"),
        ("UpdateHostKeys", "no"),
        ("BatchMode", "yes" if batch else "no"),
        ("ConnectTimeout", f"{hop.connect_timeout_s:.0f}"),
        ("ServerAliveInterval", str(keepalive_s)),
        *([("HostKeyAlgorithms", ",".join(key_types))] if key_types else []),
        *((name, hop.values[name]) for name in PASSED_ON if name in hop.values),
    ]


def keep_new_keys(directory: Path, hops: tuple[Hop, ...]) -> None:
    """Add the keys that a login with `accept_new` took to the user's files, where both clients look. Raises OSError."""
    for hop in hops:
        name = hop.known_as[0]
        if read_trust(hop).is_new:
            taken = read_known_keys([directory / KNOWN_HOSTS], name).keys
            add_lines(hop.known_hosts[0], KnownKeys(taken).lines(name))


def write_shared(directory: Path, socket: str) -> Path:
    """Write a configuration for commands over a connection that is open already; without it they fail at once."""
    config = directory / "shared"
    rows = (
        ("ControlPath", _quoted(_escaped(socket))),
        ("ControlMaster", "no"),
        ("BatchMode", "yes"),
        ("ProxyCommand", "exec false"),
    )
    _replace(
        config,
        "\n  ".join([f"Host {HOST_ALIAS}", *(f"{name} {value}" for name, value in rows)]).encode()
        + b"\n",
    )
    return config


def _jump(directory: Path, alias: str) -> str:
    """Return the ProxyCommand that ProxyJump stands for, but that keeps its words: ControlPersist would drop them."""
    words, config = (shlex.quote(_escaped(str(directory / n))) for n in (JUMP_WORDS, LOGIN))
    return f"ssh -E {words} -F {config} -W '[%h]:%p' {alias}"


def _alias(hops: tuple[Hop, ...], index: int) -> str:
    return HOST_ALIAS if index == len(hops) - 1 else f"rollouts-jump-{index + 1}"


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text


def _replace(file: Path, data: bytes) -> None:
    """Write a file whole: another rsync may be reading it now."""
    temporary = file.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.replace(file)
