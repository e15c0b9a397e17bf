"""Ends what a test process started, where that is killed before it can do so itself: guards, sshds, tmux servers.

    python -m tests.end_with_tests          its stdin is the test process's, and ends with it

The first line of stdin names the directory of the test's files. What has a path below it in its environment or on its
command line was started for the test. A test process that ends as it should ends this one first.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PASSES = 50  # a process may start another one before it is found
PAUSE_S = 0.05
FREE_OF_MARKS = 3  # passes that find nothing


@contextlib.contextmanager
def ended_with_this_process(directory: Path) -> Iterator[None]:
    """Let nothing that has a path below `directory` outlive this process, however that ends."""
    command = [sys.executable, "-m", "tests.end_with_tests"]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(f"{directory}\n".encode())
        process.stdin.flush()
        try:
            yield
        finally:
            process.kill()


def marked(directory: str) -> Iterator[int]:
    """Yield the processes that have a path below the directory in their environment or on their command line."""
    mark = f"{directory}/".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark in (entry / "environ").read_bytes() or mark in (entry / "cmdline").read_bytes():
                yield int(entry.name)


def main() -> None:
    """Wait for the end of the test process, then kill all that is left of it."""
    directory = sys.stdin.readline().strip()
    sys.stdin.read()
    free = 0
    for _ in range(PASSES if directory else 0):
        found = [pid for pid in marked(directory) if pid != os.getpid()]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        free = 0 if found else free + 1
        if free == FREE_OF_MARKS:
            return
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
