"""Write what a host sends: only names of a closed list, plain files, inside one directory, and through no link.

A name is checked as text, then by where it leads: every directory on the way is opened under the one before it and
must be a real directory, and the file itself must be a plain one. Even if a mirror holds a link, nothing is written
through it.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from rollouts.plain_files import NotPlainFileError, open_plain
from rollouts.remote.errors import DeployError
from rollouts.run_dir import STREAMED_FILES, write_text_atomic

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}"
_GROWING = re.compile(rf"{'|'.join(map(re.escape, STREAMED_FILES))}|logs/{_NAME}\.log")
_SNAPSHOT = re.compile(rf"status\.json|(exit|trackers)/{_NAME}\.json|code/environment-{_NAME}\.txt")
# What the last pull may bring besides: who led which process group, and W&B's own run files
_PULLED_ONLY = re.compile(rf"processes/{_NAME}\.json|wandb/(offline-)?run-{_NAME}(/{_NAME})+")
_CHECKPOINT = re.compile(r"checkpoints/(sft|rl)/step_[0-9]{6,12}")
# What else is in a mirror: copies of the record, checkpoints, what a pull that was cut off left
_PUT_HERE = re.compile(
    r"\.gitignore|(config|plan(-\d+)?|mirror)\.json|code/.*|\.pull-.*|(.*/)?\..*\.tmp"
    r"|checkpoints/(sft|rl)/(\.?step_.*/.*|latest|\.latest\..*)",
    re.DOTALL,
)
_OTHER_HOST = re.compile(r"hosts/\d+/")  # of a run on several: a mirror each
PULLED_PATTERNS = (  # the same list, in the words of rsync
    *(f"/{name}" for name in (*STREAMED_FILES, "status.json")),
    *("/logs/", "/logs/*.log", "/exit/", "/exit/*.json", "/processes/", "/processes/*.json"),
    *("/trackers/", "/trackers/*.json"),
    *("/code/", "/code/environment-*.txt"),
    *("/wandb/", "/wandb/run-*/***", "/wandb/offline-run-*/***"),
)
MODE, DIRECTORY_MODE = 0o600, 0o700


class RefusedNameError(DeployError):
    """A name from a host that is not written. `kind` says why, for counting."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(f"the host names the file {name[:200]!r}, {kind}.", started=True)
        self.kind = kind


def check_streamed(name: str, *, snapshot: bool) -> str:
    """Return `name` if it is one that `tail` sends in that way. Raises RefusedNameError."""
    if (_SNAPSHOT if snapshot else _GROWING).fullmatch(name) is None:
        raise RefusedNameError(name, "outside of the files that a run has")
    return name


def may_be_pulled(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_GROWING, _SNAPSHOT, _PULLED_ONLY))


def is_checkpoint(path: object) -> bool:
    return isinstance(path, str) and _CHECKPOINT.fullmatch(path) is not None


def check_checkpoint(path: str) -> str:
    """Return `path` if it is a checkpoint's: checkpoints/<stage>/step_<number>. Raises RefusedNameError."""
    if not is_checkpoint(path):
        raise RefusedNameError(str(path), "outside of checkpoints/<stage>/step_<number>")
    return path


def own_files(mirror: Path) -> tuple[str, ...]:
    """Return the files of a mirror that neither a pull nor a launch put there: its user did."""
    found = []
    for folder, _, names in os.walk(mirror):
        for name in names:
            relative = Path(folder, name).relative_to(mirror).as_posix()
            of_host = _OTHER_HOST.sub("", relative)
            if not may_be_pulled(of_host) and _PUT_HERE.fullmatch(of_host) is None:
                found.append(relative)
    return tuple(sorted(found))


def make_mirror(path: Path) -> None:
    """Make the mirror's directory: for this user alone, and ignored by git wherever it is.

    Results are not code, and would otherwise be sent with the next run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(DIRECTORY_MODE)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(DIRECTORY_MODE)
    if not os.path.lexists(path / ".gitignore"):
        replace(path, ".gitignore", b"*\n")


@contextlib.contextmanager
def directory(root: Path, parts: Sequence[str], *, create: bool = True) -> Iterator[int]:
    """Yield a descriptor of the directory `root`/`parts`. Only `root` itself may be reached over links.

    Raises RefusedNameError where something else than a directory is in the way.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, DIRECTORY_MODE, dir_fd=descriptor)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise RefusedNameError(
                "/".join(parts), f"which is a link or not a directory in {root}"
            ) from None
        raise _named(error, root.joinpath(*parts)) from None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def plain_file(root: Path, name: str, flags: int) -> Iterator[int]:
    """Yield a descriptor of the plain file `root`/`name`. Raises RefusedNameError for a link, a directory, a pipe."""
    *parts, last = PurePosixPath(name).parts
    create = bool(flags & os.O_CREAT)
    with directory(root, parts, create=create) as parent:
        try:
            descriptor = open_plain(last, flags | os.O_NOFOLLOW, MODE, dir_fd=parent)
        except OSError as error:
            if isinstance(error, NotPlainFileError) or error.errno == errno.ELOOP:
                raise RefusedNameError(name, f"which is not a plain file in {root}") from None
            raise _named(error, root / name) from None
    try:
        yield descriptor
    except OSError as error:
        raise _named(error, root / name) from None
    finally:
        os.close(descriptor)


def size_of(root: Path, name: str) -> int | None:
    """Return the bytes of the plain file `root`/`name`; None if there is none."""
    try:
        with plain_file(root, name, os.O_RDONLY) as descriptor:
            return os.fstat(descriptor).st_size
    except (FileNotFoundError, RefusedNameError):
        return None


@contextlib.contextmanager
def reading(root: Path, name: str) -> Iterator[IO[bytes] | None]:
    """Yield the plain file `root`/`name`, open for reading; None if there is none."""
    try:
        with (
            plain_file(root, name, os.O_RDONLY) as descriptor,
            os.fdopen(os.dup(descriptor), "rb") as stream,
        ):
            yield stream
    except (FileNotFoundError, RefusedNameError):
        yield None


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def replace(root: Path, name: str, data: bytes) -> None:
    """Put `data` at `root`/`name` as a whole: readers see the old file or the new one."""
    *parts, last = PurePosixPath(name).parts
    temporary = f".{last[:100]}.{os.getpid()}.tmp"
    with directory(root, parts) as parent:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)
            descriptor = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, MODE, dir_fd=parent
            )
            try:
                write_at(descriptor, data, 0)
            finally:
                os.close(descriptor)
            os.replace(temporary, last, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            if error.errno == errno.EISDIR:
                raise RefusedNameError(name, f"which is a directory in {root}") from None
            raise _named(error, root / name) from None


def admit(staged: Path, root: Path) -> list[str]:
    """Move the pulled files under `staged` to their names under `root`; what was not: every other name there."""
    refused = []
    for folder, folders, files in os.walk(staged):  # does not enter links
        for name in files + [
            name for name in folders if os.path.islink(os.path.join(folder, name))
        ]:
            path = Path(folder, name)
            relative = path.relative_to(staged).as_posix()
            if not may_be_pulled(relative) or not stat.S_ISREG(path.lstat().st_mode):
                refused.append(relative)
                continue
            *parts, last = PurePosixPath(relative).parts
            try:
                with directory(root, parts) as parent:
                    os.replace(path, last, dst_dir_fd=parent)
            except (RefusedNameError, IsADirectoryError):
                refused.append(relative)
    return refused


def remove_tree(path: Path) -> None:
    """Remove what is at `path`: a tree, or the link itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _named(error: OSError, path: Path) -> OSError:
    """Return the same error with its path: the system tells it only for calls that took one."""
    if not isinstance(error.filename, str) or not os.path.isabs(error.filename):
        error.filename = str(path)
    return error


def write_new(file: Path, text: str) -> None:
    """Create `file` with all of `text`. Raises FileExistsError where it is there already."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    write_text_atomic(temporary, text, mode=0o600)
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise
    except OSError:
        # a file system without hard links (exFAT, some network and container file systems)
        # the name is ours from here on
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            temporary.replace(file)
        except BaseException:
            file.unlink(missing_ok=True)
            raise
    finally:
        temporary.unlink(missing_ok=True)
