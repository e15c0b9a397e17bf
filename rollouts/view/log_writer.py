"""A window's log on its way to stdout."""

import codecs
import sys

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
