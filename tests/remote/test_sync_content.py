"""Content decides what code a host gets: not times, sizes or names; and an upload that was cut off goes on."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rollouts.manifest import read_tree, tree_differences, tree_digest, tree_names
from rollouts.remote.errors import DeployError, TransportError
from rollouts.remote.git import list_files
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.host.transport import Completed
from rollouts.remote.repository import read_code
from rollouts.remote.run.sync_code import CodePlace, sync_code
from tests.remote.hosts import Host, Laptop, git, wait_for, write_config
from tests.remote.test_sync_code import config

FIXED_TIME = 1_700_000_000


def make_repository(directory: Path, files: dict[str, str]) -> Path:
    directory.mkdir(parents=True)
    files = {"pyproject.toml": "[project.optional-dependencies]\ntrain=[]\n", **files}
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
        os.utime(directory / name, (FIXED_TIME, FIXED_TIME))
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "first")
    return directory


class Sender:
    """Sends a repository as runs of one host's home, as `deploy` does."""

    def __init__(self, home: Path) -> None:
        self.home, self.said = home, list[str]()

    def send(
        self,
        repository: Path,
        run_id: str,
        *,
        transport: LocalTransport | None = None,
        launch_id: str = "",
        on_said: Callable[[str], None] = lambda text: None,
    ) -> Path:
        run_path = self.home / "runs" / run_id
        record = read_code(repository, config()).record()
        sync_code(
            transport or LocalTransport(),
            CodePlace(
                home=str(self.home),
                run_path=str(run_path),
                project=repository.name,
                launch_id=launch_id,
            ),
            root=repository,
            files=tuple(list_files(repository)),
            expected=json.loads(record["code/manifest.json"])["files"],
            say=lambda _, text: (self.said.append(text), on_said(text)),
        )
        return run_path / "code" / "tree"

    def build(self, run_id: str) -> Path:
        return self.home / "runs" / run_id / "code" / ".tree-build"


@pytest.fixture
def sender(tmp_path: Path) -> Sender:
    return Sender(tmp_path / "home")


@pytest.fixture
def rsync_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script in rsync's place for a while; "$REAL" is the real one, "$dest" its last argument."""
    directory, real = tmp_path / "wrapped", shutil.which("rsync")
    directory.mkdir()

    def wrap(script: str) -> None:
        file = directory / "rsync"
        file.write_text(f'#!/bin/sh\nREAL={real}; for dest in "$@"; do :; done\n{script}\n')
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    return wrap


def test_equal_size_and_time_are_not_equal_content(sender: Sender, tmp_path: Path) -> None:
    """Goal: another working copy of the same name, with a file of equal size and second, sends its own text; so does an
    edit that keeps the time. Red with rsync's quick check (without -c): the second run got the first one's code."""
    one = make_repository(tmp_path / "a/rollouts", {"my_reward.py": "RATE = 0.1\n"})
    two = make_repository(tmp_path / "b/rollouts", {"my_reward.py": "RATE = 0.9\n"})
    first, second = sender.send(one, "a"), sender.send(two, "b")
    (two / "my_reward.py").write_text("RATE = 0.5\n")
    os.utime(two / "my_reward.py", (FIXED_TIME, FIXED_TIME))
    third = sender.send(two, "c")
    texts = [(tree / "my_reward.py").read_text() for tree in (first, second, third)]
    assert texts == ["RATE = 0.1\n", "RATE = 0.9\n", "RATE = 0.5\n"]
    inodes = {(tree / "pyproject.toml").stat().st_ino for tree in (first, second, third)}
    assert len(inodes) == 1, "what is equal is linked, not sent"


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte": lambda tree: (tree / "a.txt").write_text("two"),
    "executable": lambda tree: (tree / "a.txt").chmod(0o755),
    "an empty file more": lambda tree: (tree / "__init__.py").write_text(""),
    "a file less": lambda tree: (tree / "line\nbreak").unlink(),
    "renamed": lambda tree: (tree / "a.txt").rename(tree / "b.txt"),
    "a link elsewhere": lambda tree: (
        (tree / "link").unlink(),
        (tree / "link").symlink_to("line\nbreak"),
    ),
    "a file for a link": lambda tree: (
        (tree / "link").unlink(),
        (tree / "link").write_text("a.txt"),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_the_digest_covers(change: Callable[[Path], object], tmp_path: Path) -> None:
    """Goal: any change of content, mode, name or link is another digest; times, group rights and empty folders are not.
    Red with the mode or the links' targets left out of it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.txt").write_text("one")
    (tree / "line\nbreak").write_text("one")
    Path(os.fsdecode(os.fsencode(tree) + b"/latin-\xe9")).write_text("x")
    (tree / "link").symlink_to("a.txt")
    before = read_tree(tree, tree_names(tree))
    os.utime(tree / "a.txt", (1, 1))
    (tree / "a.txt").chmod(0o640)
    (tree / "empty").mkdir()
    assert tree_digest(read_tree(tree, tree_names(tree))) == tree_digest(before)
    change(tree)
    after = read_tree(tree, tree_names(tree))
    assert tree_digest(after) != tree_digest(before) and tree_differences(before, after)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ('printf 2 > "$dest/run.py"', "'run.py': other content"),
        ('chmod +x "$dest/run.py"', "'run.py': mode 100755; expected 100644"),
        ('rm "$dest/empty.py"', "'empty.py': missing"),
        ('rm "$dest/link"; ln -s /etc/passwd "$dest/link"', "'link': other content"),
    ],
)
def test_the_host_s_own_digest_is_compared(
    damage: str, said: str, sender: Sender, rsync_as: Callable[[str], None], tmp_path: Path
) -> None:
    """Goal: a tree that arrives as another one is not launched, whatever rsync said. Red without the host's digest."""
    repository = make_repository(tmp_path / "p", {"run.py": "1", "empty.py": ""})
    (repository / "link").symlink_to("run.py")
    rsync_as(f'"$REAL" "$@"; {damage}')
    with pytest.raises(
        DeployError, match="what lies there is not the code that was planned"
    ) as caught:
        sender.send(repository, "r")
    assert said in caught.value.text() and not (sender.home / "runs/r/code/tree").exists()


@pytest.mark.parametrize("moment", ["files, ", "checking "])
def test_two_deploys_of_one_name_that_send_at_once(
    moment: str, sender: Sender, tmp_path: Path
) -> None:
    """Goal: of two that pass the check in the same moment and send other code, the faster one's lies there whole, and
    the slower one is refused before its launch. Red with a tree that is there in the end taken for one's own: it
    launched the other's code."""
    one = make_repository(
        tmp_path / "a/p",
        {"my_reward.py": "RATE = 0.1\n", "only_a.py": "", "x.bin": "a" * 2_000_000},
    )
    two = make_repository(tmp_path / "b/p", {"my_reward.py": "RATE = 0.9\n", "only_b.py": ""})
    sent: list[Path] = []

    def the_other(text: str) -> None:
        if moment in text and not sent:
            sent.append(sender.send(two, "same", launch_id="two"))

    with pytest.raises(DeployError, match="not the code that was planned") as caught:
        sender.send(one, "same", launch_id="one", on_said=the_other)
    assert "my_reward.py" in caught.value.text()
    assert tree_names(sent[0]) == ["my_reward.py", "only_b.py", "pyproject.toml"]
    assert (sent[0] / "my_reward.py").read_text() == "RATE = 0.9\n"
    assert [path.name for path in sent[0].parent.iterdir()] == ["tree"]
    assert sender.send(two, "same", launch_id="two") == sent[0], "its own deploy goes on"


class PausedAfterCheck(LocalTransport):
    """Has the host's Python wait, once the tree was hashed and before it gets its name, for `go` to be there."""

    def __init__(self, directory: Path) -> None:
        self.checked, self.go = directory / "checked", directory / "go"
        self._python = directory / "python"
        wait = f"while [ ! -e {self.go} ]; do sleep 0.05; done"
        self._python.write_text(f'#!/bin/sh\npython3 "$@" && touch {self.checked}\n{wait}\n')
        self._python.chmod(0o755)

    def run(self, argv: Sequence[str], **options: Any) -> Completed:
        words = [str(self._python) if word == "python3" else word for word in argv]
        return super().run(words, **options)


def test_what_was_checked_is_not_written_into(
    sender: Sender, rsync_as: Callable[[str], None], tmp_path: Path
) -> None:
    """Goal: another deploy of the same name that still sends cannot change a tree between its check and its launch. Red
    with one place to build for both: the other's files lay in the tree that was launched."""
    one = make_repository(tmp_path / "a/p", {"my_reward.py": "RATE = 0.1\n"})
    two = make_repository(tmp_path / "b/p", {"my_reward.py": "RATE = 0.9\n", "only_b.py": ""})
    paused = PausedAfterCheck(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(sender.send, one, "same", launch_id="one", transport=paused)
        try:
            wait_for(lambda: paused.checked.exists() or first.done(), "the check")
            rsync_as('"$REAL" "$@"; exit 5')  # it has sent all, and goes no further
            with pytest.raises(DeployError):
                sender.send(two, "same", launch_id="two")
        finally:
            paused.go.touch()
        tree = first.result()
    assert paused.checked.exists() and tree_names(tree) == ["my_reward.py", "pyproject.toml"]
    assert (tree / "my_reward.py").read_text() == "RATE = 0.1\n"


def test_files_that_change_while_they_are_sent(
    sender: Sender, rsync_as: Callable[[str], None], tmp_path: Path
) -> None:
    """Goal: a file that is rewritten meanwhile ends the deploy by name; a log that only grows is sent as it was hashed,
    and what it shares with another run's tree stays whole. Red with the record made before and not compared."""
    repository = make_repository(tmp_path / "p", {"run.py": "1", "out.log": "one\n"})
    earlier = sender.send(repository, "earlier")
    rsync_as(f'echo more >> {repository}/out.log; "$REAL" "$@"')
    tree = sender.send(repository, "growing")
    assert (tree / "out.log").read_text() == "one\n" == (earlier / "out.log").read_text()
    rsync_as(f'printf 2 > {repository}/run.py; "$REAL" "$@"')
    with pytest.raises(DeployError, match="changed while it was being sent") as caught:
        sender.send(repository, "rewritten")
    assert "'run.py': other content" in caught.value.text()
    rsync_as(f'rm {repository}/run.py; "$REAL" "$@"')
    git(repository, "checkout", "-q", "run.py")
    with pytest.raises(DeployError, match="changed while it was being sent") as caught:
        sender.send(repository, "removed")
    assert "'run.py': missing" in caught.value.text()


def test_an_unreadable_file_is_named(sender: Sender, tmp_path: Path) -> None:
    """Goal: a file that cannot be hashed is one clear message. Red with the OSError let through."""
    repository = make_repository(tmp_path / "p", {"run.py": "1"})
    (repository / "loop").symlink_to("loop")
    os.mkfifo(repository / "pipe")  # git lists no pipes
    assert os.readlink(sender.send(repository, "r") / "loop") == "loop"
    code = read_code(repository, config())
    (repository / "run.py").unlink()
    with pytest.raises(DeployError, match=r"run.py' went away while the code was read"):
        code.record()


# ended once it has sent a part of a file of 8 MB
CUT = """exec 3<&0; "$REAL" --bwlimit=2000 "$@" <&3 & pid=$!
until [ -n "$(find "$dest" -type f -size +500k)" ] || ! kill -0 $pid; do sleep 0.05; done
kill -TERM $pid; wait $pid"""


def test_an_interrupted_upload_goes_on(
    sender: Sender, rsync_as: Callable[[str], None], tmp_path: Path
) -> None:
    """Goal: what a cut upload sent is kept, its half file too; other leftovers go, and files that are gone here
    are not in the tree. Red with a fresh directory for each try: everything was sent again."""
    repository = make_repository(tmp_path / "p", {"a.txt": "small", "later-removed.txt": "x"})
    (repository / "big.bin").write_bytes(os.urandom(8_000_000))
    (sender.home / "runs/r/code/.tree-0badf00d").mkdir(parents=True)
    rsync_as(CUT)
    with pytest.raises(DeployError):
        sender.send(repository, "r")
    build = sender.build("r")
    assert sorted(path.name for path in build.parent.iterdir()) == [".tree-build"]
    half = (build / "big.bin").stat().st_size
    sent = (build / "a.txt").stat().st_ino
    assert 0 < half < 8_000_000
    (repository / "later-removed.txt").unlink()
    rsync_as('"$REAL" --stats --no-whole-file "$@" > "$0.out"; code=$?; cat "$0.out"; exit $code')
    tree = sender.send(repository, "r")
    assert tree_names(tree) == ["a.txt", "big.bin", "pyproject.toml"] and not build.exists()
    assert (tree / "a.txt").stat().st_ino == sent, "the file that had arrived was not sent again"
    stats = (tmp_path / "wrapped/rsync.out").read_text()
    (matched,) = (line for line in stats.splitlines() if line.startswith("Matched data:"))
    assert int("".join(filter(str.isdigit, matched))) > half / 2, "the half file was gone on with"
    assert any("going on with what an earlier try sent" in text for text in sender.said)
    assert any("MB sent" in text and "/s" in text for text in sender.said)


def test_another_run_s_leftover_is_taken_over_untouched(sender: Sender, tmp_path: Path) -> None:
    """Goal: `deploy CONFIG` again after a cut upload takes what that one sent, and changes nothing of it, nor of a live
    run's tree. Red with leftovers of other runs passed over, and with modes set on files that two trees share."""
    repository = make_repository(tmp_path / "p", {"data.txt": "rows"})
    other = sender.build("cut")
    other.mkdir(parents=True)
    shutil.copy2(repository / "data.txt", other / "data.txt")
    tree = sender.send(repository, "r1")
    assert (tree / "data.txt").stat().st_ino == (other / "data.txt").stat().st_ino
    build = sender.build("r2")
    build.mkdir() if build.parent.exists() else build.mkdir(parents=True)
    os.link(tree / "data.txt", build / "data.txt")
    (repository / "data.txt").chmod(0o755)
    second = sender.send(repository, "r2")
    assert (second / "data.txt").stat().st_mode & stat.S_IXUSR
    assert not (tree / "data.txt").stat().st_mode & stat.S_IXUSR


class Silent(LocalTransport):
    """A host that takes the connection and says nothing more."""

    def rsync_options(self) -> list[str]:
        return ["-e", "sh -c 'exec sleep 600' --"]

    def rsync_path(self, path: str) -> str:
        return f"host:{path}"


def test_an_idle_transfer_ends(tmp_path: Path) -> None:
    """Goal: the time-out is for silence, not for the whole transfer. Red without rsync's --timeout: it never ended."""
    repository = make_repository(tmp_path / "p", {"a.txt": "x"})
    with pytest.raises(TransportError) as caught:
        sync_code(
            Silent(),
            CodePlace(
                home=str(tmp_path / "home"), run_path=str(tmp_path / "home/runs/r"), project="p"
            ),
            root=repository,
            files=("a.txt",),
            timeout_s=1,
        )
    assert caught.value.lost


def test_a_whole_deploy_records_what_lies_on_the_host(
    laptop: Laptop, make_host: Callable[..., Host]
) -> None:
    """Goal: over sshd, the mirror's and the host's record hold the digest of the tree that ran, the progress is shown,
    and a run that was planned with other code is not sent. Red with the record made anew at each try."""
    host = make_host()
    (laptop.project / "odd\nname.py").write_text("x = 1\n")
    done = laptop.deploy(
        str(write_config(laptop.project)), "--remote", host.target, "--run-id", "one"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = host.run_path("one")
    recorded = json.loads((run / "code/manifest.json").read_text())
    names = [name for name in tree_names(run / "code/tree") if "__pycache__" not in name]
    assert tree_digest(read_tree(run / "code/tree", names)) == recorded["digest"]
    assert recorded["files"]["odd\nname.py"]["mode"] == "100644"
    assert "sync: " in done.stdout and " MB, to " in done.stdout
