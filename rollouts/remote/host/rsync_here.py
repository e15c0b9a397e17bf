"""rsync to this machine: whose fault a failure is, when the receiving side is here."""

import errno
import os
import re
from pathlib import Path

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.transport import Completed, Transport

PULL_TIMEOUT_S = 6 * 3600


def pull_rsync(transport: Transport, arguments: list[str], into: Path) -> Completed:
    """Run one rsync to this machine. Raises OSError where this machine's own files are what failed."""
    try:
        done = run_rsync(transport, arguments, timeout_s=PULL_TIMEOUT_S)
    except TransportError:
        raise
    except DeployError as error:
        if own := _own_fault(error.problems[0].found, into):
            raise own from None
        raise
    if done.returncode != 0 and (own := _own_fault(done.err, into)):
        raise own
    return done


def _own_fault(said: str, into: Path) -> OSError | None:
    """Return the receiving side's error: it is this machine, so rsync names a local path and an error number."""
    path = re.search(rf'"({re.escape(str(into))}[^"\n]*)"', said) or re.search(rf"({re.escape(str(into))}\S*)", said)
    if path is None:
        return None
    number = re.search(r"\((\d+)\)", said[path.end() :])
    code = int(number[1]) if number else errno.ENOSPC if "no space left" in said.lower() else None
    return None if code is None else OSError(code, os.strerror(code), path[1].rstrip(":"))
