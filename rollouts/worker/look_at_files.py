"""Tell what lies in a run's directory. Sent from the laptop by `deploy cp`. Standard library only.

python3 look_at_files.py RUN_PATH NAMES     NAMES is a JSON list of paths in RUN_PATH

Prints {"root": RUN_PATH without links, "found": [{name, kind, real, bytes, near, entries, count}]}: `near` is the
nearest directory that is there, `entries` are the first of the `count` names in it, those of directories with a "/".
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

ENTRIES_MAX = 1000


def look(root: Path, name: str) -> dict[str, Any]:
    path = root / name
    near = path
    while not os.path.isdir(near) and near != root:
        near = near.parent
    entries, count = _entries(near)
    return {
        "name": name,
        "kind": _kind(path),
        "real": os.path.realpath(path),
        "bytes": _bytes(path),
        "near": os.path.relpath(near, root),
        "entries": entries,
        "count": count,
    }


def _kind(path: Path) -> str:
    if os.path.isdir(path):
        return "directory"
    if os.path.isfile(path):
        return "file"
    if os.path.exists(path):
        return "special"
    return "dangling" if os.path.lexists(path) else "missing"


def _bytes(path: Path) -> int:
    """Return the size of a file; 0 for anything else, and for what is gone by now."""
    try:
        return os.path.getsize(path) if os.path.isfile(path) else 0
    except OSError:
        return 0


def _entries(directory: Path) -> tuple[list[dict[str, Any]], int]:
    """Return {name, bytes} of the first names in a directory, and how many there are.

    None where there is no directory, or it is another user's. A link in a circle is like a file without bytes.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return [], 0
    paths = {name: directory / name for name in names[:ENTRIES_MAX]}
    entries = [
        {"name": f"{name}/" if os.path.isdir(path) else name, "bytes": _bytes(path)}
        for name, path in paths.items()
    ]
    return entries, len(names)


def main() -> None:
    root = Path(sys.argv[1])
    found = [look(root, name) for name in json.loads(sys.argv[2])]
    print(json.dumps({"root": os.path.realpath(root), "found": found}))


if __name__ == "__main__":
    main()
