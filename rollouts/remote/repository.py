"""The git repository whose code runs: which files go to the host, and the record of what they were."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rollouts.config import Config
from rollouts.manifest import Tree, read_tree, tree_digest
from rollouts.plain_files import read_plain
from rollouts.remote.errors import DeployError, unreadable
from rollouts.remote.git import (
    absent_submodules,
    count_changed,
    git,
    list_files,
    list_untracked,
    names_in,
    read_diff,
    submodules,
    untracked_of,
)
from rollouts.remote.inputs import NO_INPUTS, Inputs, look_through, named_paths
from rollouts.remote.inputs.paths import PathState, SentFiles
from rollouts.remote.package import (
    CLONE_FILES,
    Package,
    clone_requirements,
    installed,
    is_clone,
    named_file,
    package_file_hint,
    package_requirements,
)
from rollouts.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class Code:
    """What would be sent, and what the plan must know about it."""

    root: Path
    project: str  # the repository's directory name
    # git's files with uncommitted changes and untracked ones, as in the working tree
    files: tuple[str, ...]
    changed: int  # of them, how many differ from the commit
    size_bytes: int
    commit: str  # "" before the first commit
    dirty_diff: str  # git diff --binary HEAD
    requirements: tuple[str, ...]  # of the trainer's environment, those of host.requirements last
    constraints: str | None  # text of host.constraints_file; None: it is not there
    # text of engine.requirements_file, "" where none is named; None: it is not there
    engine_requirements: str | None
    named: dict[str, PathState]  # relative paths that the config names: are they among the files?
    untracked: tuple[str, ...] = ()  # of the files, those that git does not track
    untracked_bytes: int = 0
    notes: tuple[str, ...] = ()  # what the record or the tree lacks, in words
    warnings: tuple[str, ...] = ()  # of it, what is seldom meant
    inputs: Inputs = NO_INPUTS  # what was found behind the names in the config
    # missing lock or constraints -> the package's like it
    near_files: dict[str, str] = field(default_factory=dict)
    # of the environment of each kind of tracker that the config has
    tracker_requirements: dict[str, tuple[str, ...]] = field(default_factory=dict)
    package: Package | None = (
        None  # rollouts itself, which is sent too; None: the repository is a clone of it
    )

    def record(self) -> dict[str, str]:
        """Return the files of the run directory that say what code ran. Raises DeployError if they change."""
        try:
            tree = read_tree(self.root, self.files)
        except OSError as error:
            raise unreadable(error) from None
        if self.commit and read_diff(self.root) != self.dirty_diff:
            raise DeployError(
                "files changed while the repository was read.",
                needed="a record that tells of one state of the code",
                fix="run the same command again",
            )
        return {
            "code/manifest.json": json.dumps({"digest": tree_digest(tree), "files": tree}, indent=1)
            + "\n",
            **({"code/manifest-package.json": self.package.manifest()} if self.package else {}),
            "code/commit.txt": f"{self.commit}\n",
            "code/dirty.diff": self.dirty_diff,
            "code/constraints.txt": self.constraints or "",
            "code/engine_requirements.txt": self.engine_requirements or "",
        }


def read_recorded_tree(run: RunDir, manifest: Path | None = None) -> Tree:
    """Return the code that a run was planned with, file by file; `manifest`: another list than code/manifest.json.

    Raises DeployError where its record has no such list.
    """
    manifest = manifest or run.code_manifest
    try:
        files: Tree = json.loads(read_plain(manifest))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeployError(
            f"{run.run_id}: what code it was planned with is not recorded here.",
            found=f"{manifest}: {error}",
            fix="start it anew: deploy CONFIG",
        ) from None
    return files


def find_repository(start: Path) -> Path:
    """Return the root of the git repository around `start`: what a host runs. Raises DeployError where git has none."""
    done = git(start, "rev-parse", "--show-toplevel", check=False)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode != 0 and "not a git repository" not in said:
        raise DeployError(
            f"git cannot read the repository at {start}.",
            found=said or f"exit code {done.returncode}",
            needed="the repository to run: exactly git's files go to the host, with your uncommitted changes",
            fix="what git says above, then run the same command again",
        )
    if done.returncode != 0:
        raise DeployError(
            f"{start} is not in a git repository.",
            found=said,
            needed="the repository to run: exactly git's files go to the host, with your uncommitted changes",
            fix="cd into the repository of your configs, rewards and data, or `git init` there",
        )
    return Path(os.fsdecode(done.stdout[:-1]))


def refuse_stray_config(root: Path, file: Path) -> None:
    """Raise DeployError for a config that is not of the repository at `root`, where that is one of the user's own.

    A saved config.json may lie anywhere: it spells out every field. So may a config, where a clone of rollouts runs.
    """
    place = file.parent.resolve() / file.name
    if file.suffix != ".py" or is_clone(
        names_in(git(root, "ls-files", "-zco", "--", *CLONE_FILES).stdout)
    ):
        return
    if not place.is_relative_to(root.resolve()):
        raise DeployError(
            f"{file} lies outside of the repository {root}.",
            needed="a config of the repository whose code is sent: its data and its rewards are looked up there",
            fix=f"cd into the repository that it belongs to, or move it into {root}",
        )
    if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
        raise DeployError(
            f"{file} is a link that leads out of the repository.",
            found=f"{file} -> {os.readlink(file)}",
            needed="a config whose text git lists: of a link it has the name alone",
            fix="put a copy in the link's place",
        )
    if git(root, "check-ignore", "-q", "--", str(place), check=False).returncode == 0:
        raise DeployError(
            f"git ignores {file}, so no record of the code would have it.",
            needed="a config that git lists",
            fix=f"remove it from .gitignore, or: git add -f {file}",
        )


def read_code(root: Path, config: Config) -> Code:
    """Return everything about the repository at `root` that a plan needs."""
    files = tuple(list_files(root))
    untracked = tuple(untracked_of(root, files))
    absent = absent_submodules(root)
    sent = SentFiles(root, files, absent=absent)
    package = None if is_clone(files) else installed()

    def required(extras: Sequence[str]) -> list[str]:
        return clone_requirements(root, extras) if package is None else package_requirements(extras)

    requirements = (*required(_extras(config)), *config.host.requirements)
    head = git(root, "rev-parse", "--verify", "-q", "HEAD", check=False).stdout.decode().strip()
    status = git(root, "status", "--porcelain=v1", "-z", "--untracked-files=all").stdout
    pins = config.host.constraints_file
    lock = config.engine.requirements_file if config.engine and config.uses_engine else None
    return Code(
        root=root,
        project=root.name,
        files=files,
        changed=count_changed(status),
        size_bytes=_size(root, files),
        commit=head,
        dirty_diff=read_diff(root) if head else "",
        requirements=requirements,
        constraints=""
        if pins is None
        else _text_or_none(named_file(root, pins), "host.constraints_file"),
        tracker_requirements={
            tracker.kind: tuple(required([tracker.kind])) for tracker in config.output.fed
        },
        engine_requirements=""
        if lock is None
        else _text_or_none(named_file(root, lock), "engine.requirements_file"),
        named={
            name: sent.locate(name).state for name in named_paths(config) if not os.path.isabs(name)
        },
        untracked=untracked,
        untracked_bytes=_size(root, untracked),
        notes=tuple(_submodule_notes(root)),
        warnings=tuple(_warnings(head, absent)),
        inputs=look_through(
            config, sent, requirements, SentFiles(package.root, package.files) if package else None
        ),
        near_files={name: package_file_hint(name) for name in (pins, lock) if name},
        package=package,
    )


def _size(root: Path, files: Sequence[str]) -> int:
    try:
        return sum(os.lstat(root / file).st_size for file in files)
    except OSError as error:
        raise unreadable(error) from None


def _warnings(commit: str, absent: Sequence[str]) -> Iterator[str]:
    if not commit:
        yield (
            "the repository has no commit yet: the code is sent, and code/manifest.json has its digests, but nothing"
            " here records its text (git add -A && git commit)"
        )
    for name in absent:
        fix = "git submodule update --init --recursive"
        yield f"the submodule {name} is not checked out: nothing of it is sent ({fix})"


def _submodule_notes(root: Path) -> list[str]:
    notes = []
    for name in submodules(root):
        status = git(root / name, "status", "--porcelain=v1", "-z", "--untracked-files=all").stdout
        recorded = git(root, "ls-files", "--stage", "--", name).stdout.split()[1:2]
        head = git(root / name, "rev-parse", "--verify", "-q", "HEAD", check=False).stdout.split()
        moved = bool(recorded) and recorded != head
        if moved or status:
            count = count_changed(status)
            what = [
                f"{count} uncommitted or untracked files" if count else "",
                "another commit checked out" if moved else "",
            ]
            notes.append(
                f"the submodule {name} has {' and '.join(filter(None, what))}: sent as it is;"
                " code/dirty.diff has the changes of its tracked files"
            )
    notes += _overlooked(root)
    stray = [name for name in list_untracked(root) if name.endswith("/")]
    notes += [
        f"{name} is a separate git repository, not a submodule: nothing of it is sent"
        for name in stray
    ]
    return notes


def _overlooked(root: Path) -> list[str]:
    """Return notes on files that git was told to overlook: their changes are sent, but are not in the diff."""
    tagged = [
        line.partition(" ")[::2] for line in names_in(git(root, "ls-files", "-z", "-v").stdout)
    ]
    silent = [
        name
        for tag, name in tagged
        if tag.islower() or (tag == "S" and os.path.lexists(root / name))
    ]
    absent = [name for tag, name in tagged if tag == "S" and not os.path.lexists(root / name)]
    notes = []
    if silent:
        notes.append(
            f"git overlooks changes of {_few(silent)} (assume-unchanged, skip-worktree): code/dirty.diff lacks them"
        )
    if absent:
        notes.append(f"a sparse checkout: {_few(absent)} not in the working tree, so not sent")
    return notes


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _extras(config: Config) -> list[str]:
    """Return what this config's trainer needs of pyproject.toml's extras."""
    wanted = {
        "train": True,
        "lora": config.model.lora is not None,
        "math": config.rl is not None and (config.rl.reward_fn or "").endswith(".math_verify"),
    }
    return [name for name, needed in wanted.items() if needed]


def _text_or_none(file: Path, field: str) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"{file}: cannot be read: {error}", fix=f"correct {field}") from None
