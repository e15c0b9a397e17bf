"""Manifests: the files of a directory with their SHA-256, so that content decides what it is. Standard library only.

A checkpoint's manifest is written last, and checked before the checkpoint is used or copied: a directory
without a manifest, or one that disagrees with it, is not a checkpoint.

A code tree's manifest has modes and links too. It is made here of the working tree and on the host of what lies there,
and the two are compared before a launch. Its source is sent to the host, so it imports nothing of ours.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import TypedDict

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 1 << 20
DIFFERENCES_MAX = 20  # names that a comparison lists


def write_manifest(directory: Path) -> Path:
    """List every file under `directory` in `manifest.json` there, and return that file's path."""
    manifest = directory / MANIFEST_FILE
    files = {
        file.relative_to(directory).as_posix(): {
            "size": file.stat().st_size,
            "sha256": sha256(file),
        }
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != manifest
    }
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    return manifest


def manifest_problems(directory: Path) -> tuple[str, ...]:
    """Return why `directory` is not what its manifest says; () if it is. A missing manifest is a problem.

    Links, devices and files that it does not list are problems too: a manifest vouches for all that is there.
    """
    manifest = directory / MANIFEST_FILE
    try:
        files = read_manifest(manifest)
        present = plain_files(directory)
    except FileNotFoundError:
        return (f"{manifest}: missing, so {directory.name} was never completed",)
    except (ValueError, OSError) as error:
        return (str(error),)
    found = [
        f"{directory / name}: the manifest does not list it"
        for name in present
        if name not in files
    ]
    for name, (size, digest) in files.items():
        file = directory / name
        if name not in present:
            found.append(f"{file}: missing")
        elif file.stat().st_size != size:
            found.append(f"{file}: {file.stat().st_size} bytes, the manifest says {size}")
        elif sha256(file) != digest:
            found.append(f"{file}: its bytes differ from the manifest's SHA-256")
    return tuple(found)


def read_manifest(manifest: Path) -> dict[str, tuple[int, str]]:
    """Return {name: (size, sha256)}. Raises FileNotFoundError, or ValueError if it is bad or leads outside."""
    if manifest.is_symlink():
        raise ValueError(f"{manifest}: a link, not a manifest")
    try:
        with _opened(manifest) as stream:
            files = json.loads(stream.read())["files"]
        listed = {
            str(name): (int(item["size"]), str(item["sha256"])) for name, item in files.items()
        }
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(f"{manifest}: not a manifest: {error!r}") from None
    for name in listed:
        parts = name.split("/")
        if name == MANIFEST_FILE or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{manifest}: names {name!r}, which is not a file inside of it")
    return listed


def plain_files(directory: Path) -> set[str]:
    """Return every file under `directory` but its manifest. Raises ValueError for a link, or any other non-file."""
    found = set()
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "no plain file"
                raise ValueError(f"{path}: {kind}; a checkpoint holds plain files alone")
            if stat.S_ISREG(mode):
                found.add(path.relative_to(directory).as_posix())
    return found - {MANIFEST_FILE}


def sha256(file: Path) -> str:
    """Return a file's digest. Raises OSError, also if another process has put a pipe or the like in its place."""
    digest = hashlib.sha256()
    with _opened(file) as stream:  # not hashlib.file_digest: a host's Python may be 3.10
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _opened(file: Path | bytes) -> BufferedReader:
    """Open it as plain_files.reading does, which this file, sent on its own, cannot import."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no plain file", os.fsdecode(file))
    return os.fdopen(descriptor, "rb")


# --- trees of code --------------------------------------------------------------------------------------------------


class TreeFile(TypedDict):
    """One file as git sees it: what else a file system knows of it (owner, times, group rights) is not code."""

    mode: str  # git's: 100644, 100755 where its owner may run it, 120000 for a link
    size: int
    sha256: str  # of its bytes; of where a link leads


Tree = dict[str, TreeFile]  # name, with / between folders; bytes that are not UTF-8 as surrogates


def tree_names(root: str | os.PathLike[str]) -> list[str]:
    """Return every file and link below `root`."""
    top, found = os.fsencode(root), []
    for directory, folders, files in os.walk(top):
        links = [name for name in folders if os.path.islink(os.path.join(directory, name))]
        found += [os.path.relpath(os.path.join(directory, name), top) for name in (*files, *links)]
    return sorted(name.decode(errors="surrogateescape") for name in found)


def read_tree(
    root: str | os.PathLike[str],
    names: Iterable[str],
    *,
    grown_from: Mapping[str, TreeFile] | None = None,
) -> Tree:
    """Hash `names` under `root`. Raises OSError for one that is gone or cannot be read.

    A file that only grew since `grown_from` was read (a log, say) counts as it was then.
    """
    earlier = grown_from or {}
    return {name: _tree_file(_path(root, name), earlier.get(name)) for name in names}


def _path(root: str | os.PathLike[str], name: str) -> bytes:
    return os.path.join(os.fsencode(root), name.encode(errors="surrogateescape"))


def _tree_file(path: bytes, earlier: TreeFile | None) -> TreeFile:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        leads_to = os.readlink(path)
        return {
            "mode": "120000",
            "size": len(leads_to),
            "sha256": hashlib.sha256(leads_to).hexdigest(),
        }
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "is neither a file nor a link", os.fsdecode(path))
    mode = "100755" if status.st_mode & stat.S_IXUSR else "100644"
    if (
        earlier is not None
        and earlier["mode"] == mode
        and _has_grown(path, status.st_size, earlier)
    ):
        return earlier
    return {"mode": mode, "size": status.st_size, "sha256": sha256(Path(os.fsdecode(path)))}


def _has_grown(path: bytes, size: int, earlier: TreeFile) -> bool:
    """Return whether the file begins with all that it was."""
    return (
        size > earlier["size"] > 0 and _sha256_of_start(path, earlier["size"]) == earlier["sha256"]
    )


def _sha256_of_start(path: bytes, size: int) -> str:
    total = hashlib.sha256()
    with _opened(path) as stream:
        while size > 0 and (data := stream.read(min(size, 1 << 20))):
            total.update(data)
            size -= len(data)
    return total.hexdigest()


def tree_digest(tree: Mapping[str, TreeFile]) -> str:
    """Return the SHA-256 of all "<mode> <sha256> <name>", each ended by a zero byte, sorted by the names' bytes."""
    rows = sorted((name.encode(errors="surrogateescape"), file) for name, file in tree.items())
    total = hashlib.sha256()
    for name, file in rows:
        total.update(f"{file['mode']} {file['sha256']} ".encode() + name + b"\0")
    return total.hexdigest()


def tree_differences(expected: Mapping[str, TreeFile], found: Mapping[str, TreeFile]) -> list[str]:
    """Return how `found` differs from `expected`: a line a file, the first ones by name."""
    lines = []
    for name in sorted(set(expected) | set(found)):
        one, other = expected.get(name), found.get(name)
        if other is None:
            lines.append(f"{name!r}: missing")
        elif one is None:
            lines.append(f"{name!r}: not expected")
        elif one["sha256"] != other["sha256"]:
            lines.append(f"{name!r}: other content, {other['size']} bytes; expected {one['size']}")
        elif one["mode"] != other["mode"]:
            lines.append(f"{name!r}: mode {other['mode']}; expected {one['mode']}")
    more = len(lines) - DIFFERENCES_MAX
    return [*lines[:DIFFERENCES_MAX], f"and {more} more"] if more > 0 else lines


def check_tree(root: str, expected: Tree, *, prune: bool) -> dict[str, str | list[str]]:
    """Return the digest of what is under `root`, and how it differs from `expected`.

    `prune`, for a tree that was just sent: files not expected go, and one that grew while it was sent is cut to what it
    was when it was hashed.
    """
    found = []
    for name in tree_names(root):
        if name in expected:
            found.append(name)
        elif prune:
            os.unlink(_path(root, name))
        elif "__pycache__" not in name.split("/"):  # Python's own, of an earlier try to launch
            found.append(name)
    if prune:
        for name in found:
            _cut_growth(_path(root, name), expected[name])
    tree = read_tree(root, found)
    return {"digest": tree_digest(tree), "differences": tree_differences(expected, tree)}


def _cut_growth(path: bytes, expected: TreeFile) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or not _has_grown(path, status.st_size, expected):
        return
    if status.st_nlink == 1:
        os.truncate(path, expected["size"])
        return
    temporary = path + b".cut"  # this one is a link to another tree's
    with _opened(path) as source, open(temporary, "wb") as target:
        target.write(source.read(expected["size"]))
    os.chmod(temporary, stat.S_IMODE(status.st_mode))
    os.replace(temporary, path)
