"""The code that reaches a host: exactly git's files as they are in the working tree, with real git and real rsync."""

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollouts.remote.errors import DeployError
from rollouts.remote.git import list_files
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.package import CLONE_FILES
from rollouts.remote.repository import find_repository, read_code
from rollouts.remote.run.sync_code import CodePlace, sync_code
from tests.example_config import example_config, replace_at
from tests.remote.hosts import WAIT_S, Host, Laptop, git, write_config


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    directory = tmp_path / "it's a repository"
    directory.mkdir()
    git(directory, "init", "-q")
    (directory / ".gitignore").write_text("ignored*\n/dataset/*\n*.bin\n!kept.bin\n")
    (directory / "pyproject.toml").write_text(
        "[project.optional-dependencies]\ntrain=['torch']\nwandb=['wandb']\nmath=['math']\n"
    )
    (directory / "tracked.txt").write_text("one\n")
    for name in CLONE_FILES[1:]:  # by these it is a clone of rollouts
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_text("")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "first")
    return directory


def send(repository: Path, home: Path, run_id: str) -> Path:
    """Sync as a deploy does, over the local transport; the tree."""
    run_path = home / "runs" / run_id
    sync_code(
        LocalTransport(),
        CodePlace(home=str(home), run_path=str(run_path), project=repository.name),
        root=repository,
        files=tuple(list_files(repository)),
        timeout_s=WAIT_S,
    )
    return run_path / "code" / "tree"


def contents(tree: Path) -> dict[str, bytes | str]:
    """Every file and link below `tree`, but git's own."""
    found: dict[str, bytes | str] = {}
    for path in tree.rglob("*"):
        name = path.relative_to(tree).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and not name.startswith(".git/"):
            found[name] = path.read_bytes()
    return found


NAMES = [
    "a b.txt",
    "line\nbreak.txt",
    "ünïcode-日本.txt",
    "#comment.txt",
    ";comment.txt",
    "-dash.txt",
    "*.txt",
    "'quote\".txt",
    "$HOME.txt",
    "back\\slash.txt",
    "pkg/utils/dataset/loader.py",
    "deep/er/and/deeper.txt",
    "host:colon.txt",
]


def test_every_name_arrives(repository: Path, tmp_path: Path) -> None:
    """Goal: names that trip shells, rsync's filters and its comments arrive, tracked or not; ignored ones do not.

    Red without "./" before each name (#comment.txt is dropped), and with rsync's own filter in place of git's.
    """
    for name in NAMES:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(name)
    for name in ("ignored.txt", "dataset/big.txt", "weights.bin"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("not for the host")
    (repository / "kept.bin").write_bytes(b"\x00\xff")
    git(repository, "add", "a b.txt", "#comment.txt")
    tree = send(repository, tmp_path / "home", "r")
    here = {
        n: c
        for n, c in contents(repository).items()
        if n not in ("ignored.txt", "dataset/big.txt", "weights.bin")
    }
    assert contents(tree) == here and set(NAMES) | {"kept.bin"} <= set(here)
    assert not (tree / ".git").exists()


@pytest.mark.parametrize(
    "name", ["RSYNC_ICONV=utf-8,utf-16", "RSYNC_MAX_ALLOC=1", "RSYNC_CHECKSUM_LIST=none"]
)
def test_what_is_set_for_a_user_s_own_rsync(
    name: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: variables that change what rsync does, set for the user's own copies, do not act on ours. Red with the
    whole environment handed on: names in another encoding, no memory, no checksum in common."""
    variable, _, value = name.partition("=")
    monkeypatch.setenv(variable, value)
    (repository / "é.txt").write_text("x")
    tree = send(repository, tmp_path / "home", "r")
    assert contents(tree) == contents(repository)


def test_a_name_that_is_not_text(repository: Path, tmp_path: Path) -> None:
    """Goal: a file name that is not UTF-8 arrives. Red with names decoded strictly."""
    (Path(os.fsdecode(os.fsencode(repository) + b"/latin-\xe9.txt"))).write_text("x")
    assert os.fsencode("latin-\udce9.txt") in os.listdir(
        os.fsencode(send(repository, tmp_path / "home", "r"))
    )


def test_links_and_modes(repository: Path, tmp_path: Path) -> None:
    """Goal: symlinks stay links (dangling too), executables stay executable. Red without -l, without -p."""
    (repository / "link").symlink_to("tracked.txt")
    (repository / "dangling").symlink_to("no/such")
    (repository / "directory-link").symlink_to(".")
    script = repository / "run.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    tree = send(repository, tmp_path / "home", "r")
    assert (
        os.readlink(tree / "link") == "tracked.txt" and os.readlink(tree / "dangling") == "no/such"
    )
    assert (tree / "directory-link").is_symlink() and (
        tree / "run.sh"
    ).stat().st_mode & stat.S_IXUSR


def test_uncommitted_changes_and_deletions(repository: Path, tmp_path: Path) -> None:
    """Goal: the working tree is what runs: changed, staged, new, deleted, renamed. Red with `git archive HEAD`."""
    home = tmp_path / "home"
    (repository / "second.txt").write_text("2")
    (repository / "gone.txt").write_text("3")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "second")
    first = send(repository, home, "r1")
    (repository / "tracked.txt").write_text("changed\n")
    (repository / "gone.txt").unlink()
    git(repository, "mv", "second.txt", "renamed.txt")
    second = send(repository, home, "r2")
    assert contents(second) == contents(repository)
    assert {"tracked.txt", "renamed.txt"} <= set(contents(second)) and "gone.txt" not in contents(
        second
    )
    assert (first / "tracked.txt").read_text() == "one\n", "the earlier run's code stays as it was"
    unchanged = [(tree / "pyproject.toml").stat().st_ino for tree in (first, second)]
    assert unchanged[0] == unchanged[1], "unchanged files are linked, not sent"
    assert (home / "code" / repository.name).resolve() == second.resolve()


def test_a_finished_tree_is_left_alone(repository: Path, tmp_path: Path) -> None:
    """Goal: a second sync of the same run changes nothing; an interrupted one is begun anew.

    Red with rsync straight into code/tree.
    """
    home = tmp_path / "home"
    leftover = home / "runs/r/code/.tree-0badf00d"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("")
    tree = send(repository, home, "r")
    assert "half" not in contents(tree) and not leftover.exists()
    (repository / "tracked.txt").write_text("later\n")
    assert (send(repository, home, "r") / "tracked.txt").read_text() == "one\n"
    assert sorted(path.name for path in (home / "runs/r/code").iterdir()) == ["tree"]


def test_submodules_and_nested_repositories(repository: Path, tmp_path: Path) -> None:
    """Goal: a submodule's files go along, a stray clone's do not break it. Red without --recurse-submodules."""
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    (other / "inner.txt").write_text("inner")
    git(other, "add", "-A")
    git(other, "commit", "-qm", "x")
    git(
        repository,
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        str(other),
        "sub",
    )
    shutil.copytree(other, repository / "stray")
    tree = send(repository, tmp_path / "home", "r")
    assert (tree / "sub/inner.txt").read_text() == "inner" and not (tree / "stray").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"changed\n",
        b"caf\xe9 in latin-1\n",
        b"\x00binary\xff\n",
        "日本\r\n".encode(),
        b"no newline at end",
    ],
)
def test_the_recorded_diff_brings_the_tree_back(
    text: bytes, repository: Path, tmp_path: Path
) -> None:
    """Goal: commit + dirty.diff give the working tree again, whatever the bytes. Red without --binary."""
    (repository / "tracked.txt").write_bytes(text)
    (repository / "staged.bin").write_bytes(bytes(range(256)))
    git(repository, "add", "-f", "staged.bin")
    record = read_code(repository, config()).record()
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(repository), str(clone))
    git(clone, "checkout", "-q", record["code/commit.txt"].strip())
    (tmp_path / "dirty.diff").write_text(record["code/dirty.diff"], encoding="utf-8", newline="")
    git(clone, "apply", str(tmp_path / "dirty.diff"))
    assert (clone / "tracked.txt").read_bytes() == text
    assert (clone / "staged.bin").read_bytes() == bytes(range(256))


def config(**changes: object):  # type: ignore[no-untyped-def]  # a Config
    made = replace_at(example_config(), "host.constraints_file", None)
    for path, value in changes.items():
        made = replace_at(made, path.replace("__", "."), value)
    return made


def test_what_a_plan_learns_of_the_repository(repository: Path) -> None:
    """Goal: counts, requirements and which named paths are sent. Red with wandb always in, and with None as reward."""
    (repository / "tracked.txt").write_text("x")
    (repository / "new.txt").write_text("x")
    (repository / "ignored-data").mkdir()
    code = read_code(repository, config(model__name="ignored-data"))
    assert code.changed == 2 and code.requirements == ("torch",) and code.constraints == ""
    assert (
        code.named["ignored-data"] == "not sent"
        and code.named["configs/data/letters/test.jsonl"] == "missing"
    )
    assert (
        read_code(repository, config(model__name="./tracked.txt")).named["./tracked.txt"] == "sent"
    )
    wandb = read_code(repository, config(output__use_wandb=True, output__wandb_project="p"))
    assert wandb.requirements == ("torch",)  # in an environment of its own
    assert wandb.tracker_requirements == {"wandb": ("wandb",)}
    math = read_code(repository, config(rl__reward__fn="rollouts.training.rewards.math_verify"))
    assert math.requirements == ("torch", "math")
    assert read_code(repository, config(rl__reward=None)).requirements == ("torch",)
    assert read_code(repository, config(host__constraints_file="no.txt")).constraints is None


def test_before_the_first_commit(tmp_path: Path) -> None:
    """Goal: a repository without a commit can run. Red with rev-parse's failure passed on."""
    git(tmp_path, "init", "-q")
    (tmp_path / "pyproject.toml").write_text("[project.optional-dependencies]\ntrain=[]\n")
    code = read_code(tmp_path, config())
    assert code.files == ("pyproject.toml",) and code.commit == "" and code.dirty_diff == ""


def test_no_repository(tmp_path: Path, repository: Path) -> None:
    """Goal: outside of git the fix is said. Red with git's own words."""
    with pytest.raises(DeployError, match="not in a git repository"):
        find_repository(tmp_path)
    assert find_repository(repository) == repository


@contextlib.contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk(laptop: Laptop, make_host: Callable[..., Host], tmp_path: Path) -> None:
    """Goal: one clear message when the host's disk fills while the code is sent; nothing runs.

    Red with rsync's own dozen lines.
    """
    (laptop.project / "big.dat").write_bytes(os.urandom(3_000_000))
    with small_disk(tmp_path / "small", "1m") as disk:
        host = make_host(home=disk / "home")
        config = str(write_config(laptop.project, host__disk_free_gib_min=0.0))
        done = laptop.deploy(config, "--remote", host.target, "--run-id", "full")
        assert done.returncode == 2, done.stdout + done.stderr
        assert (
            f"error: {host.target}: its disk is full." in done.stderr
            and "ROLLOUTS_HOME" in done.stderr
        )
        assert done.stderr.endswith("Nothing was started.\n")
        assert not (host.run_path("full") / "status.json").exists()
        too_small = laptop.deploy(str(write_config(laptop.project, "two")), "--remote", host.target)
        assert too_small.returncode == 2 and "GiB of disk left" in too_small.stderr
