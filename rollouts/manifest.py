"""The manifest of a finished directory: every file with its size and SHA-256. Standard library only.

Written last by whoever completes a checkpoint, checked by whoever uses or copies it: a directory without a manifest,
or one that disagrees with it, is not a checkpoint.
"""

import hashlib
import json
import os
import stat
from pathlib import Path

MANIFEST_FILE = "manifest.json"


def write_manifest(directory: Path) -> Path:
    """List every file under `directory` in `manifest.json` there, and return that file's path."""
    manifest = directory / MANIFEST_FILE
    files = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != manifest
    }
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    return manifest


def manifest_problems(directory: Path) -> tuple[str, ...]:
    """Why `directory` is not what its manifest says; empty when it is. A missing manifest is a problem.

    Links, devices and files that it does not list are problems too: a manifest vouches for all that is there.
    """
    manifest = directory / MANIFEST_FILE
    try:
        files = read_manifest(manifest)
        present = plain_files(directory)
    except FileNotFoundError:
        return (f"{manifest}: missing, so {directory.name} was never completed",)
    except ValueError as error:
        return (str(error),)
    found = [f"{directory / name}: the manifest does not list it" for name in present if name not in files]
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
    """{name: (size, sha256)}. Raises FileNotFoundError, or ValueError for no manifest, or one that leads outside."""
    if manifest.is_symlink():
        raise ValueError(f"{manifest}: a link, not a manifest")
    try:
        files = json.loads(manifest.read_bytes())["files"]
        listed = {str(name): (int(item["size"]), str(item["sha256"])) for name, item in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{manifest}: not a manifest: {error!r}") from None
    for name in listed:
        parts = name.split("/")
        if name == MANIFEST_FILE or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{manifest}: names {name!r}, which is no file inside of it")
    return listed


def plain_files(directory: Path) -> set[str]:
    """Every file under `directory` but its manifest. Raises ValueError for a link, or anything else that is no file."""
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
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
