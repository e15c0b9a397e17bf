"""The run directory's copy on this machine, filled while the run goes on.

Bytes are written where they belong, so applying a message twice, or from two commands at once, changes nothing.
Checkpoints arrive under a hidden name and get theirs once their manifest holds: what has a name is whole.
"""

import base64
import contextlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rollouts.manifest import manifest_problems
from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.transport import LocalTransport, Transport, run_rsync
from rollouts.run_dir import ENVIRONMENT_GLOB, LOG_GLOB, STREAMED_FILES, RunDir, write_text_atomic

PULL_TIMEOUT_S = 6 * 3600
NOT_PULLED = ("/code/*", "/weights", "/checkpoints", "/secrets.json", "/supervisor.lock", "/.gitignore", ".*.tmp")


class Mirror:
    """What `tail` sends, written down; and the new rows of the line files, in order."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._read: dict[str, int] = {}  # how far rows() has come, by file

    def offsets(self) -> dict[str, int]:
        """Bytes held, by file: where `tail` goes on."""
        names = [name for name in STREAMED_FILES if (self.run.path / name).exists()]
        names += [path.relative_to(self.run.path).as_posix() for path in self.run.path.glob(LOG_GLOB)]
        return {name: (self.run.path / name).stat().st_size for name in names}

    def apply(self, message: dict[str, Any]) -> str | None:
        """Write one message of `tail`; the file it changed. Raises TransportError when bytes before it are missing."""
        if "file" not in message:
            return None
        name = str(message["file"])
        path = self.run.path / _safe(name)
        if "snapshot" in message:
            write_text_atomic(path, message["snapshot"])
            return name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            size, offset = os.fstat(descriptor).st_size, int(message["offset"])
            if offset > size:
                raise TransportError(f"{name}: {size} bytes here, the host goes on at {offset}", lost=True)
            data = base64.b64decode(message["data"])
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
        finally:
            os.close(descriptor)
        return name

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Complete lines of a .jsonl file that were not handed out yet."""
        try:
            stream = (self.run.path / name).open("rb")
        except FileNotFoundError:
            return
        with stream:
            stream.seek(self._read.get(name, 0))
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._read[name] = self._read.get(name, 0) + len(line)
                yield json.loads(line)

    def new_text(self, name: str) -> bytes:
        """Bytes of a log that were not handed out yet."""
        try:
            stream = (self.run.path / name).open("rb")
        except FileNotFoundError:
            return b""
        with stream:
            stream.seek(self._read.get(name, 0))
            data = stream.read()
        self._read[name] = self._read.get(name, 0) + len(data)
        return data


def pull_files(transport: Transport, run_path: str, run: RunDir) -> None:
    """Everything small, compared by checksum: afterwards the mirror holds what the host holds."""
    environments = [f"--include=/{pattern}" for pattern in ("code/", ENVIRONMENT_GLOB)]
    excludes = [*environments, *(f"--exclude={pattern}" for pattern in NOT_PULLED)]
    run.path.mkdir(parents=True, exist_ok=True)
    arguments = ["-rlpt", "--checksum", *excludes, transport.rsync_path(f"{run_path}/"), f"{run.path}/"]
    done = run_rsync(transport, arguments, timeout_s=PULL_TIMEOUT_S)
    if done.returncode not in (0, 24):  # 24: a temporary name vanished while copying
        raise DeployError(f"{transport.target}: results could not be pulled.", found=done.err[-1500:], started=True)


def pull_checkpoint(transport: Transport, run_path: str, run: RunDir, path: str) -> Path:
    """Bring one completed checkpoint here, verified against its manifest. Returns its directory, made once."""
    final = run.path / _safe(path)
    if not final.exists():
        partial = _partial(final)
        partial.mkdir(parents=True, exist_ok=True)
        source = f"{run_path}/{path}"
        # On this machine a hard link is as good as a copy: neither side writes to a finished checkpoint
        links = [f"--link-dest={source}"] if isinstance(transport, LocalTransport) else []
        arguments = ["-rlpt", "--partial", *links, transport.rsync_path(f"{source}/"), f"{partial}/"]
        done = run_rsync(transport, arguments, timeout_s=PULL_TIMEOUT_S)
        if done.returncode != 0:
            raise DeployError(f"{transport.target}: {path} could not be pulled.", found=done.err[-1500:], started=True)
        problems = manifest_problems(partial)
        if problems:
            shutil.rmtree(partial)  # so that the next try starts clean
            raise DeployError(
                f"{path} arrived damaged.", found="\n".join(problems), fix=f"deploy pull {run.run_id}", started=True
            )
        partial.rename(final)
    _point_latest(final)
    return final


def drop_partial(run: RunDir, path: str) -> None:
    """Clear what had come of a checkpoint that the run removed meanwhile; one that is here whole stays."""
    shutil.rmtree(_partial(run.path / _safe(path)), ignore_errors=True)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _point_latest(checkpoint: Path) -> None:
    """`latest` names the newest checkpoint that is here; step numbers are compared as numbers."""
    latest = checkpoint.parent / "latest"
    steps = [path for path in checkpoint.parent.glob("step_*") if path.is_dir()]
    newest = max(steps, key=lambda path: int(path.name.removeprefix("step_")))
    temporary = latest.with_name(f".latest.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(newest.name)
    temporary.replace(latest)


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DeployError(f"the host names the file {name!r}, outside of the run directory.", started=True)
    return path


class CheckpointPuller:
    """Pulls checkpoints in the background, one at a time, in the order of their events."""

    def __init__(self, transport: Transport, run_path: str, run: RunDir) -> None:
        self._transport, self._run_path, self._run = transport, run_path, run
        self._paths: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, path: str) -> None:
        self._paths.put(path)

    def finish(self) -> None:
        """Wait until all that were added have been tried."""
        self._paths.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (path := self._paths.get()) is not None:
            with contextlib.suppress(DeployError):  # tried again, and reported, by the last pull
                pull_checkpoint(self._transport, self._run_path, self._run, path)
