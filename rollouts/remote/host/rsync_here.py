"""rsync to this machine: whose fault a failure is, when the receiving side is here."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.transport import Completed, Transport

IDLE_TIMEOUT_S = 300  # in which no byte moves; a pull may take as long as it needs


def pull_rsync(
    transport: Transport,
    arguments: list[str],
    into: Path,
    *,
    stdin: bytes = b"",
    on_output: Callable[[str], None] | None = None,
    keep_open: tuple[int, ...] = (),
) -> Completed:
    """Run one rsync to this machine, which inherits the descriptors `keep_open`; `on_output` as in `run_rsync`.

    Raises OSError where this machine's own files are what failed.
    """
    try:
        done = run_rsync(
            transport,
            [f"--timeout={IDLE_TIMEOUT_S}", *arguments],
            stdin=stdin,
            timeout_s=None,
            on_output=on_output,
            keep_open=keep_open,
        )
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
    path = re.search(rf'"({re.escape(str(into))}[^"\n]*)"', said) or re.search(
        rf"({re.escape(str(into))}\S*)", said
    )
    if path is None:
        return None
    number = re.search(r"\((\d+)\)", said[path.end() :])
    code = int(number[1]) if number else errno.ENOSPC if "no space left" in said.lower() else None
    return None if code is None else OSError(code, os.strerror(code), path[1].rstrip(":"))
