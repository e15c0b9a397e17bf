"""A key for rented machines, and how ssh is told of one: on this computer, and on a guard's. Standard library alone."""

import os
import subprocess
from pathlib import Path

from rollouts.run_dir.layout import home_dir


def key_file() -> Path:
    """Return where this computer's key for rented machines lies."""
    return home_dir().absolute() / "cloud" / "id_ed25519"


def public_key() -> str:
    """Return the public key that machines let in, made once. Raises OSError without ssh-keygen."""
    key = key_file()
    public = key.with_name(f"{key.name}.pub")
    if not (key.is_file() and public.is_file()):
        key.parent.mkdir(parents=True, exist_ok=True)
        made = key.with_name(f"{key.name}.{os.getpid()}")
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rollouts", "-f", str(made)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        made.with_name(f"{made.name}.pub").replace(public)
        made.replace(key)
    return " ".join(public.read_text().split()[:2])


def ssh_config(name: str, directory: Path, *, host: str, port: int, user: str, key: Path) -> str:
    """Return the ssh_config of a machine, whose host key is pinned in `directory`."""
    lines = [
        f"Host {name}",
        f"HostName {host}",
        f"Port {port}",
        f"User {user}",
        f'IdentityFile "{key}"',
        "IdentitiesOnly yes",
        "IdentityAgent none",
        f"HostKeyAlias {name}",
        f'UserKnownHostsFile "{directory / "known_hosts"}"',
        "GlobalKnownHostsFile /dev/null",
        "StrictHostKeyChecking yes",
        "ServerAliveInterval 15",
    ]
    return "\n  ".join(lines) + "\n"
