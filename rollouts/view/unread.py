"""Output whose reader may leave, as in `deploy CONFIG | head`, without ending what was begun."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class UnreadStream:
    """A stream that goes nowhere once nobody reads it. `left` is called then, once."""

    def __init__(self, stream: TextIO, left: Callable[[], None]) -> None:
        self._stream, self.left = stream, left
        self.is_read = True

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with self._dropped():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        with self._dropped():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is still in its buffer goes there too
            os.close(nowhere)
            self.is_read = False
            self.left()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_read() -> bool:
    """Return whether stdout has a reader, as far as it was written to."""
    return bool(getattr(sys.stdout, "is_read", True))


def all_the_same(run_id: str) -> Callable[[], None]:
    """Return what says on stderr that a run is followed all the same."""

    def say() -> None:
        sys.stderr.write(f"nobody reads the output any more: {run_id} is followed all the same\n")
        sys.stderr.flush()

    return say


@contextlib.contextmanager
def output_may_close(left: Callable[[], None]) -> Iterator[None]:
    """Go on when nobody reads the output any more; what Screen shows goes to stderr from then on.

    `left` is called then; it may raise. Within another one, this one's `left` counts.
    """
    if isinstance(sys.stdout, UnreadStream):
        stream = sys.stdout
        before = stream.left
        stream.left = left
        try:
            yield
            stream.flush()
        finally:
            stream.left = before
        return
    streams = sys.stdout, sys.stderr
    sys.stderr = cast(TextIO, UnreadStream(streams[1], lambda: None))
    sys.stdout = cast(TextIO, UnreadStream(streams[0], left))
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = streams
