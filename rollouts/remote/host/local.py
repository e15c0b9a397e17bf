"""This machine as the host."""

import contextlib
import os
import select
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence

from rollouts.remote.errors import TransportError
from rollouts.remote.host.bounded import STDERR_BYTES_MAX, Collected, bounded, run_here
from rollouts.remote.host.framing import LineSplitter
from rollouts.remote.host.transport import LOCAL_TARGET, Completed, Stream


def in_directory(argv: Sequence[str], cwd: str | None) -> list[str]:
    """Return `argv`, run in `cwd`, as one command."""
    if cwd is None:
        return list(argv)
    return ["sh", "-c", 'cd "$0" && exec "$@"', cwd, *argv]


class LocalTransport:
    """This machine as the host."""

    target = LOCAL_TARGET

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", cwd: str | None = None, timeout_s: float
    ) -> Completed:
        stdout = Collected(self.target)
        try:
            code, stderr = run_here(
                in_directory(argv, cwd), stdout.add, stdin=stdin, timeout_s=timeout_s
            )
        except FileNotFoundError as error:
            return Completed(127, b"", f"{error.filename}: not found".encode())
        except subprocess.TimeoutExpired:
            raise TransportError(
                f"{shlex.join(argv)[:200]}: no end after {timeout_s:.0f} s, given up"
            ) from None
        return Completed(code, stdout.all(), stderr)

    def stream(self, argv: Sequence[str], *, first_line: bytes, cwd: str | None = None) -> Stream:
        process = subprocess.Popen(
            in_directory(argv, cwd),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us: we close it
        )
        return LocalStream(process, first_line)

    def notes(self) -> tuple[str, ...]:
        return ()

    def described(self) -> str:
        return "this machine"

    def rsync_options(self) -> list[str]:
        return []

    def rsync_path(self, path: str) -> str:
        return path

    def shell_argv(self, line: str, *, terminal: bool) -> list[str]:
        return ["sh", "-c", line]

    def close(self) -> None:
        return None


class LocalStream:
    """Stream over a child's pipes."""

    def __init__(self, process: subprocess.Popen[bytes], first_line: bytes) -> None:
        assert process.stdin and process.stdout and process.stderr
        self._process = process
        self._stdout, self._stderr = process.stdout.fileno(), process.stderr.fileno()
        self._tail = b""
        # it ended at once: its exit code and stderr say why
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(first_line)
            process.stdin.flush()

    def lines(self, *, idle_timeout_s: float) -> Iterator[bytes]:
        lines, open_pipes = LineSplitter(), {self._stdout, self._stderr}
        while self._stdout in open_pipes:
            ready, _, _ = select.select(list(open_pipes), [], [], idle_timeout_s)
            if not ready:
                raise TransportError(f"no sign of life for {idle_timeout_s:.0f} s", lost=True)
            for pipe in ready:
                data = os.read(pipe, 1 << 18)
                if not data:
                    open_pipes.discard(pipe)
                elif pipe == self._stderr:
                    self._tail = (self._tail + data)[-STDERR_BYTES_MAX:]
                else:
                    yield from bounded(LOCAL_TARGET, lines.feed, data)

    def end(self) -> Completed:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and select.select([self._stderr], [], [], 1)[0]:
            data = os.read(self._stderr, 1 << 16)
            if not data:
                break
            self._tail = (self._tail + data)[-STDERR_BYTES_MAX:]
        self.close()
        return Completed(self._process.wait(), b"", self._tail)

    def close(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
