"""Turn the OpenSSH client's last words (exit code 255) into an error with its fix. Pure."""

import re

from rollouts.remote.errors import TransportError
from rollouts.remote.host.framing import NOISE_BYTES_MAX

# its words, what they mean, the fix. None of these gets better by trying again.
CAUSES = (
    (
        r"Host key verification failed|REMOTE HOST IDENTIFICATION|host key is known for",
        "rsync's ssh does not accept the host's key",
        "check the host with `deploy --remote`: it names the key and where it is kept",
    ),
    (
        r"Too many authentication failures",
        "the host accepted none of the first keys that rsync's ssh tried",
        "IdentitiesOnly yes with IdentityFile in ~/.ssh/config",
    ),
    (
        r"Permission denied \(",
        "the host accepts none of the keys that rsync's ssh tried",
        "check the host with `deploy --remote`; `ssh -v` shows which keys are tried",
    ),
    (
        r"Bad configuration option|terminating, \d+ bad configuration|Bad owner or permissions",
        "ssh cannot use its configuration",
        "correct the file that it names",
    ),
    (
        r"no matching .* found",
        "the host and this machine's ssh have no algorithm in common",
        "see Ciphers, MACs, KexAlgorithms and HostKeyAlgorithms in ~/.ssh/config",
    ),
    (
        r"administratively prohibited|stdio forwarding failed",
        "a jump host does not lead on to the host",
        "check that it allows forwarding (AllowTcpForwarding), and the address as the jump host sees it",
    ),
    (
        r"Cannot execute command-line and remote command|forwarding failed|cannot listen to port",
        "a setting for interactive sessions acts on rsync's ssh",
        "take RemoteCommand and forwardings out of the system's ssh_config",
    ),
)

# of a host that only ssh reaches: nobody else can show its key
NEW_KEY = (
    "log in once with plain `ssh`, which shows the fingerprint, and compare it with the host's;"
    " or run again with --accept-new-host-key"
)


def explain_words(target: str, words: str, *, client: str = "rsync") -> TransportError:
    """Return the error for rsync's ssh: by its own words where they are known, else as a lost connection.

    `client` "ssh": what failed was the login of the connection that all commands share.
    """
    found, what = (
        words[-500:],
        f"rsync with {target} was cut off" if client == "rsync" else f"{target}: ssh cannot log in",
    )
    for pattern, meaning, fix in CAUSES:
        if re.search(pattern, words):
            meant = meaning if client == "rsync" else meaning.replace("rsync's ssh", "ssh")
            is_new = client == "ssh" and "host key is known for" in words
            return TransportError(f"{what}: {meant}.", found=found, fix=NEW_KEY if is_new else fix)
    return TransportError(f"{what}.", lost=True, found=found)


def shell_speaks(target: str, noise: str, count: int | None = None) -> TransportError:
    """Return the error for a login shell that prints before every command, which rsync cannot take."""
    size = "something" if count is None else f"{count} byte{'s' if count != 1 else ''}"
    size += " or more" if count == NOISE_BYTES_MAX else ""
    return TransportError(
        f"{target}: its shell prints {size} before every command, and rsync cannot work with that.",
        found=noise,
        needed="no output of `ssh HOST true`",
        fix="on the host, print in interactive shells alone: in ~/.bashrc behind [[ $- == *i* ]], in ~/.cshrc behind"
        " `if ($?prompt)`, in config.fish behind `if status is-interactive`; nothing in ~/.ssh/rc",
    )
