"""Follow a run's files from byte offsets: JSON lines on stdout, made for a pipe to the control side.

    python3 -m rollouts.worker.tail <run_path> [--follow]

`deploy` sends this program along (remote/host/sending.py), and needs no code of the run's. stdin's first line is
{relative file: bytes already held}, or [those bytes, the SHA-256 of the last LAST_BYTES of them]; stdin then stays open
while following, and its end ends this process, so a laptop that vanished leaves nothing here. Lines written:

    {"file": name, "offset": n, "data": base64}      of a growing file; whole lines at a time for .jsonl
    {"file": name, "cut": n}                         a stage restarted: what is held beyond n bytes counts no more
    {"file": name, "snapshot": text}                 of a small file that is replaced, when it changed
    {"unusable": name, "reason": text}               once, of one that is no plain file, or too large to be a small one
    {"looked": true}                                 a look over all files that found something is over
    {"alive": true}                                  every ALIVE_S seconds
    {"ended": true, "state": s, "exit_code": n}      last: the run is over and everything was sent
    {"live": true}                                   last without --follow, where it is not over
    {"error": text}                                  last, exit 1: an offset that does not fit

Standard library only.
"""

import base64
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from rollouts import run_dir
from rollouts.plain_files import is_plain, reading
from rollouts.run_dir import RunDir, observe
from rollouts.slurm.settle import settle
from rollouts.worker.processes import marked_processes

CHUNK_BYTES = 256 * 1024
POLL_S = 0.2  # from one look over all files to the next
ROW_POLL_S = 0.02  # within which a new row begins a look: someone watches it come
ALIVE_S = 5.0
LAST_BYTES = 4096  # of what the reader holds, compared with what lies here
LAST_WORDS_S = 60.0  # for the windows of a dead supervisor to end

Send = Callable[[dict[str, Any]], None]


class OffsetError(Exception):
    """The reader holds something else than what lies here. The message says what."""


class Held(NamedTuple):
    """What the reader has of a file."""

    size: int
    digest: str = ""  # of its last LAST_BYTES; "": not told


def read_offsets(line: str) -> dict[str, Held]:
    """{file: what the reader holds}, from its first line. Raises OffsetError for anything else."""
    try:
        offsets = json.loads(line or "{}")
    except (ValueError, RecursionError) as error:
        raise OffsetError(f"the reader's first line is not JSON: {error}") from None
    named = offsets if isinstance(offsets, dict) else {"": None}
    found = {name: _held(value) for name, value in named.items()}
    if None in found.values():
        raise OffsetError(
            f"the reader's first line is {line.strip()[:200]!r}, and should be {{file: bytes held}}"
        )
    return {name: held for name, held in found.items() if held is not None}


def _held(value: Any) -> Held | None:
    size, digest = value if isinstance(value, list) and len(value) == 2 else (value, "")
    return Held(size, digest) if type(size) is int and isinstance(digest, str) else None


class Tail:
    """What was sent so far, and sending the rest."""

    def __init__(self, run: RunDir, held: dict[str, Held], send: Send) -> None:
        self.run, self.send = run, send
        self.offsets = {name: item.size for name, item in held.items()}
        self.restarts_known = dict.fromkeys(self.offsets, 0)  # by the reader's copy of each file
        # name: inode, size, mtime when it was sent
        self.snapshots: dict[str, tuple[int, int, int]] = {}
        # name: device, inode of a growing file, once it was seen
        self.files: dict[str, tuple[int, int]] = {}
        self.unusable: set[str] = set()
        self.directory = _identity(run.path)
        for name, item in held.items():
            self._check_offset(name, item)

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
            raise OffsetError(
                f"{self.run.path}: the run's directory was removed from the host, or put aside"
            )

    def _check_offset(self, name: str, held: Held) -> None:
        path = self.run.path / name
        known = name in run_dir.STREAMED_FILES or (
            Path(name).match(run_dir.LOG_GLOB) and ".." not in name
        )
        if not known:
            raise OffsetError(f"{name}: not a file that is followed")
        if os.path.lexists(path) and not is_plain(path):
            return  # said when its turn comes
        size = path.stat().st_size if path.exists() else 0
        if 0 <= held.size <= size and held.digest in ("", _last_digest(path, held.size)):
            return
        if not self._cut(name):
            raise _does_not_fit(name, held.size, size)

    def _cut(self, name: str) -> bool:
        """Have the reader drop what restarts took back of a file since it was last told; False where none did."""
        restarts = run_dir.read_restarts(self.run)
        kept = [item.kept.get(name) for item in restarts]
        taken = [size for size in kept[self.restarts_known.get(name, 0) :] if size is not None]
        if not taken:
            return False
        self.restarts_known[name] = len(restarts)
        self.offsets[name] = min(self.offsets.get(name, 0), *taken)
        self.send({"file": name, "cut": self.offsets[name]})
        return True

    def _send_chunk(self, name: str, *, whole_lines: bool) -> bool:
        try:
            # one open file: what is checked is what is read
            with reading(self.run.path / name) as stream:
                offset = self._checked_offset(name, os.fstat(stream.fileno()))
                stream.seek(offset)
                data = read_chunk(stream, whole_lines=whole_lines)
        except FileNotFoundError:
            if name in self.files:
                raise OffsetError(
                    f"{name}: was removed from the host while it was followed"
                ) from None
            return False
        except OSError as error:  # a pipe, a device, one that may not be read: the others go on
            return self._pass_over(name, error.strerror or str(error))
        if not data:
            return False
        self.send({"file": name, "offset": offset, "data": base64.b64encode(data).decode()})
        self.offsets[name] = offset + len(data)
        return True

    def _checked_offset(self, name: str, found: os.stat_result) -> int:
        """Return where to go on. A followed file only ever grows, or is cut by a restart. Raises OffsetError."""
        identity = (found.st_dev, found.st_ino)
        if self.files.setdefault(name, identity) != identity and not self._cut(name):
            raise OffsetError(
                f"{name}: was replaced on the host while it was followed: not the same run any more"
            )
        self.files[name] = identity
        offset = self.offsets.get(name, 0)
        if found.st_size < offset:
            raise _does_not_fit(name, offset, found.st_size)
        return offset

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
            return self._pass_over(
                name, f"{found.st_size} bytes, more than {run_dir.SNAPSHOT_BYTES_MAX}"
            )
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


def _last_digest(path: Path, size: int) -> str:
    """Return the digest of the last LAST_BYTES of a file's first `size` bytes, as the reader makes it of its copy."""
    if not size:
        return hashlib.sha256().hexdigest()
    with reading(path) as stream:
        stream.seek(max(0, size - LAST_BYTES))
        return hashlib.sha256(stream.read(min(size, LAST_BYTES))).hexdigest()


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
        # before sending: what was written until then is sent after
        over = _is_over(run, dead_since)
        if dead_since is None and not observe(run).live:
            dead_since = time.monotonic()
        tail.check_directory()
        sizes = _row_sizes(run)
        sent = False
        while tail.send_new():
            sent = True
        if over:
            _send_end(run, send)
            return
        if sent:
            send({"looked": True})
        if time.monotonic() - alive_at >= ALIVE_S:
            send({"alive": True})
            alive_at = time.monotonic()
        _wait_for_rows(run, sizes)


def _wait_for_rows(run: RunDir, sizes: list[int]) -> None:
    """Return when a file of rows has grown, after POLL_S at the latest: looking at all files costs more."""
    deadline = time.monotonic() + POLL_S
    while time.monotonic() < deadline and _row_sizes(run) == sizes:
        time.sleep(ROW_POLL_S)


def _row_sizes(run: RunDir) -> list[int]:
    sizes = []
    for name in run_dir.STREAMED_FILES:
        try:
            sizes.append(os.stat(run.path / name).st_size)
        except OSError:
            sizes.append(-1)
    return sizes


def _is_over(run: RunDir, dead_since: float | None) -> bool:
    """Return whether no supervisor is left, and none of its windows still writes its last words."""
    settled = settle(run)  # True for a run that is not Slurm's
    if observe(run).live:
        return False
    waited_out = dead_since is not None and time.monotonic() - dead_since > LAST_WORDS_S
    return waited_out or (settled and not marked_processes(run))


def _send_end(run: RunDir, send: Send) -> None:
    run_dir.clean_up(run.path.parent.parent)  # it may have died without its own end
    seen = observe(run)
    send({"ended": True, "state": seen.state, "exit_code": seen.exit_code})


def _write_line(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def _end_with_stdin() -> None:
    """End the process once stdin ends: the reader is gone. os._exit, as the main thread may be blocked on a dead
    pipe."""
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
