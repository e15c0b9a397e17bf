"""Single keys of a terminal, while a display is on it; the terminal is as it was afterwards."""

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable
from typing import Any

TICK_S = 0.2


class Keys:
    """Hands each key that is pressed to a function, on a thread of its own. Ctrl-C stays what it is."""

    def __init__(self, on_key: Callable[[str], None]) -> None:
        self._on_key, self.closed = on_key, threading.Event()
        self._saved = _take_terminal()
        self._thread = threading.Thread(target=self._read, daemon=True)
        if self._saved is not None:
            self._thread.start()

    @property
    def work(self) -> bool:
        """Return whether keys can be pressed: stdin is this process's own terminal."""
        return self._saved is not None

    def close(self) -> None:
        """Read no more keys, and give the terminal its settings back."""
        self.closed.set()
        if self._saved is not None:
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout=5)
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._saved)
            self._saved = None

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            while not self.closed.is_set():
                ready, _, _ = select.select([sys.stdin.fileno()], [], [], TICK_S)
                if ready and not self.closed.is_set():
                    data = os.read(sys.stdin.fileno(), 32)
                    if not data:
                        return
                    if not data.startswith(
                        b"\x1b"
                    ):  # an arrow, or another key of several characters
                        for key in data.decode(errors="replace"):
                            self._on_key(key)


def _take_terminal() -> list[Any] | None:
    """Have keys come one by one and unseen; return the settings before, or None where stdin is not ours to read."""
    try:
        descriptor = sys.stdin.fileno()
        if not os.isatty(descriptor) or os.tcgetpgrp(descriptor) != os.getpgrp():
            return None
        saved = termios.tcgetattr(descriptor)
        tty.setcbreak(descriptor)
    except (OSError, ValueError, AttributeError, termios.error):
        return None
    return saved


def interrupt() -> None:
    """Do what Ctrl-C does, from any thread."""
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGINT)
