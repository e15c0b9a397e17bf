"""The version of this machine's rsync. macOS has one of 2006, or openrsync, which reports as old a version."""

import functools
import re
import subprocess

ASK_TIMEOUT_S = 20
PROTECTS_ARGUMENTS = (3, 0)  # -s: the host's shell does not see the paths
TELLS_PROGRESS = (3, 1)  # --info=progress2


@functools.cache
def rsync_version(rsync: str) -> tuple[int, int]:
    """Ask the program once, and return (major, minor). One that does not tell is taken for one of today."""
    try:
        done = subprocess.run(
            [rsync, "--version"],
            capture_output=True,
            timeout=ASK_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return TELLS_PROGRESS
    return parse_version(done.stdout.decode(errors="replace"))


def parse_version(text: str) -> tuple[int, int]:
    """Parse "rsync  version 3.2.7  protocol version 31", or openrsync's "rsync version 2.6.9 compatible"."""
    found = re.search(r"^rsync\s+version\s+v?(\d{1,4})\.(\d{1,4})", text, flags=re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else TELLS_PROGRESS
