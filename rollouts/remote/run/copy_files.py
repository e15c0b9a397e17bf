"""Files of a run on their way to a place that the user names. What has its name is whole.

They grow in a hidden directory beside that place, so that the next copy goes on where one was cut off. Then they are
moved to their names, unless a file is there that differs; one that is only shorter, as of a run that went on since, is
brought up to date.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rollouts.remote.errors import DeployError
from rollouts.remote.host.rsync_here import pull_rsync
from rollouts.remote.run.connection import RetryPolicy, RunConnection, with_retries
from rollouts.remote.run.mirror_files import remove_tree
from rollouts.view.reporter import Say

READ_BYTES = 1 << 20
NAMED_MAX = 8  # files that a message lists
VANISHED = 24  # rsync's exit code: a file went away while it was copied
WAITING = ".deploy-cp-{}.part"  # the name of a hidden directory


@dataclass(frozen=True)
class WantedFiles:
    """A file or a directory of a run, and where it goes."""

    root: str  # a directory on the host, as rsync is given it
    name: str  # below it
    to: Path
    label: str  # as the user wrote it

    @property
    def waiting(self) -> Path:
        """Return the hidden directory of what has come so far: of these files for that place alone."""
        key = hashlib.sha256(os.fsencode(f"{self.root}\0{self.name}\0{self.to.name}")).hexdigest()
        return self.to.with_name(WAITING.format(key[:16]))


@dataclass(frozen=True)
class Brought:
    """What a copy did: the files that came, and what of the run was left out."""

    files: int
    is_new: bool  # nothing was at that place before
    left_out: tuple[str, ...]  # links and the like
    vanished: bool  # some went away meanwhile


def bring(
    wanted: WantedFiles,
    connection: RunConnection,
    *,
    force: bool,
    say: Say,
    on_progress: Callable[[str], None] | None,
) -> Brought:
    """Copy it, over as many connections as that takes. `force`: over files that differ.

    Raises DeployError, and keeps what came; for files that differ it keeps nothing.
    """
    what, is_new = f"{connection.entry.run_id}:{wanted.label}", not os.path.lexists(wanted.to)
    with _held(wanted) as lock:
        skipped, vanished = with_retries(
            lambda: _fill(wanted, connection, lock, on_progress),
            connection,
            say,
            RetryPolicy(),
            came=lambda: sum(size for _, size in _files(wanted.waiting)),
        )
        came = wanted.waiting / os.path.basename(wanted.name)
        try:
            if vanished and not os.path.lexists(came):
                raise DeployError(f"{what} went away while it was copied.")
            files = _admit(came, wanted.to, force=force, what=what)
        finally:
            remove_tree(wanted.waiting)
    return Brought(files, is_new, skipped, vanished)


@contextlib.contextmanager
def _held(wanted: WantedFiles) -> Iterator[int]:
    """Make the hidden directory and yield it, open and locked; rsync holds the lock too, for as long as it runs."""
    waiting = wanted.waiting
    with contextlib.suppress(FileExistsError):
        waiting.mkdir(0o700)
    descriptor = os.open(waiting, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeployError(
                f"another `deploy cp` is copying to {wanted.to}.", fix="let it end, or end it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def _fill(
    wanted: WantedFiles,
    connection: RunConnection,
    lock: int,
    on_progress: Callable[[str], None] | None,
) -> tuple[tuple[str, ...], bool]:
    """Bring it into the hidden directory. Returns what was left out, and whether some went away. Raises DeployError."""
    waiting, transport = wanted.waiting, connection.transport
    lines: list[str] = []

    def read(line: str) -> None:
        if line.startswith("skipping"):
            lines.append(line)
        elif on_progress is not None:
            on_progress(line)

    # what is there is compared by content: a file may change within a second, and keep its size
    same_name = wanted.to.name == os.path.basename(wanted.name) and os.path.lexists(wanted.to)
    there = [f"--compare-dest={wanted.to.parent}/", "--checksum"] if same_name else []
    done = pull_rsync(
        transport,
        [
            *("-rt", "--no-R", "--no-links", "--inplace", "--from0", "--files-from=-"),
            f"--exclude={WAITING.format('*')}",
            *(*there, transport.rsync_path(f"{wanted.root}/"), f"{waiting}/"),
        ],
        waiting,
        stdin=b"./" + wanted.name.encode(errors="surrogateescape") + b"\0",
        on_output=read,
        keep_open=(lock,),
    )
    vanished = done.returncode == VANISHED or (
        f'{wanted.name}" failed: No such file' in done.err and not any(waiting.iterdir())
    )
    if done.returncode != 0 and not vanished:
        raise DeployError(
            f"{connection.entry.run_id}:{wanted.label} could not be copied.",
            found=done.err[-1500:],
            fix=f"what came waits in {waiting}: the same command goes on with it",
        )
    skipped = tuple(line.partition('"')[2].rstrip('"') for line in lines)
    return skipped, vanished


def _files(directory: Path) -> Iterator[tuple[Path, int]]:
    """Yield the plain files below a directory, or the one that it is, with their sizes."""
    if directory.is_file() and not directory.is_symlink():
        yield directory, directory.lstat().st_size
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    yield path, path.lstat().st_size


def _admit(came: Path, to: Path, *, force: bool, what: str) -> int:
    """Move what came to its place. Returns the number of files. Raises DeployError where one of them may not go there.

    Files that were there already, the same, did not come.
    """
    moves = [
        (path, to / path.relative_to(came) if came.is_dir() else to) for path, _ in _files(came)
    ]
    in_the_way = [target for _, target in moves if _obstacle(target, to)]
    differ = [
        target
        for path, target in moves
        if target not in in_the_way and not force and _differs(target, path)
    ]
    if in_the_way:
        raise DeployError(
            f"{what} cannot be copied to {to}: a directory, a file or a link is in its way.",
            found=_named(in_the_way),
            fix="move that away, or name another place",
        )
    if differ:
        raise DeployError(
            f"{what} was not copied: {'other files are' if len(differ) > 1 else 'another file is'} there already.",
            found=f"{_named(differ)}: not the same as the run's",
            fix="--force writes over them; or name another place",
        )
    if came.is_dir() and not os.path.lexists(to):
        came.rename(to)
        return len(moves)
    for path, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for folder, _, _ in os.walk(came):  # empty ones too
        (to / Path(folder).relative_to(came)).mkdir(parents=True, exist_ok=True)
    return len(moves)


def _obstacle(target: Path, to: Path) -> bool:
    """Return whether a file cannot have that name, or would land outside of the place that the user named."""
    if target.is_dir() or (os.path.lexists(target) and not target.is_file()):
        return True
    if target == to:
        return False
    inside = Path(os.path.realpath(to))
    parent = next(p for p in target.parents if os.path.lexists(p))
    return not parent.is_dir() or not Path(os.path.realpath(parent)).is_relative_to(
        inside if os.path.lexists(to) else inside.parent
    )


def _differs(there: Path, new: Path) -> bool:
    """Return whether a file is there with anything but the beginning of the new one."""
    if not there.is_file():
        return False
    if there.stat().st_size > new.stat().st_size:
        return True
    with there.open("rb") as old, new.open("rb") as stream:
        while part := old.read(READ_BYTES):
            if stream.read(len(part)) != part:
                return True
    return False


def _named(paths: list[Path]) -> str:
    more = f"\nand {len(paths) - NAMED_MAX} more" if len(paths) > NAMED_MAX else ""
    return "\n".join(map(str, paths[:NAMED_MAX])) + more
