"""A window's log on its way to stdout."""

import codecs
import sys
import threading

from rollouts.view.escape import escaped


class LogWriter:
    """Write a log's own bytes into a pipe or a file; on a terminal, text that cannot steer it.

    The bytes come in pieces, and a piece may end in the middle of a character.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, data: bytes) -> None:
        if sys.stdout.isatty():
            sys.stdout.write(escaped(self._decoder.decode(data)))
        else:
            sys.stdout.buffer.write(data)
        sys.stdout.flush()

    def close(self) -> None:
        """Write what was kept back."""


class HostLogWriter(LogWriter):
    """Write whole lines with the name of their host, beside those of other hosts."""

    _one_at_a_time = threading.Lock()

    def __init__(self, host: str) -> None:
        super().__init__()
        self._host, self._rest = host.encode(), b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            with self._one_at_a_time:
                super().__call__(b"".join(b"%s: %s\n" % (self._host, line) for line in lines))

    def close(self) -> None:
        if self._rest:
            self(b"\n")
