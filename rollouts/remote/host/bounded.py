"""Limits on what a host sends: no output or line that is kept here is longer than any of ours can be."""

import contextlib
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from rollouts.remote.errors import DeployError
from rollouts.remote.host import framing
from rollouts.remote.host.framing import EndlessLineError

STDERR_BYTES_MAX = 64 * 1024  # the last ones are kept
READ_BYTES = 1 << 18
END_WAIT_S = 5.0  # for a program that was asked to end


class Collected:
    """Collect a command's whole stdout. Raises DeployError once it is longer than any of ours can be."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > framing.OUTPUT_BYTES_MAX:
            begin = bytes(self._data[: framing.SHOWN_BYTES])
            raise _endless(self._target, EndlessLineError(begin, framing.OUTPUT_BYTES_MAX))

    def all(self) -> bytes:
        return bytes(self._data)


def bounded(target: str, feed: Callable[[bytes], list[bytes]], data: bytes) -> list[bytes]:
    """Return `feed(data)`. Raises DeployError for a line without an end: it is not tried again."""
    try:
        return feed(data)
    except EndlessLineError as error:
        raise _endless(target, error) from None


def _endless(target: str, error: EndlessLineError) -> DeployError:
    """Return the error for output that is longer than anything of ours."""
    shown = error.begin.decode(errors="backslashreplace")
    return DeployError(
        f"{target}: what comes from the host has no end.",
        found=f"more than {error.limit / 2**20:.0f} MiB without an end, which begins: {shown}",
        needed="what deploy's own programs write there",
        fix="see what the host's shell or its Python writes into every command",
        started=True,
    )


def run_here(
    argv: Sequence[str],
    on_stdout: Callable[[bytes], None],
    *,
    stdin: bytes = b"",
    timeout_s: float | None,
    environment: Mapping[str, str] | None = None,
    keep_open: tuple[int, ...] = (),
) -> tuple[int, bytes]:
    """Run a program of this machine, which inherits `keep_open`. Returns its exit code and the last of its stderr.

    Raises subprocess.TimeoutExpired, and FileNotFoundError for a program that is not there. Whatever is raised while it
    runs, by `on_stdout` too, ends it: asked first, so that an rsync keeps the part of a file.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, env=environment, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=keep_open
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        feeding = threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True)
        feeding.start()
        try:
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            stderr = _read(process, on_stdout, deadline)
            process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_WAIT_S)
            process.kill()
            raise
        finally:
            feeding.join(END_WAIT_S)
        return process.returncode, stderr


def _feed(pipe: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    with contextlib.suppress(OSError):  # it ended without reading all of it; its exit code says why
        while view:
            view = view[pipe.write(view) :]
    with contextlib.suppress(OSError):
        pipe.close()


def _read(
    process: subprocess.Popen[bytes], on_stdout: Callable[[bytes], None], deadline: float | None
) -> bytes:
    """Read both outputs to their ends. Returns the last of stderr. Raises subprocess.TimeoutExpired."""
    stderr = b""
    with selectors.DefaultSelector() as open_pipes:
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            open_pipes.register(pipe, selectors.EVENT_READ)
        while open_pipes.get_map():
            left_s = None if deadline is None else deadline - time.monotonic()
            ready = open_pipes.select(left_s) if left_s is None or left_s > 0 else []
            if not ready:
                raise subprocess.TimeoutExpired(process.args, 0)
            for key, _ in ready:
                data = os.read(key.fd, READ_BYTES)
                if not data:
                    open_pipes.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    on_stdout(data)
                else:
                    stderr = (stderr + data)[-STDERR_BYTES_MAX:]
    return stderr
