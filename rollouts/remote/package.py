"""The rollouts package that this program is part of: its files, its trainer's requirements, its locks.

From a repository of one's own the package goes to the host beside that repository. A clone of rollouts holds it.
"""

import difflib
import importlib.metadata
import json
import os
import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.config.checks.needs import PACKAGE_PREFIX
from rollouts.manifest import read_tree, tree_digest
from rollouts.remote.errors import DeployError, unreadable

NAME = "rollouts"
# What a repository holds that is a clone: the package itself, with what builds it. A folder of the name is not enough.
CLONE_FILES = ("pyproject.toml", "rollouts/run_dir/layout.py", "rollouts/worker/launch.py")
# Of the package's folders: the host needs no lock, a plan has its text; `deploy new` copies a model into the repository
LEFT_OUT = ("__pycache__", "requirements", "models")


@dataclass(frozen=True)
class Package:
    """The package's own files, as they go to the host."""

    root: Path  # of the folder `rollouts`: site-packages, or a clone that is installed as editable
    files: tuple[str, ...]  # "rollouts/run_dir/layout.py", …
    version: str

    def manifest(self) -> str:
        """Return the text of code/manifest-package.json. Raises DeployError for a file that cannot be read."""
        try:
            tree = read_tree(self.root, self.files)
        except OSError as error:
            raise unreadable(error) from None
        return (
            json.dumps(
                {"version": self.version, "digest": tree_digest(tree), "files": tree}, indent=1
            )
            + "\n"
        )


def is_clone(files: Collection[str]) -> bool:
    """Return whether a repository of these files is a clone of rollouts."""
    return set(CLONE_FILES) <= set(files)


def installed() -> Package:
    """Return the package that runs here."""
    root = folder().parent
    found = []
    for directory, folders, names in os.walk(folder()):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(directory, name))]
        assert not links, f"{directory}: {links} would not be sent"
        found += [
            os.path.relpath(os.path.join(directory, name), root)
            for name in names
            if not name.startswith(".")
        ]
    return Package(root, tuple(sorted(found)), _version())


def folder() -> Path:
    """Return the folder of the package that runs here."""
    return Path(__file__).resolve().parents[1]


def _version() -> str:
    """Return the version of the package that runs here."""
    try:
        return str(_project(folder().parent)["version"])
    except (OSError, ValueError, KeyError):
        return importlib.metadata.version(NAME)


def package_requirements(extras: Sequence[str]) -> list[str]:
    """Return what these extras require, of the package that runs here."""
    root = folder().parent
    if (root / "pyproject.toml").is_file():  # a clone
        return clone_requirements(root, extras)
    marked = [line.rpartition(";") for line in importlib.metadata.requires(NAME) or []]
    of_extra = {extra: re.compile(rf"""\s*extra == ['"]{extra}['"]\s*""") for extra in extras}
    return [
        line.strip()
        for extra in extras
        for line, _, marker in marked
        if of_extra[extra].fullmatch(marker)
    ]


def clone_requirements(root: Path, extras: Sequence[str]) -> list[str]:
    """Return what these extras require, as pyproject.toml of the clone at `root` has them. Raises DeployError."""
    file = root / "pyproject.toml"
    try:
        required: dict[str, Any] = _project(root)["optional-dependencies"]
        return [requirement for name in extras for requirement in required[name]]
    except FileNotFoundError:
        raise DeployError(
            f"{file}: missing.", needed="its extra `train`, the trainer's requirements"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise DeployError(f"{file}: not TOML: {error}", fix="correct that file") from None
    except KeyError as error:
        raise DeployError(
            f"{file}: no {error} in project.optional-dependencies.",
            needed=f"the extras {', '.join(extras)}: what this config's trainer environment holds",
        ) from None


def _project(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    return found


# --- locks and constraints ------------------------------------------------------------------------------------------


def named_file(root: Path, name: str) -> Path:
    """Return the file that a config names: of the package ("rollouts:requirements/…"), else of the repository."""
    return (
        folder() / name.removeprefix(PACKAGE_PREFIX)
        if name.startswith(PACKAGE_PREFIX)
        else root / name
    )


def package_file_hint(name: str) -> str:
    """Return the package's file that is most like `name`, as a config names it; "" where none is alike."""
    known = [
        f"{PACKAGE_PREFIX}requirements/{file.name}"
        for file in sorted((folder() / "requirements").glob("*.txt"))
    ]
    base = f"{PACKAGE_PREFIX}requirements/{name.rpartition('/')[2]}"
    near = difflib.get_close_matches(base, known, n=1, cutoff=0.7)
    return near[0] if near else ""
