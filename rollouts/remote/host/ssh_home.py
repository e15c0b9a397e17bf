"""OpenSSH's configuration under another HOME.

ssh takes ~ from the account, whatever $HOME says; everything else here goes by $HOME. Where the two differ, ssh is
given a copy of $HOME/.ssh/config in which ~ and relative Includes are written out.
"""

import glob
import os
import pwd
import re
import shlex
from pathlib import Path

SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
_INCLUDE = re.compile(r"^\s*include(?:\s*=\s*|\s+)(.*)$", re.IGNORECASE)


def home() -> Path:
    return Path("~").expanduser()


def account_home() -> Path:
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # an account without an entry: ssh itself refuses it
        return home()


def config_for_home(directory: Path) -> tuple[list[str], dict[str, str]]:
    """Return the options that make ssh read this HOME's configuration, and what the files in `directory` replace."""
    if os.path.realpath(home()) == os.path.realpath(account_home()):
        return [], {}
    names: dict[str, str] = {}
    ours = home() / ".ssh"
    lines = []
    if (ours / "config").is_file():
        lines.append(f'Include "{_copy(ours / "config", directory, names)}"')
    lines.append("Match all")  # what a Host of that file began is over
    if SYSTEM_CONFIG.is_file():
        lines.append(f"Include {SYSTEM_CONFIG}")
    lines += ["Match all", f'UserKnownHostsFile "{ours}/known_hosts" "{ours}/known_hosts2"']
    whole = directory / "config"
    whole.write_text("\n".join(lines) + "\n")
    return ["-F", str(whole)], names


def _copy(file: Path, directory: Path, names: dict[str, str]) -> Path:
    """Write a copy of `file`, and of what it includes, for this HOME."""
    copy = directory / str(len(names))
    names[str(copy)] = str(file)
    lines = []
    for line in file.read_text(errors="surrogateescape").splitlines():
        include = _INCLUDE.match(line)
        # more: a file that includes itself, which ssh refuses itself
        if include is None or len(names) > 64:
            lines.append(re.sub(r'(?<=[\s="])~/', f"{home()}/", line))
            continue
        found = [
            Path(name)
            for word in shlex.split(include[1])
            for name in sorted(glob.glob(_absolute(word)))
        ]
        copies = [f'"{_copy(name, directory, names)}"' for name in found if name.is_file()]
        lines.append(f"Include {' '.join(copies)}" if copies else "")
    copy.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return copy


def _absolute(word: str) -> str:
    if word.startswith("~/"):
        return str(home() / word[2:])
    return os.path.join(home() / ".ssh", os.path.expanduser(word))
