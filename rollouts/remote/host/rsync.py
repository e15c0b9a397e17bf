"""One rsync to or from a host, and what its failures mean."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.bounded import Collected, run_here
from rollouts.remote.host.rsync_version import PROTECTS_ARGUMENTS, TELLS_PROGRESS, rsync_version
from rollouts.remote.host.ssh_words import explain_words, shell_speaks
from rollouts.remote.host.transport import Completed, Transport

# somebody's, or the kernel's: rsync itself has no fault
ENDED_BY = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP
PROGRESS_BYTES_MAX = 64 * 1024  # of a line of rsync's progress, the last ones are kept


def run_rsync(
    transport: Transport,
    arguments: Sequence[str],
    *,
    stdin: bytes = b"",
    timeout_s: float | None,
    on_output: Callable[[str], None] | None = None,
    keep_open: tuple[int, ...] = (),
) -> Completed:
    """Run one rsync to or from the host. Raises for a lost connection, a full disk, no rsync; returns the rest.

    `timeout_s` None: it may take as long as it needs; rsync's own --timeout ends an idle one. `on_output`
    gets each line of stdout as it comes, those that end in a carriage return too; where this machine's rsync tells its
    progress at all.
    """
    rsync = shutil.which("rsync")
    if rsync is None:
        raise DeployError(
            "rsync is not installed on this machine.",
            fix="apt-get install rsync, or brew install rsync",
        )
    version = rsync_version(rsync)
    progress = ["--info=progress2"] if on_output is not None and version >= TELLS_PROGRESS else []
    if version >= PROTECTS_ARGUMENTS:
        arguments = ["-s", *arguments]
    else:  # the host's shell reads the paths
        prefix = transport.rsync_path("")
        arguments = [_quoted_path(argument, prefix) for argument in arguments]
    argv = [rsync, *progress, *transport.rsync_options(), *arguments]
    try:
        result = _run_told(
            argv, transport, stdin, timeout_s, on_line=on_output, keep_open=keep_open
        )
    except subprocess.TimeoutExpired:
        raise TransportError(
            f"rsync with {transport.target}: no end after {timeout_s:.0f} s", lost=True
        ) from None
    if result.returncode == 0:
        return result
    if result.returncode == 1 and (
        unknown := re.search(r"[^\n]*(?:unknown|unrecognized|invalid) option[^\n]*", result.err)
    ):
        raise DeployError(
            f"this machine's rsync ({rsync}) is too old.",
            found=unknown[0][:300],
            needed="rsync 3.0 or newer",
            fix="brew install rsync, or apt-get install rsync",
        )
    if "No space left on device" in result.err:
        raise disk_full(transport.target, result.err)
    if (
        result.returncode == 127
        or "rsync: command not found" in result.err
        or "rsync: not found" in result.err
    ):
        raise DeployError(
            f"{transport.target} has no rsync.", fix="on the host: apt-get install rsync"
        )
    if result.returncode == 2 and "is your shell clean?" in result.err:
        raise shell_speaks(transport.target, result.err[-500:])
    if result.returncode == 255:
        raise explain_words(transport.target, result.err)
    # socket, protocol stream, a signal that rsync told of, time-outs; or killed here
    if result.returncode in (10, 12, 20, 30, 35) or -result.returncode in ENDED_BY:
        raise TransportError(
            f"rsync with {transport.target} was cut off.", lost=True, found=result.err[-500:]
        )
    return result


def _quoted_path(argument: str, prefix: str) -> str:
    """Return a path on the host quoted for its shell; anything else as it is."""
    if not prefix or not argument.startswith(prefix):
        return argument
    return prefix + shlex.quote(argument.removeprefix(prefix))


def _run_told(
    argv: Sequence[str],
    transport: Transport,
    stdin: bytes,
    timeout_s: float | None,
    *,
    on_line: Callable[[str], None] | None,
    keep_open: tuple[int, ...],
) -> Completed:
    """Run rsync with its output kept, or told line by line while it runs."""
    # Without the user's own rsync settings (RSYNC_ICONV, …); in English, since its words are read
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith("RSYNC_")
    } | {"LC_ALL": "C"}
    stdout, rest = Collected(transport.target), b""

    def tell(data: bytes) -> None:
        nonlocal rest
        assert on_line is not None
        *lines, rest = re.split(rb"[\r\n]", rest[-PROGRESS_BYTES_MAX:] + data)
        for line in lines:
            on_line(line.decode(errors="replace"))

    on_stdout = stdout.add if on_line is None else tell
    code, stderr = run_here(
        argv,
        on_stdout,
        stdin=stdin,
        timeout_s=timeout_s,
        environment=variables,
        keep_open=keep_open,
    )
    return Completed(code, stdout.all(), stderr)


def disk_full(target: str, detail: str) -> DeployError:
    where = re.search(r'"([^"]+)"', detail)
    return DeployError(
        f"{target}: its disk is full.",
        found=f"writing {where[1]}: no space left on device" if where else detail[-300:],
        fix="free some space there, or set ROLLOUTS_HOME on the host to a larger disk",
    )
