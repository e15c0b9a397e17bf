"""The hosts of a job as a user names them: --remote, one each, or a file of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from rollouts.remote.errors import DeployError


@dataclass(frozen=True)
class NamedHost:
    """One host of a job."""

    target: str  # as for --remote
    address: str | None = None  # where the other hosts reach it; None: it is found


def named_hosts(remotes: Sequence[str], file: Path | None) -> tuple[NamedHost, ...]:
    """Return the hosts in order, the first of which leads; none for this machine. Raises DeployError.

    A line of the file is `[USER@]HOST[:PORT] [ADDRESS]`; what follows a # is left out.
    """
    if file is None:
        return tuple(NamedHost(target) for target in remotes)
    if remotes:
        raise DeployError("--hosts and --remote both name hosts.", fix="leave out one of the two")
    hosts: list[NamedHost] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) > 2 or (len(words) == 2 and not _is_address(words[1])):
            raise DeployError(
                f"{file}:{number}: {line.strip()!r} does not name a host.",
                needed="[USER@]HOST[:PORT] and, if it is not to be found, its address in the hosts' private network",
                fix="for example: ubuntu@203.0.113.7 10.0.0.4",
            )
        hosts += [NamedHost(*words)] if words else []
    if not hosts:
        raise DeployError(
            f"{file} names no hosts.", needed="a line for each: [USER@]HOST[:PORT] [ADDRESS]"
        )
    return tuple(hosts)


def host_words(remotes: Sequence[str], file: Path | None) -> list[str]:
    """Return the words of a command line that names the same hosts."""
    if file is not None:
        return ["--hosts", str(file)]
    return [word for remote in remotes for word in ("--remote", remote)]


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
