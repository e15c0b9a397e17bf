"""The git repository whose code runs: which files go to the host, and the record of what they were."""

import os
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base_config import Config
from rollouts.remote.errors import DeployError

Locality = Literal["sent", "not sent", "missing"]


@dataclass(frozen=True, kw_only=True)
class Code:
    """What would be sent, and what the plan must know about it."""

    root: Path
    project: str  # the repository's directory name
    files: tuple[str, ...]  # git's files with uncommitted changes and untracked ones, as in the working tree
    changed: int  # of them, how many differ from the commit
    size_bytes: int
    commit: str  # "" before the first commit
    dirty_diff: str  # git diff --binary HEAD
    requirements: tuple[str, ...]  # of the trainer's environment
    constraints: str | None  # text of host.constraints_file; None: it is not there
    engine_requirements: str | None  # text of engine.requirements_file, "" where none is named; None: it is not there
    named: dict[str, Locality]  # relative paths that the config names: are they among the files?

    def record(self) -> dict[str, str]:
        """The files of the run directory that say what code ran."""
        return {
            "code/commit.txt": f"{self.commit}\n",
            "code/dirty.diff": self.dirty_diff,
            "code/constraints.txt": self.constraints or "",
            "code/engine_requirements.txt": self.engine_requirements or "",
        }


def find_repository(start: Path) -> Path:
    """The root of the git repository around `start`, checked to be one that a host can run."""
    done = _git(start, "rev-parse", "--show-toplevel", check=False)
    if done.returncode != 0:
        raise DeployError(
            f"{start} is not in a git repository.",
            needed="the repository to run: exactly git's files go to the host, with your uncommitted changes",
            fix="cd into your clone of rollouts, or `git init` there",
        )
    root = Path(os.fsdecode(done.stdout[:-1]))
    if not (root / "rollouts" / "run_dir.py").is_file():
        raise DeployError(
            f"{root} is a git repository without rollouts/.",
            needed="the rollouts repository: its worker code runs on the host",
            fix="cd into your clone of rollouts; a config may lie anywhere",
        )
    return root


def read_code(root: Path, config: Config) -> Code:
    """Everything about the repository at `root` that a plan needs."""
    files = tuple(list_files(root))
    head = _git(root, "rev-parse", "--verify", "-q", "HEAD", check=False).stdout.decode().strip()
    status = _git(root, "status", "--porcelain=v1", "-z", "--untracked-files=all").stdout
    pins = config.host.constraints_file
    lock = config.engine.requirements_file if config.engine and config.uses_engine else None
    return Code(
        root=root,
        project=root.name,
        files=files,
        changed=_count_changed(status),
        size_bytes=sum(os.lstat(root / file).st_size for file in files),
        commit=head,
        dirty_diff=_dirty_diff(root) if head else "",
        requirements=tuple(_requirements(root, _extras(config))),
        constraints="" if pins is None else _text_or_none(root / pins, "host.constraints_file"),
        engine_requirements="" if lock is None else _text_or_none(root / lock, "engine.requirements_file"),
        named={name: _locality(root, name, files) for name in named_paths(config) if not os.path.isabs(name)},
    )


def list_files(root: Path) -> list[str]:
    """git's files as they are in the working tree: tracked (submodules' too) or untracked, not ignored, not deleted."""
    tracked = _git(root, "ls-files", "-z", "--cached", "--recurse-submodules").stdout
    untracked = _git(root, "ls-files", "-z", "--others", "--exclude-standard").stdout
    names = {os.fsdecode(name) for name in (tracked + untracked).split(b"\0") if name}
    # An untracked repository inside this one is listed as "dir/": its files are not git's here.
    return sorted(n for n in names if not n.endswith("/") and os.path.lexists(root / n) and not _is_gitlink(root / n))


def named_paths(config: Config) -> list[str]:
    """The model and data names of a config: hub ids, or paths; a replay's rollouts.jsonl too."""
    data = config.data
    specs = [*data.sft_mixture, *data.rl_mixture, *data.eval_mixture]
    replayed = [config.rl.source] if config.rl and "rl" in config.stages and not config.uses_engine else []
    return list(dict.fromkeys([config.model.name, *(spec.name for spec in specs), *replayed]))


def _is_gitlink(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _locality(root: Path, name: str, files: tuple[str, ...]) -> Locality:
    prefix = os.path.normpath(name)
    if any(file == prefix or file.startswith(prefix + "/") for file in files):
        return "sent"
    return "not sent" if (root / name).exists() else "missing"


def _count_changed(status: bytes) -> int:
    """Entries of `git status --porcelain -z`; a rename's second entry, its old name, is not one."""
    count, entries = 0, iter(entry for entry in status.split(b"\0") if entry)
    for entry in entries:
        count += 1
        if b"R" in entry[:2] or b"C" in entry[:2]:
            next(entries, None)
    return count


def _dirty_diff(root: Path) -> str:
    """Uncommitted changes as text that `git apply` takes. Binary files stand in it encoded.

    A text file that is not UTF-8 would not survive as JSON: then every file is treated as binary.
    """
    command = ("diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    diff = _git(root, *command).stdout
    try:
        return diff.decode()
    except UnicodeDecodeError:
        attributes = root / ".git" / "rollouts-attributes"
        attributes = Path(os.fsdecode(_git(root, "rev-parse", "--absolute-git-dir").stdout[:-1])) / attributes.name
        attributes.write_text("* -diff\n")
        try:
            diff = _git(root, "-c", f"core.attributesFile={attributes}", *command).stdout
        finally:
            attributes.unlink()
        return diff.decode(errors="backslashreplace")


def _extras(config: Config) -> list[str]:
    """What this config's trainer needs of pyproject.toml's extras."""
    wanted = {
        "train": True,
        "lora": config.model.lora is not None,
        "math": config.rl is not None and (config.rl.reward_fn or "").endswith(".math_verify"),
        "wandb": config.output.use_wandb,
    }
    return [name for name, needed in wanted.items() if needed]


def _requirements(root: Path, names: Sequence[str]) -> list[str]:
    file = root / "pyproject.toml"
    try:
        extras: dict[str, Any] = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
        return [requirement for name in names for requirement in extras[name]]
    except FileNotFoundError:
        raise DeployError(f"{file}: missing.", needed="its extra `train`, the trainer's requirements") from None
    except tomllib.TOMLDecodeError as error:
        raise DeployError(f"{file}: not TOML: {error}", fix="correct that file") from None
    except KeyError as error:
        raise DeployError(
            f"{file}: no {error} in project.optional-dependencies.",
            needed=f"the extras {', '.join(names)}: what this config's trainer environment holds",
        ) from None


def _text_or_none(file: Path, field: str) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"{file}: cannot be read: {error}", fix=f"correct {field}") from None


def _git(where: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    try:
        done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise DeployError("git is not installed on this machine.", fix="apt-get install git") from None
    if check and done.returncode != 0:
        raise DeployError(
            f"git {' '.join(arguments[:2])} failed in {where}.", found=done.stderr.decode(errors="replace").strip()
        )
    return done
