"""Checkpoints on their way here: each under a hidden name until its manifest holds. What has a name is whole.

Over SSH a file grows in place under the hidden name, so that whatever cuts a pull off, a kill -9 of rsync too, the next
one goes on at the byte where it broke. One pull at a time has the directory: its rsync holds the lock as well, so that
one whose deploy was killed ends first, and nothing is sent twice.
"""

import contextlib
import fcntl
import os
import queue
import re
import shlex
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from rollouts.manifest import MANIFEST_FILE, manifest_problems, read_manifest, sha256
from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.host.rsync_here import pull_rsync
from rollouts.remote.host.transport import Transport
from rollouts.remote.local_faults import os_problem, unexpected
from rollouts.remote.run.mirror_files import (
    check_checkpoint,
    directory,
    is_checkpoint,
    make_mirror,
    remove_tree,
)
from rollouts.remote.run.wanted import EVERYTHING, ToBring, stage_and_step
from rollouts.run_dir import RunDir

HASH_TIMEOUT_S = 3600.0
BACKGROUND_TRIES = 4


def pull_checkpoint(
    transport: Transport,
    run_path: str,
    run: RunDir,
    path: str,
    *,
    rsync_options: Sequence[str] = (),
) -> Path:
    """Bring one completed checkpoint here, verified against its manifest. Returns its directory, made once."""
    final = run.path / check_checkpoint(path)
    make_mirror(run.path)
    with directory(run.path, PurePosixPath(path).parts[:-1]):
        pass  # made, and no link: rsync is given a path
    with _partial_held(final) as lock:
        if lock is not None:
            _fill(
                transport, f"{run_path}/{path}", run, final, rsync_options=rsync_options, lock=lock
            )
    _point_latest(final)
    return final


def _fill(
    transport: Transport,
    source: str,
    run: RunDir,
    final: Path,
    *,
    rsync_options: Sequence[str],
    lock: int,
) -> None:
    partial = _partial(final)
    # a hard link is as good as a copy: neither side writes to what is whole
    if isinstance(transport, LocalTransport):
        way = ["--partial", f"--link-dest={source}"]
    else:
        _drop_links(partial)  # what is written in place must be this pull's own
        way = ["--inplace", "--chmod=D700,F600"]
    arguments = [
        "-rt",
        "--no-links",
        "--delete",
        *way,
        *rsync_options,
        transport.rsync_path(f"{source}/"),
        f"{partial}/",
    ]
    done = pull_rsync(transport, arguments, partial, keep_open=(lock,))
    path = final.relative_to(run.path).as_posix()
    if done.returncode != 0:
        raise DeployError(
            f"{transport.target}: {path} could not be pulled.", found=done.err[-1500:], started=True
        )
    if problems := manifest_problems(partial):
        raise _damaged(transport, source, partial, run, problems)
    partial.rename(final)


@contextlib.contextmanager
def _partial_held(final: Path) -> Iterator[int | None]:
    """Wait until no other pull, and no rsync that one left, has the hidden directory; yield it, open and locked.

    None: the checkpoint is here whole.
    """
    partial = _partial(final)
    while True:
        if not final.is_symlink() and final.is_dir():
            yield None
            return
        if partial.is_symlink() or not partial.is_dir():
            remove_tree(partial)
            partial.mkdir(0o700)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.lexists(partial) and os.path.samestat(os.fstat(descriptor), partial.lstat()):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _drop_links(partial: Path) -> None:
    """Remove whatever is no plain file with this one name: nothing else is written through it."""
    for file in partial.rglob("*"):
        status = file.lstat()
        if not stat.S_ISDIR(status.st_mode) and (
            not stat.S_ISREG(status.st_mode) or status.st_nlink > 1
        ):
            file.unlink()


def bytes_here(run: RunDir, path: str) -> int:
    """Return how much of a checkpoint has come: a try that was cut off may have brought some, or got nowhere."""
    final = run.path / check_checkpoint(path)
    if final.is_dir():
        return 1 << 62
    with contextlib.suppress(OSError):
        return sum(file.lstat().st_size for file in _partial(final).rglob("*") if file.is_file())
    return 0


def _damaged(
    transport: Transport, source: str, partial: Path, run: RunDir, problems: tuple[str, ...]
) -> DeployError:
    """Return why what came is not what the manifest says: the host's own files, or the way here. Drops it."""
    path = "/".join(PurePosixPath(source).parts[-3:])
    found = "\n".join(problem.replace(f"{partial}/", "") for problem in problems)
    there = _same_on_host(transport, source, partial)
    remove_tree(partial)  # so that the next try starts clean
    if there:
        return DeployError(
            f"{path} arrived damaged: it is damaged on the host, where its files are not what its manifest says.",
            found=found,
            fix="use another checkpoint; pulling again brings the same files",
            started=True,
        )
    return DeployError(
        f"{path} arrived damaged.", found=found, fix=f"deploy pull {run.run_id}", started=True
    )


def _same_on_host(transport: Transport, source: str, partial: Path) -> bool:
    """Return whether the host holds exactly what arrived; False also if it does not answer."""
    names = sorted(
        file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file()
    )
    if any("\n" in name or "\\" in name for name in names):
        return False
    with contextlib.suppress(ValueError, FileNotFoundError):
        expected = read_manifest(partial / MANIFEST_FILE)
        names = [name for name in names if name in expected or name == MANIFEST_FILE]
        if any(name not in names for name in expected):  # a file that did not come: is it there?
            probe = " && ".join(
                f"[ ! -f {shlex.quote(name)} ]" for name in expected if name not in names
            )
            done = transport.run(["sh", "-c", probe], cwd=source, timeout_s=HASH_TIMEOUT_S)
            if done.returncode != 0:
                return False
    try:
        done = transport.run(
            ["sha256sum", "--", *names[:500]], cwd=source, timeout_s=HASH_TIMEOUT_S
        )
    except TransportError:
        return False
    theirs = {
        name: digest for digest, _, name in (line.partition("  ") for line in done.out.splitlines())
    }
    return done.returncode == 0 and all(
        theirs.get(name) == sha256(partial / name) for name in names[:500]
    )


def drop_partial(run: RunDir, path: str) -> None:
    """Clear what had come of a checkpoint that the run removed meanwhile; one that is here whole stays."""
    partial = _partial(run.path / check_checkpoint(path))
    if os.path.lexists(partial):
        remove_tree(partial)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _point_latest(checkpoint: Path) -> None:
    """Point `latest` to the newest checkpoint that is here; step numbers are compared as numbers."""
    latest = checkpoint.parent / "latest"
    steps = [
        p
        for p in checkpoint.parent.glob("step_*")
        if p.is_dir() and re.fullmatch(r"step_[0-9]{1,12}", p.name)
    ]
    newest = max(steps, key=lambda path: int(path.name.removeprefix("step_")))
    temporary = latest.with_name(f".latest.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(newest.name)
    temporary.replace(latest)


class CheckpointPuller:
    """Pulls checkpoints in the background, one at a time, in the order of their events; of those that are `wanted`.

    A connection that is lost meanwhile is tried again, for as long as each try brings something; every failure is told
    to `say`, and all are tried once more by the last pull.
    """

    def __init__(
        self,
        transport: Transport,
        run_path: str,
        run: RunDir,
        say: Callable[[str, str], None] = lambda phase, text: None,
        pause_s: Callable[[int], float] = lambda failures: 0.0,
        *,
        wanted: ToBring = EVERYTHING,
    ) -> None:
        self._transport, self._run_path, self._run, self._say, self._pause_s = (
            transport,
            run_path,
            run,
            say,
            pause_s,
        )
        self._wanted = wanted
        self._newest: dict[str, int] = {}  # step, by stage
        self._paths: queue.Queue[str | None] = queue.Queue()
        self._finishing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, path: str) -> None:
        if is_checkpoint(path):
            stage, step = stage_and_step(path)
            self._newest[stage] = max(step, self._newest.get(stage, 0))
        self._paths.put(path)

    def finish(self) -> None:
        """Wait until all that were added have been tried."""
        self._finishing.set()
        self._paths.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (path := self._paths.get()) is not None:
            if self._is_wanted(path):
                self._bring(path)

    def _is_wanted(self, path: str) -> bool:
        """Return whether it is to be brought: one that waited until a newer one came is not the latest any more."""
        if not is_checkpoint(path):
            return True  # it is refused, and told
        stage, step = stage_and_step(path)
        which = self._wanted.checkpoints
        return which == "all" or (which == "latest" and step == self._newest[stage])

    def _bring(self, path: str) -> None:
        tries, came = 0, self._came(path)
        while self._try(path):
            now = self._came(path)
            tries, came = (1 if now > came else tries + 1), now
            if tries >= BACKGROUND_TRIES or self._finishing.wait(self._pause_s(tries)):
                return

    def _came(self, path: str) -> int:
        with contextlib.suppress(DeployError):
            return bytes_here(self._run, path)
        return 0

    def _try(self, path: str) -> bool:
        """Try to pull one. Returns whether the connection was lost, so that another try may help."""
        try:
            pull_checkpoint(
                self._transport,
                self._run_path,
                self._run,
                path,
                rsync_options=self._wanted.rsync_options,
            )
        except TransportError as error:
            self._say("pull", f"{path}: {error}")
            return error.lost
        except DeployError as error:
            self._say("pull", f"{error}")
        except OSError as error:
            self._say("pull", f"{path}: {os_problem(error).message}")
        except Exception as error:  # a bug: told, and the thread goes on with the next
            told = unexpected(error)
            self._say("pull", f"{path}: {told}; {told.problems[0].found}")
        return False
