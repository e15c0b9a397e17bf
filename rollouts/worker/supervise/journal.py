"""What the supervisor writes into the run directory: events and status. Standard library only.

A full disk is the trainer's to fail over: what cannot be written must not keep the supervisor from ending a run.
Nothing is written into a directory that was removed: it would bring a part of it back.
"""

import os
import shutil
import threading
import time
from typing import IO, Any

from rollouts import run_dir
from rollouts.run_dir import RunDir, Status
from rollouts.worker.supervise.console import say

FREE_BYTES_MIN = 1 << 20  # with less on its disk a run fails for want of room, whatever it says


class Journal:
    """The records of one run; `lock` is the open lock file, the supervisor's claim to the directory."""

    def __init__(self, run: RunDir, lock: IO[bytes]) -> None:
        self._run, self._lock = run, lock
        self._unwritten: list[dict[str, Any]] = []  # events that a full disk kept back
        self._writing = threading.Lock()  # the observer writes from a thread of its own

    def is_gone(self) -> bool:
        """Was the run's directory removed, or put aside? Then nobody can find this run, or stop it by its files."""
        try:
            found = self._run.lock.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        held = os.fstat(self._lock.fileno())
        return (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino)

    def event(self, kind: str, *, last: bool = False, **fields: Any) -> None:
        """Append an event, and those before it that could not be written. For the `last` one the reserve is given."""
        if self.is_gone():
            return
        with self._writing:
            self._unwritten.append({"time": time.time(), "kind": kind, **fields})
            try:
                if last:
                    run_dir.write_on_full_disk(self._run, self._write_events)
                else:
                    self._write_events()
            except OSError as error:
                say(f"cannot write {self._run.events}: {error}")

    def _write_events(self) -> None:
        while self._unwritten:
            run_dir.append_jsonl(self._run.events, self._unwritten[0])
            del self._unwritten[0]

    def status(self, status: Status) -> None:
        """Replace the status. For the final one the reserve is given."""

        def write() -> None:
            run_dir.write_json_atomic(self._run.status, status)

        if self.is_gone():
            return
        try:
            if status.exit_code is None:
                write()
            else:
                run_dir.write_on_full_disk(self._run, write)
        except OSError as error:
            say(f"cannot write {self._run.status}: {error}")

    def full_disk(self) -> str:
        """Return what to add to a failure where the disk is full: whatever else it says, that is likely why."""
        try:
            free = shutil.disk_usage(self._run.path).free
        except OSError:  # the directory was removed
            return ""
        if free >= FREE_BYTES_MIN:
            return ""
        return f". No space left on device: {free} bytes are free at {self._run.path}"
