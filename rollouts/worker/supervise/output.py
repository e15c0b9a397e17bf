"""Where a window's output goes: its log, and a tmux pane that never holds up the process. Standard library only."""

import collections
import contextlib
import os
import sys
import threading

from rollouts import run_dir
from rollouts.plain_files import appending
from rollouts.run_dir import RunDir
from rollouts.worker.supervise.causes import cause_of

READ_BYTES = 1 << 16
# of a slow pane, dropped from its start beyond that; the log has everything
BACKLOG_BYTES = 1 << 20
DRAIN_S = 5.0  # for the last output, once the processes are gone
PANE_CLOSE_S = 1.0  # a paused pane may keep what it has
LAST_WORDS_S = 0.5  # for a failed process's last output, before its cause is looked for
CAUSE_LINES = 400  # of the log, from its end
# of what a full disk kept from the log: its end is written once there is room
UNLOGGED_BYTES = 1 << 13


class Pane:
    """Writes to the tmux pane from a thread of its own: a paused or vanished pane never holds up the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._chunks: collections.deque[bytes] = collections.deque()
        self._bytes = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def offer(self, data: bytes) -> None:
        with self._changed:
            self._chunks.append(data)
            self._bytes += len(data)
            while self._bytes > BACKLOG_BYTES:
                self._bytes -= len(self._chunks.popleft())
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Flush pending output, waiting at most timeout_s."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks or self._closing)
                if not self._chunks:
                    return
                data = self._chunks.popleft()
                self._bytes -= len(data)
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # the pane is gone; offers go on being dropped at the bound
                return


class Output:
    """Copies a process's output to the window's log and its pane; a full disk never blocks the process."""

    def __init__(self, run: RunDir, window: str) -> None:
        self.path = run.log(window)
        self._run, self._pane = run, Pane(sys.stdout.fileno())
        # an engine's earlier lives come before
        self._start = self.path.stat().st_size if self.path.exists() else 0
        self._unlogged = b""  # the end of what did not get into the log
        self._thread: threading.Thread | None = None

    def follow(self, source: int) -> None:
        """Begin to copy from a descriptor, in a thread, until its last writer is gone."""
        self._thread = threading.Thread(target=self._copy, args=(source,), daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """Write a line of the wrapper's own."""
        with contextlib.suppress(OSError):  # a full disk, or a directory that was removed
            self.path.parent.mkdir(exist_ok=True)
            self._log(text.encode())
        self._pane.offer(text.encode())

    def cause(self) -> str:
        """Return why the process failed, as its last lines tell; "" where they do not, or it never started."""
        if self._thread is None:
            return ""
        self._thread.join(LAST_WORDS_S)
        lines = run_dir.tail_lines(self.path, CAUSE_LINES, start=self._start)
        return cause_of([*lines, *self._unlogged.decode(errors="replace").splitlines()]) or ""

    def close(self) -> None:
        """Wait for the last output, write what a full disk kept from the log, and flush the pane."""
        if self._thread is not None:
            self._thread.join(DRAIN_S)
        rest, self._unlogged = self._unlogged, b""
        if rest and not was_removed(self._run):
            text = b"\n[a full disk; the last lines were]\n" + rest
            with contextlib.suppress(OSError):
                run_dir.write_on_full_disk(self._run, lambda: self._log(text))
        self._pane.close(PANE_CLOSE_S)

    def _log(self, data: bytes) -> None:
        with appending(self.path) as log:
            while data:
                data = data[log.write(data) :]

    def _copy(self, source: int) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
        while data := os.read(source, READ_BYTES):
            try:
                self._log(data)
            except OSError as error:  # disk full: the process must not block on its output for that
                self._pane.offer(f"[{self.path}: {error}]\r\n".encode())
                self._unlogged = (self._unlogged + data)[-UNLOGGED_BYTES:]
            self._pane.offer(data)


def was_removed(run: RunDir) -> bool:
    """Return whether the run's directory was removed. What is written into it would bring a part of it back."""
    return not run.plan.exists()
