"""`deploy cp` of what runs hold besides plain files, and of what changes while it looks."""

import os
from pathlib import Path

import pytest

from rollouts.remote import copy_verb
from rollouts.remote.errors import DeployError
from rollouts.run_dir import RunDir
from rollouts.worker import look_at_files
from tests.remote.test_copy_verb import cp, run
from tests.remote.test_remove import home, make_run
from tests.remote.test_sync_code import small_disk

assert home and run  # fixtures


def refused(*words: str) -> str:
    """The error of a copy that copies nothing."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(DeployError) as caught:
        cp(*words)
    assert sorted(Path.cwd().rglob("*")) == before
    return caught.value.text(launching=False)


def test_links_that_lead_nowhere(run: RunDir) -> None:
    """Goal: beside a link in a circle and a dangling one all else is listed and copied; each of them, and a pipe, is
    named for what it is. Red with what `os.scandir` says of a circle: no answer from the host at all."""
    (run.path / "circle").symlink_to("circle")
    (run.path / "nowhere").symlink_to("none")
    os.mkfifo(run.path / "pipe")
    listed = {row["name"]: row["bytes"] for row in cp("mine:").document}
    assert listed.items() >= {"circle": 0, "nowhere": 0, "pipe": 0, "logs/": 0}.items()
    cp("mine:metrics.jsonl", ".")
    assert Path("metrics.jsonl").read_bytes() == run.metrics.read_bytes()
    for name in ("circle", "nowhere"):
        assert f"mine:{name} is a link to what is not there" in refused(f"mine:{name}", ".")
    assert "neither a file nor a directory" in refused("mine:pipe", ".")


def test_a_file_that_changed_within_a_second(run: RunDir) -> None:
    """Goal: what is there is compared by content: size and second alone do not tell a status of another step. Red with
    rsync's quick check: `is as mine:status already`, with the old step in it."""
    status = run.path / "status"
    for step in (12, 13):
        status.write_text(f"step {step}")
        os.utime(status, (1_700_000_000, 1_700_000_000))
        if step == 12:
            cp("mine:status", ".")
    assert "not the same as the run's" in refused("mine:status", ".")
    cp("mine:status", ".", force=True)
    assert Path("status").read_text() == "step 13"


def test_a_whole_run_has_its_own_name(run: RunDir, home: Path) -> None:
    """Goal: by tag, beginning or `last`, a whole run in a directory is called after itself: the next `last` does not
    come among its files. Red with the word that was typed."""
    cp("mi:", ".")
    cp("last:", "other")
    assert sorted(os.listdir()) == ["mine", "other"]


def test_directories_without_files(run: RunDir) -> None:
    """Goal: an empty folder, or one of links, is copied the first time and there already the next. Red with no file
    taken for nothing to do."""
    (run.path / "links").mkdir()
    (run.path / "links/x").symlink_to("none")
    for name in ("empty", "links"):
        assert cp(f"mine:{name}", ".").text.endswith(f"/{name}: 0 files")
        assert "already" in cp(f"mine:{name}", ".").text


def test_all_runs_are_looked_at_first(run: RunDir, home: Path) -> None:
    """Goal: what one run lacks stops the copy of another's files too. Red with one run after the other."""
    make_run(home, "second")
    assert "second:none is not there" in refused("mine:metrics.jsonl", "second:none", ".")


def test_many_names(run: RunDir) -> None:
    """Goal: a list that does not show all says how many more there are. Red with the count of what is shown."""
    (run.path / "many").mkdir()
    for number in range(look_at_files.ENTRIES_MAX + 7):
        (run.path / "many" / f"{number:04d}").touch()
    answer = cp("mine:many")
    assert len(answer.document) == look_at_files.ENTRIES_MAX
    assert "7 more are there" in answer.remarks[0]
    assert f"and {look_at_files.ENTRIES_MAX + 7 - 12} more" in refused("mine:many/none", ".")


def test_a_place_inside_of_what_is_copied(run: RunDir) -> None:
    """Goal: a run is not copied into itself, a file into its run's directory is. Red with the check left out."""
    assert "is in mine:. itself" in refused("mine:", str(run.path))
    assert "is in mine:logs itself" in refused("mine:logs", str(run.path / "logs/x"))
    cp("mine:logs/plain.txt", str(run.path))
    assert (run.path / "plain.txt").read_text() == "plain.txt"


def test_places_that_are_none(run: RunDir, tmp_path: Path) -> None:
    """Goal: an empty word, as of a variable that is not set, is no place; a link that leads to no directory is named
    by where it leads. Red with both taken as they are: the working directory, and the hidden directory's name."""
    assert "an empty name" in refused("mine:metrics.jsonl", "")
    Path("link").symlink_to("none/x")
    assert f"mkdir -p {Path.cwd()}/none" in refused("mine:metrics.jsonl", "link")


def test_a_full_disk(run: RunDir, tmp_path: Path) -> None:
    """Goal: the message speaks of this copy's place and of what waits, not of where results go, and the same command
    goes on. Red with the words for a pull."""
    with small_disk(tmp_path / "small", "300k") as disk:
        (run.path / "large").write_bytes(os.urandom(600_000))
        with pytest.raises(DeployError, match="this machine's disk is full") as caught:
            cp("mine:large", str(disk))
        fix = caught.value.problems[0].fix
        assert "save_dir" not in fix and "the same command goes on with it" in fix
        (run.path / "large").write_bytes(b"small")
        cp("mine:large", str(disk))
        assert os.listdir(disk) == ["large"]


def test_a_file_that_goes_away(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: what the run removed between the look and the copy is not said to be there already. Red without the look
    at what came."""
    look = copy_verb._look

    def late(*arguments: object) -> list[dict[str, object]]:
        rows = look(*arguments)  # type: ignore[arg-type]
        run.metrics.unlink()
        return rows

    monkeypatch.setattr(copy_verb, "_look", late)
    assert "went away while it was copied" in refused("mine:metrics.jsonl", ".")


def test_a_directory_that_is_gone(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: in a working directory that was removed the message says so. Red with `a file of this machine cannot be
    used.`"""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(DeployError, match="the directory that you are in is gone"):
        cp("mine:metrics.jsonl", ".")
