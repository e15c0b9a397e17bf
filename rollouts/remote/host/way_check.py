"""Check that rsync gets through to a host; commands do, once facts were gathered."""

from pathlib import Path

from rollouts.remote.errors import DeployError, Problem
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.ssh_words import shell_speaks
from rollouts.remote.host.transport import LOCAL_TARGET, Transport

CHECK_TIMEOUT_S = 60
NOISE_SHOWN_CHARS = 300


def way_problems(transport: Transport, noise: bytes) -> tuple[Problem, ...]:
    """Return why rsync would not get through. `noise` is what the host's shell printed before a command.

    One small file is really sent, as a dry run: the connection, the shell and both rsyncs are those of the work.
    """
    if noise:
        return shell_speaks(transport.target, shown(noise), len(noise)).problems
    if transport.target == LOCAL_TARGET:
        return ()
    arguments = ["--dry-run", str(Path(__file__)), transport.rsync_path("./")]
    try:
        done = run_rsync(transport, arguments, timeout_s=CHECK_TIMEOUT_S)
    except DeployError as error:
        return error.problems
    if done.returncode == 0:
        return ()
    return (
        Problem(
            f"{transport.target}: commands run there, but rsync does not get through.",
            found=done.err[-1000:] or f"rsync's exit code {done.returncode}, no message",
            needed="rsync --dry-run of one file to the host",
            fix="see what it says; deploy sends code and brings results by rsync",
        ),
    )


def shown(noise: bytes) -> str:
    """Return noise as one readable line: escapes and line ends written out."""
    text = noise.decode(errors="backslashreplace").strip("\r\n")
    readable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return readable[:NOISE_SHOWN_CHARS] + ("…" if len(readable) > NOISE_SHOWN_CHARS else "")
