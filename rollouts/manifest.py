"""The manifest of a finished directory: every file with its size and SHA-256. Standard library only.

Written last by whoever completes a checkpoint, checked by whoever uses or copies it: a directory without a manifest,
or one that disagrees with it, is not a checkpoint.
"""

import hashlib
import json
from pathlib import Path

MANIFEST_FILE = "manifest.json"


def write_manifest(directory: Path) -> Path:
    """List every file under `directory` in `manifest.json` there, and return that file's path."""
    files = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST_FILE
    }
    manifest = directory / MANIFEST_FILE
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n")
    return manifest


def manifest_problems(directory: Path) -> tuple[str, ...]:
    """Why `directory` is not what its manifest says; empty when it is. A missing manifest is a problem."""
    manifest = directory / MANIFEST_FILE
    try:
        files = json.loads(manifest.read_text())["files"]
    except FileNotFoundError:
        return (f"{manifest}: missing, so {directory.name} was never completed",)
    except (ValueError, KeyError, TypeError) as error:
        return (f"{manifest}: not a manifest: {error!r}",)
    found = []
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            found.append(f"{file}: missing")
        elif file.stat().st_size != expected["size"]:
            found.append(f"{file}: {file.stat().st_size} bytes, the manifest says {expected['size']}")
        elif _sha256(file) != expected["sha256"]:
            found.append(f"{file}: its bytes differ from the manifest's SHA-256")
    return tuple(found)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
