"""The run directory's copy on this machine, filled while the run goes on.

Bytes are written where they belong, so applying a message twice, or from two commands at once, changes nothing. What
may be written, and how, is mirror_files.py's; checkpoints.py brings the checkpoints.
"""

import base64
import hashlib
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.read_answer import checked
from rollouts.remote.host.rsync_here import pull_rsync
from rollouts.remote.host.transport import Transport
from rollouts.remote.run.mirror_files import (
    PULLED_PATTERNS,
    RefusedNameError,
    admit,
    check_streamed,
    make_mirror,
    plain_file,
    reading,
    remove_tree,
    replace,
    size_of,
    write_at,
)
from rollouts.run_dir import (
    LOG_GLOB,
    ROW_FILES,
    SNAPSHOT_BYTES_MAX,
    STREAMED_FILES,
    RunDir,
    parse_row,
)

LINE_BYTES_MAX = 64 << 20
FILES_MAX = 2000  # logs and exit records: a run has a handful
STAGING = ".pull-"
LAST_BYTES = 4096  # worker.tail's


class Mirror:
    """What `tail` sends, written down; and the new rows of the line files, in order.

    `left_out` counts what could not be used, by what it was: the reader's one note.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.left_out: Counter[str] = Counter()
        self._read: dict[str, int] = {}  # how far rows() has come, by file
        self._written: set[str] = set()
        make_mirror(run.path)

    def left_out_notes(self, *, rows: int = 0) -> tuple[str, ...]:
        """Return one note of all that could not be used, with counts, or () for nothing. `rows`: malformed ones."""
        counts = self.left_out + Counter({"rows that lack a field, or have a wrong one": rows})
        if not counts:
            return ()
        return (
            "left out of what the host sent: "
            + "; ".join(f"{count} {what}" for what, count in counts.items()),
        )

    def offsets(self) -> dict[str, int]:
        """Return the bytes held, by file: `tail` goes on from there."""
        names = [
            *STREAMED_FILES,
            *(path.relative_to(self.run.path).as_posix() for path in self._logs()),
        ]
        sizes = {name: size_of(self.run.path, name) for name in names}
        return {name: size for name, size in sizes.items() if size is not None}

    def held(self) -> dict[str, int | list[int | str]]:
        """Return the same for `tail`, with a digest of the end of each file that a restart may have cut."""
        return {
            name: [size, self._last_digest(name, size)] if name in ROW_FILES else size
            for name, size in self.offsets().items()
        }

    def _last_digest(self, name: str, size: int) -> str:
        with reading(self.run.path, name) as stream:
            if stream is None:
                return ""
            stream.seek(max(0, size - LAST_BYTES))
            return hashlib.sha256(stream.read(min(size, LAST_BYTES))).hexdigest()

    def _logs(self) -> list[Path]:
        return sorted(path for path in self.run.path.glob(LOG_GLOB) if not path.is_symlink())

    def apply(self, message: dict[str, Any]) -> str | None:
        """Write one message of `tail`; the file it changed.

        Raises RefusedNameError for a file that no run has, TransportError when bytes before it are missing or the
        message is damaged.
        """
        if "unusable" in message:
            self.left_out["files of the host that are not plain files, or too large"] += 1
        if "file" not in message:
            return None
        snapshot = "snapshot" in message
        name = check_streamed(str(message["file"]), snapshot=snapshot)
        if len(self._written | {name}) > FILES_MAX:
            raise RefusedNameError(name, f"one more than the {FILES_MAX} that a run may have")
        self._written.add(name)
        if snapshot:
            if not isinstance(message["snapshot"], str):
                raise TransportError(f"a damaged message of {name}: no text", lost=True)
            text = message["snapshot"].encode(errors="surrogatepass")
            if len(text) > SNAPSHOT_BYTES_MAX:
                raise RefusedNameError(name, f"which is larger than {SNAPSHOT_BYTES_MAX} bytes")
            replace(self.run.path, name, text)
            return name
        if "cut" in message:
            return self._cut(name, message["cut"])
        offset, data = _chunk(message)
        with plain_file(self.run.path, name, os.O_WRONLY | os.O_CREAT) as descriptor:
            size = os.fstat(descriptor).st_size
            if offset > size:
                raise TransportError(
                    f"{name}: {size} bytes here, the host goes on at {offset}", lost=True
                )
            write_at(descriptor, data, offset)
        return name

    def _cut(self, name: str, size: Any) -> str:
        """Drop what a restart on the host took back of a file."""
        if type(size) is not int or size < 0 or name not in ROW_FILES:
            raise TransportError(f"a damaged message of {name}: cut at {size!r}", lost=True)
        with plain_file(self.run.path, name, os.O_WRONLY | os.O_CREAT) as descriptor:
            if os.fstat(descriptor).st_size > size:
                os.ftruncate(descriptor, size)
        self._read[name] = min(self._read.get(name, 0), size)
        return name

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield new complete lines of a .jsonl file; one that is not a JSON object is counted."""
        with reading(self.run.path, name) as stream:
            if stream is None:
                return
            stream.seek(self._read.get(name, 0))
            while line := stream.readline(LINE_BYTES_MAX):
                whole = line.endswith(b"\n")
                if not whole and len(line) < LINE_BYTES_MAX:
                    return
                self._read[name] = self._read.get(name, 0) + len(line)
                row = parse_row(line) if whole else None
                if row is not None:
                    yield row
                elif line.strip():
                    self.left_out[f"lines of {name} that are not JSON objects"] += 1

    def new_text(self, name: str) -> bytes:
        """Return the bytes of a log that were not handed out yet."""
        with reading(self.run.path, name) as stream:
            if stream is None:
                return b""
            stream.seek(self._read.get(name, 0))
            data = stream.read()
        self._read[name] = self._read.get(name, 0) + len(data)
        return data


def _chunk(message: dict[str, Any]) -> tuple[int, bytes]:
    try:
        offset = checked(message, {"offset": int, "data": str})["offset"]
        data = base64.b64decode(message["data"], validate=True)
    except ValueError as error:
        raise TransportError(
            f"a damaged message of {message['file']}: {error!r}", lost=True
        ) from None
    if offset < 0:
        raise TransportError(f"a damaged message of {message['file']}: offset {offset}", lost=True)
    return offset, data


def pull_files(
    transport: Transport, run_path: str, run: RunDir, rsync_options: Sequence[str] = ()
) -> list[str]:
    """Bring everything small, compared by checksum: afterwards the mirror holds what the host holds.

    Returns the names that were left out: no run has them, or they are not plain files. What arrives is put into a
    separate directory first, from which only plain files with a run's names are moved on.
    """
    make_mirror(run.path)
    for left in run.path.glob(f"{STAGING}*"):  # of a deploy that was killed
        remove_tree(left)
    staged = run.path / f"{STAGING}{secrets.token_hex(4)}"
    staged.mkdir(0o700)
    # W&B's link to its own log in the host's cache: left out in every job, so no note
    patterns = ["--exclude=/wandb/*/logs/debug-core.log"]
    patterns += [*(f"--include={pattern}" for pattern in PULLED_PATTERNS), "--exclude=*"]
    options = ["-r", "--no-links", "--checksum", "--prune-empty-dirs", "--chmod=D700,F600"]
    arguments = [*options, *rsync_options, f"--compare-dest={run.path}/", *patterns]
    try:
        done = pull_rsync(
            transport, [*arguments, transport.rsync_path(f"{run_path}/"), f"{staged}/"], staged
        )
        refused = admit(staged, run.path)  # also of a pull that failed half-way: what came is whole
    finally:
        remove_tree(staged)
    if done.returncode not in (0, 24):  # 24: a temporary name vanished while copying
        raise DeployError(
            f"{transport.target}: results could not be pulled.",
            found=done.err[-1500:],
            started=True,
        )
    return refused + re.findall(
        r"^skipping non-regular file \"(.*)\"$", done.out, flags=re.MULTILINE
    )
