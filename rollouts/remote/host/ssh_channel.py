"""A command on an SSH channel: its framed output, and what it reads, each in its own thread."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from rollouts.remote.errors import TransportError
from rollouts.remote.host.bounded import READ_BYTES, STDERR_BYTES_MAX, bounded
from rollouts.remote.host.framing import Frame, FrameReader, LineSplitter
from rollouts.remote.host.transport import Completed

END_WAIT_S = 10.0  # for the other output, and the exit code, after stdout's end


class Waitable(Protocol):
    """An event, such as a command's end."""

    def wait(self, timeout: float | None = None) -> bool: ...


class CommandChannel(Protocol):
    """A command on the host: its outputs, its input and its exit status, -1 where the connection was lost."""

    @property
    def status_event(self) -> Waitable: ...

    @property
    def exit_status(self) -> int: ...

    def recv(self, nbytes: int) -> bytes: ...

    def recv_stderr(self, nbytes: int) -> bytes: ...

    def sendall(self, s: bytes) -> None: ...

    def shutdown_write(self) -> None: ...

    def close(self) -> None: ...


class ChannelOutput:
    """stdout, stderr and stdin of a channel.

    Both outputs share the channel's flow control: reading one to its end before the other waits for ever once
    the other has filled the window (paramiko#1778), and so does waiting for the exit status first.

    The command's input follows its first mark: until then a shell may read ahead.
    """

    def __init__(
        self, channel: CommandChannel, line: bytes, frame: Frame, stdin: bytes, *, close_stdin: bool
    ) -> None:
        self._channel, self._line, self._stdin, self._close_stdin = (
            channel,
            line,
            stdin,
            close_stdin,
        )
        # bounded: a slow reader slows the host down
        self._stdout: queue.Queue[bytes] = queue.Queue(maxsize=64)
        self._out, self._err = FrameReader(frame), FrameReader(frame)
        self._stderr = b""
        self._stderr_ended, self._begun = threading.Event(), threading.Event()
        for work in (self._read_stdout, self._read_stderr, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read_stdout(self) -> None:
        for data in _framed(self._channel.recv, self._out):
            if self._out.began:
                self._begun.set()
            if data:
                self._stdout.put(data)
        self._begun.set()
        self._stdout.put(b"")

    def _read_stderr(self) -> None:
        for data in _framed(self._channel.recv_stderr, self._err):
            self._stderr = (self._stderr + data)[-STDERR_BYTES_MAX:]
        self._stderr_ended.set()

    def _write(self) -> None:
        # the command ended without reading all of it; its exit code says why
        with contextlib.suppress(OSError):
            self._channel.sendall(self._line)
            self._begun.wait()
            if self._out.began:
                self._channel.sendall(self._stdin)
            if self._close_stdin:
                self._channel.shutdown_write()

    @property
    def noise(self) -> bytes:
        """Return what was printed before the command began; all of it, if the command never began."""
        return self._out.noise

    def next(self, timeout_s: float) -> bytes | None:
        """Return the next bytes of stdout; b"" at its end, None when nothing came in time."""
        try:
            return self._stdout.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            return None

    def end(self, target: str) -> tuple[int, bytes]:
        """Return the exit code and the last of stderr. Raises TransportError where the connection was lost."""
        self._stderr_ended.wait(END_WAIT_S)
        stderr = self._stderr if self._err.began else self._err.noise
        if self._out.code is not None:
            return self._out.code, stderr
        if not self._channel.status_event.wait(END_WAIT_S) or self._channel.exit_status == -1:
            raise TransportError(f"{target}: connection lost", lost=True)
        return self._channel.exit_status, stderr


def _framed(receive: Callable[[int], bytes], reader: FrameReader) -> Iterator[bytes]:
    """Yield a command's own bytes until its end mark, or the stream's end."""
    while not reader.ended and (data := _received(receive)):
        yield reader.feed(data)
    yield reader.rest()


def _received(receive: Callable[[int], bytes]) -> bytes:
    try:
        return receive(READ_BYTES)
    except OSError:  # the connection is gone: the end of this output; the missing exit status tells
        return b""


class SSHStream:
    """Stream over a channel."""

    def __init__(self, target: str, channel: CommandChannel, output: ChannelOutput) -> None:
        self._target, self._channel, self._output = target, channel, output

    def lines(self, *, idle_timeout_s: float) -> Iterator[bytes]:
        lines = LineSplitter()
        while (data := self._output.next(idle_timeout_s)) != b"":
            if data is None:
                raise TransportError(
                    f"{self._target}: no sign of life for {idle_timeout_s:.0f} s", lost=True
                )
            yield from bounded(self._target, lines.feed, data)

    def end(self) -> Completed:
        code, stderr = self._output.end(self._target)
        return Completed(code, b"", stderr, self._output.noise)

    def close(self) -> None:
        self._channel.close()
