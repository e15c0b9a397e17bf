"""git, asked about the repository whose code runs: its files, its submodules, what is not committed."""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rollouts.remote.errors import DeployError

GIT_REPOSITORY_VARIABLES = {
    *(
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_PREFIX",
        "GIT_COMMON_DIR",
        "GIT_NAMESPACE",
    ),
    *(
        "GIT_OBJECT_DIRECTORY",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_EXTERNAL_DIFF",
        "GIT_DIFF_OPTS",
    ),
}


def _git_environment() -> dict[str, str]:
    """Return our variables without those of a git hook or alias, which name another repository; messages in English."""
    kept = {
        name: value for name, value in os.environ.items() if name not in GIT_REPOSITORY_VARIABLES
    }
    return {**kept, "LC_ALL": "C"}


def git(where: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    try:
        done = subprocess.run(
            ["git", "-C", str(where), *arguments],
            capture_output=True,
            check=False,
            env=_git_environment(),
        )
    except FileNotFoundError:
        raise DeployError(
            "git is not installed on this machine.", fix="apt-get install git"
        ) from None
    if check and done.returncode != 0:
        raise DeployError(
            f"git {' '.join(arguments[:2])} failed in {where}.",
            found=done.stderr.decode(errors="replace").strip(),
        )
    return done


def list_files(root: Path) -> list[str]:
    """List git's files in the working tree: tracked or untracked, not ignored, not deleted; submodules' too."""
    tracked = git(root, "ls-files", "-z", "--cached", "--recurse-submodules").stdout
    names = [*names_in(tracked), *list_untracked(root)]
    for submodule in submodules(root):
        names += [f"{submodule}/{name}" for name in list_untracked(root / submodule)]
    # An untracked repository inside this one is listed as "dir/": its files are not git's here.
    return sorted(
        {
            n
            for n in names
            if not n.endswith("/") and os.path.lexists(root / n) and not _is_gitlink(root / n)
        }
    )


def names_in(output: bytes) -> list[str]:
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def list_untracked(root: Path) -> list[str]:
    return names_in(git(root, "ls-files", "-z", "--others", "--exclude-standard").stdout)


def untracked_of(root: Path, files: Sequence[str]) -> list[str]:
    tracked = set(names_in(git(root, "ls-files", "-z", "--cached", "--recurse-submodules").stdout))
    return [file for file in files if file not in tracked]


def _gitlinks(root: Path) -> list[str]:
    """Return the submodules in the index, by paths from the repository's root; those inside of others too."""
    lines = names_in(git(root, "ls-files", "-z", "--stage").stdout)
    found = [line.partition("\t")[2] for line in lines if line.startswith("160000 ")]
    return [
        name
        for own in found
        for name in (own, *(f"{own}/{inner}" for inner in _inner_gitlinks(root / own)))
    ]


def _inner_gitlinks(directory: Path) -> list[str]:
    return _gitlinks(directory) if (directory / ".git").exists() else []


def submodules(root: Path) -> list[str]:
    """Return the submodules that are checked out."""
    return [name for name in _gitlinks(root) if (root / name / ".git").exists()]


def absent_submodules(root: Path) -> list[str]:
    present = submodules(root)
    return [name for name in _gitlinks(root) if name not in present]


def _is_gitlink(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def count_changed(status: bytes) -> int:
    """Count entries of `git status --porcelain -z`; a rename's second entry, its old name, does not count."""
    count, entries = 0, iter(entry for entry in status.split(b"\0") if entry)
    for entry in entries:
        count += 1
        if b"R" in entry[:2] or b"C" in entry[:2]:
            next(entries, None)
    return count


def read_diff(root: Path) -> str:
    """Return uncommitted changes as text that `git apply` takes, submodules' too. Binary files are encoded in it.

    A text file that is not UTF-8 would not survive as JSON: then every file is treated as binary.
    """
    # With a submodule's path in front, as if its files were the repository's own
    inner = [_diff(root / name, f"{name}/") for name in submodules(root)]
    return "".join([_diff(root, ""), *inner])


def _diff(root: Path, prefix: str) -> str:
    if not git(root, "rev-parse", "--verify", "-q", "HEAD", check=False).stdout:
        return ""
    # What a user's settings may say of diffs is set here: prefixes, context, how submodules are shown
    plain = (
        "--no-ext-diff",
        "--no-textconv",
        "--no-color",
        "-U3",
        "--submodule=short",
        "--ignore-submodules=dirty",
    )
    prefixes = (f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}")
    command = ("diff", "--binary", *plain, *prefixes, "HEAD")
    diff = git(root, *command).stdout
    try:
        return diff.decode()
    except UnicodeDecodeError:
        with tempfile.NamedTemporaryFile("w", suffix="-attributes") as attributes:
            attributes.write("* -diff\n")
            attributes.flush()
            diff = git(root, "-c", f"core.attributesFile={attributes.name}", *command).stdout
        return diff.decode(errors="backslashreplace")
