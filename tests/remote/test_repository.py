"""What git tells of the repository, and what it does not tell unless asked: submodules, overlooked files, settings."""

import os
import subprocess
from pathlib import Path

import pytest

from rollouts.remote.errors import DeployError
from rollouts.remote.git import list_files
from rollouts.remote.repository import find_repository, read_code
from tests.remote.hosts import git
from tests.remote.test_sync_code import config
from tests.remote.test_sync_content import make_repository


@pytest.fixture
def with_submodule(tmp_path: Path) -> Path:
    inner = make_repository(tmp_path / "other", {"inner.txt": "inner\n", "kept.txt": "kept\n"})
    repository = make_repository(tmp_path / "project", {"outer.txt": "outer\n"})
    git(
        repository,
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        str(inner),
        "libs/sub",
    )
    git(repository, "commit", "-qm", "submodule")
    return repository


def test_a_submodule_s_changes_and_new_files(with_submodule: Path, tmp_path: Path) -> None:
    """Goal: untracked files of a submodule are sent, its changes are in dirty.diff, so that commit and diff give the
    tree again, and the plan says so. Red with git's own listing: new files were left behind without a word."""
    sub = with_submodule / "libs/sub"
    (sub / "inner.txt").write_text("changed inside\n")
    (sub / "new.py").write_text("x = 1\n")
    (sub / ".gitignore").write_text("ignored.txt\n")
    (sub / "ignored.txt").write_text("")
    (with_submodule / "outer.txt").write_text("changed outside\n")
    assert {"libs/sub/new.py", "libs/sub/inner.txt"} <= set(list_files(with_submodule))
    assert "libs/sub/ignored.txt" not in list_files(with_submodule)
    code = read_code(with_submodule, config())
    assert "libs/sub/new.py" in code.untracked
    (note,) = (note for note in code.notes if "libs/sub" in note)
    assert "3 uncommitted or untracked files" in note and "dirty.diff" in note
    clone, file = tmp_path / "clone", tmp_path / "dirty.diff"
    options = ("-c", "protocol.file.allow=always", "clone", "-q", "--recurse-submodules")
    git(tmp_path, *options, str(with_submodule), str(clone))
    file.write_text(code.record()["code/dirty.diff"])
    git(clone, "apply", str(file))
    assert (clone / "libs/sub/inner.txt").read_text() == "changed inside\n"
    assert (clone / "outer.txt").read_text() == "changed outside\n"


def test_submodules_that_are_elsewhere(with_submodule: Path, tmp_path: Path) -> None:
    """Goal: a submodule that is not checked out, one at another commit, a stray clone: all said. Red without notes."""
    sub = with_submodule / "libs/sub"
    git(sub, "commit", "-q", "--allow-empty", "-m", "further")
    make_repository(with_submodule / "stray", {"x.txt": "x"})
    notes = "\n".join(read_code(with_submodule, config()).notes)
    assert (
        "libs/sub has another commit checked out" in notes
        and "stray/ is a separate git repository" in notes
    )
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(with_submodule), str(clone))
    code = read_code(clone, config())
    assert any("libs/sub is not checked out" in warning for warning in code.warnings)
    assert not any(file.startswith("libs/sub") for file in code.files)


def test_files_that_git_overlooks(tmp_path: Path) -> None:
    """Goal: changes that git was told to overlook are sent, and the plan says that the diff lacks them; files left
    out of a sparse checkout are said. Red without the note: commit and diff told of code that did not run."""
    repository = make_repository(tmp_path / "p", {"silent.py": "1", "absent.py": "1"})
    git(repository, "update-index", "--assume-unchanged", "silent.py")
    git(repository, "update-index", "--skip-worktree", "absent.py")
    (repository / "silent.py").write_text("2")
    (repository / "absent.py").unlink()
    code = read_code(repository, config())
    notes = "\n".join(code.notes)
    assert (
        "overlooks changes of silent.py" in notes and "absent.py not in the working tree" in notes
    )
    assert code.files == ("pyproject.toml", "silent.py")


@pytest.mark.parametrize(
    "settings",
    [
        {"diff.noprefix": "true"},
        {"diff.mnemonicPrefix": "true", "diff.context": "0"},
        {"color.ui": "always", "diff.external": "false"},
        {"diff.submodule": "log", "diff.ignoreSubmodules": "none", "diff.renames": "copies"},
        {"core.quotePath": "false", "diff.interHunkContext": "5", "diff.srcPrefix": "x/"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_diff_does_not_depend_on_settings(
    settings: dict[str, str], with_submodule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: dirty.diff applies whatever the user's git is set to, and run from a hook, whose variables name another
    repository. Red with diff.noprefix obeyed."""
    for name, value in settings.items():
        git(with_submodule, "config", name, value)
        git(with_submodule / "libs/sub", "config", name, value)
    lines = "".join(f"line {number}\n" for number in range(30))
    (with_submodule / "outer.txt").write_text(lines)
    (with_submodule / "libs/sub/inner.txt").write_text(lines)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "nowhere"))
    code = read_code(with_submodule, config())
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    clone = tmp_path / "clone"
    options = ("-c", "protocol.file.allow=always", "clone", "-q", "--recurse-submodules")
    git(tmp_path, *options, str(with_submodule), str(clone))
    subprocess.run(["git", "apply"], cwd=clone, input=code.dirty_diff.encode(), check=True)
    assert (clone / "outer.txt").read_text() == lines == (clone / "libs/sub/inner.txt").read_text()


def test_the_record_is_of_one_state(tmp_path: Path) -> None:
    """Goal: files that change between the diff and the digests end it; .git is only read. Red with the diff kept from
    before, and with the attributes written into .git."""
    repository = make_repository(tmp_path / "p", {"a.txt": "1"})
    (repository / "a.txt").write_bytes(b"caf\xe9\n")
    before = sorted(path.name for path in (repository / ".git").iterdir())
    os.chmod(repository / ".git", 0o500)
    code = read_code(repository, config())
    os.chmod(repository / ".git", 0o700)
    assert "GIT binary patch" in code.dirty_diff
    assert sorted(path.name for path in (repository / ".git").iterdir()) == before
    (repository / "a.txt").write_text("later")
    with pytest.raises(DeployError, match="files changed while the repository was read"):
        code.record()


def test_git_s_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: where git refuses a repository (another owner, a broken .git), its own words are shown, and no advice to
    make one. Red with every failure called "not in a git repository"."""
    repository = make_repository(tmp_path / "p", {"rollouts/run_dir/__init__.py": ""})
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("LANGUAGE", "de")
    with pytest.raises(DeployError, match="git cannot read the repository") as caught:
        find_repository(repository)
    assert "safe.directory" in caught.value.text() and "git init" not in caught.value.text()
    monkeypatch.delenv("GIT_TEST_ASSUME_DIFFERENT_OWNER")
    git(repository, "config", "core.repositoryformatversion", "99")
    with pytest.raises(DeployError) as caught:
        find_repository(repository)
    assert "repo version" in caught.value.text() and "git init" not in caught.value.text()
