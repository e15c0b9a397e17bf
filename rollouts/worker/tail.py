"""Follow a run's files from byte offsets: JSON lines on stdout, made for a pipe to the control side.

    python3 -m rollouts.worker.tail <run_path> [--follow]

`deploy` sends this program along (remote/host/sending.py), and needs no code of the run's. stdin's first line is
{relative file: bytes already held}; stdin then stays open while following, and its end ends this
process, so a laptop that vanished leaves nothing here. Lines written:

    {"file": name, "offset": n, "data": base64}      of a growing file; whole lines at a time for .jsonl
    {"file": name, "snapshot": text}                 of a small file that is replaced, when it changed
    {"unusable": name, "reason": text}               once, of one that is no plain file, or too large to be a small one
    {"alive": true}                                  every ALIVE_S seconds
    {"ended": true, "state": s, "exit_code": n}      last: the run is over and everything was sent
    {"live": true}                                   last without --follow, where it is not over
    {"error": text}                                  last, exit 1: an offset that does not fit

Standard library only.
"""

import base64
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rollouts import run_dir
from rollouts.plain_files import is_plain, reading
from rollouts.run_dir import RunDir, observe
from rollouts.worker.processes import marked_processes

CHUNK_BYTES = 256 * 1024
POLL_S = 0.2
ALIVE_S = 5.0
LAST_WORDS_S = 60.0  # for the windows of a dead supervisor to end

Send = Callable[[dict[str, Any]], None]


class OffsetError(Exception):
    """The reader holds something else than what lies here. The message says what."""


def read_offsets(line: str) -> dict[str, int]:
    """{file: bytes already held}, from the reader's first line. Raises OffsetError for anything else."""
    try:
        offsets = json.loads(line or "{}")
    except (ValueError, RecursionError) as error:
        raise OffsetError(f"the reader's first line is not JSON: {error}") from None
    held = offsets.values() if isinstance(offsets, dict) else [None]
    if not all(isinstance(offset, int) and not isinstance(offset, bool) for offset in held):
        raise OffsetError(f"the reader's first line is {line.strip()[:200]!r}, and should be {{file: bytes held}}")
    return dict(offsets)


class Tail:
    """What was sent so far, and sending the rest."""

    def __init__(self, run: RunDir, offsets: dict[str, int], send: Send) -> None:
        self.run, self.send = run, send
        self.offsets = dict(offsets)
        self.snapshots: dict[str, tuple[int, int, int]] = {}  # name: inode, size, mtime when it was sent
        self.files: dict[str, tuple[int, int]] = {}  # name: device, inode of a growing file, once it was seen
        self.unusable: set[str] = set()
        self.directory = _identity(run.path)
        for name, offset in self.offsets.items():
            self._check_offset(name, offset)

    def send_new(self) -> bool:
        """Send at most one chunk of each file. Returns whether anything was sent."""
        sent = False
        for name in run_dir.STREAMED_FILES:
            sent |= self._send_chunk(name, whole_lines=True)
        for pattern in run_dir.SNAPSHOT_GLOBS:
            for path in sorted(self.run.path.glob(pattern)):
                sent |= self._send_snapshot(path)
        for path in sorted(self.run.path.glob(run_dir.LOG_GLOB)):
            sent |= self._send_chunk(path.relative_to(self.run.path).as_posix(), whole_lines=False)
        return sent

    def check_directory(self) -> None:
        """Raises OffsetError when this is another directory than at first, or none."""
        if _identity(self.run.path) != self.directory:
            raise OffsetError(f"{self.run.path}: the run's directory was removed from the host, or put aside")

    def _check_offset(self, name: str, offset: int) -> None:
        path = self.run.path / name
        known = name in run_dir.STREAMED_FILES or (Path(name).match(run_dir.LOG_GLOB) and ".." not in name)
        if not known:
            raise OffsetError(f"{name}: not a file that is followed")
        if os.path.lexists(path) and not is_plain(path):
            return  # said when its turn comes
        size = path.stat().st_size if path.exists() else 0
        if not 0 <= offset <= size:
            raise _does_not_fit(name, offset, size)

    def _send_chunk(self, name: str, *, whole_lines: bool) -> bool:
        offset = self.offsets.get(name, 0)
        try:
            with reading(self.run.path / name) as stream:  # one open file: what is checked is what is read
                self._check_same(name, offset, os.fstat(stream.fileno()))
                stream.seek(offset)
                data = read_chunk(stream, whole_lines=whole_lines)
        except FileNotFoundError:
            if name in self.files:
                raise OffsetError(f"{name}: was removed from the host while it was followed") from None
            return False
        except OSError as error:  # a pipe, a device, one that may not be read: the others go on
            return self._pass_over(name, error.strerror or str(error))
        if not data:
            return False
        self.send({"file": name, "offset": offset, "data": base64.b64encode(data).decode()})
        self.offsets[name] = offset + len(data)
        return True

    def _check_same(self, name: str, offset: int, found: os.stat_result) -> None:
        """A followed file only ever grows. Raises OffsetError."""
        if self.files.setdefault(name, (found.st_dev, found.st_ino)) != (found.st_dev, found.st_ino):
            raise OffsetError(f"{name}: was replaced on the host while it was followed: not the same run any more")
        if found.st_size < offset:
            raise _does_not_fit(name, offset, found.st_size)

    def _send_snapshot(self, path: Path) -> bool:
        name = path.relative_to(self.run.path).as_posix()
        try:
            with reading(path) as stream:  # one open file: text and identity belong together
                found = os.fstat(stream.fileno())
                identity = (found.st_ino, found.st_size, found.st_mtime_ns)
                if self.snapshots.get(name) == identity:
                    return False
                data = stream.read(run_dir.SNAPSHOT_BYTES_MAX + 1)
        except FileNotFoundError:  # a glob's finding may be a temporary name
            return False
        except OSError as error:  # a pipe, a device, one that may not be read: the others go on
            return self._pass_over(name, error.strerror or str(error))
        if len(data) > run_dir.SNAPSHOT_BYTES_MAX:
            return self._pass_over(name, f"{found.st_size} bytes, more than {run_dir.SNAPSHOT_BYTES_MAX}")
        self.snapshots[name] = identity
        self.send({"file": name, "snapshot": data.decode(errors="replace")})
        return True

    def _pass_over(self, name: str, reason: str) -> bool:
        """Say once that a file cannot be sent; the others go on. Returns False: there is nothing to wait for."""
        if name not in self.unusable:
            self.unusable.add(name)
            self.send({"unusable": name, "reason": reason})
        return False


def _does_not_fit(name: str, offset: int, size: int) -> OffsetError:
    return OffsetError(
        f"{name}: the reader holds {offset} bytes, the host has {size}: not copies of the same run."
        " Move the local copy aside and pull again."
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def read_chunk(stream: IO[bytes], *, whole_lines: bool) -> bytes:
    """At most CHUNK_BYTES from here; with `whole_lines` nothing of a line whose end is not written yet.

    A complete line longer than a chunk comes in pieces.
    """
    data = stream.read(CHUNK_BYTES)
    if not whole_lines:
        return data
    cut = data.rfind(b"\n") + 1
    if cut or not data:
        return data[:cut]
    while block := stream.read(CHUNK_BYTES):
        if b"\n" in block:
            return data
    return b""


def follow(run: RunDir, tail: Tail, send: Send) -> None:
    """Send what comes until the run is over and all of it was sent."""
    alive_at = time.monotonic()
    dead_since: float | None = None
    while True:
        over = _is_over(run, dead_since)  # before sending: what was written until then is sent after
        if dead_since is None and not observe(run).live:
            dead_since = time.monotonic()
        tail.check_directory()
        while tail.send_new():
            pass
        if over:
            _send_end(run, send)
            return
        if time.monotonic() - alive_at >= ALIVE_S:
            send({"alive": True})
            alive_at = time.monotonic()
        time.sleep(POLL_S)


def _is_over(run: RunDir, dead_since: float | None) -> bool:
    """No supervisor, and none of its windows still writing its last words."""
    if observe(run).live:
        return False
    waited_out = dead_since is not None and time.monotonic() - dead_since > LAST_WORDS_S
    return waited_out or not marked_processes(run)


def _send_end(run: RunDir, send: Send) -> None:
    run_dir.clean_up(run.path.parent.parent)  # it may have died without its own end
    seen = observe(run)
    send({"ended": True, "state": seen.state, "exit_code": seen.exit_code})


def _write_line(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def _end_with_stdin() -> None:
    """The reader is gone once stdin ends. os._exit: the main thread may be blocked on a dead pipe."""
    while sys.stdin.readline():
        pass
    os._exit(0)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--follow"]
    following = "--follow" in sys.argv[1:]
    run = RunDir(Path(arguments[0]))
    try:
        if not os.path.lexists(run.status):
            raise OffsetError(f"{run.path}: no run was launched there")
        tail = Tail(run, read_offsets(sys.stdin.readline()), _write_line)
        if following:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
            follow(run, tail, _write_line)
            return
        over = _is_over(run, None)
        while tail.send_new():
            pass
        if over:
            _send_end(run, _write_line)
        else:
            _write_line({"live": True})
    except (OffsetError, ValueError) as error:
        _write_line({"error": str(error)})
        sys.exit(1)
    except BrokenPipeError:  # the reader is gone
        os._exit(0)


if __name__ == "__main__":
    main()
