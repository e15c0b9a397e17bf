"""Older tools on this machine: rsync as macOS has it, file systems without hard links."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollouts.remote.errors import DeployError
from rollouts.remote.host import rsync_version
from rollouts.remote.host.local import LocalTransport
from rollouts.remote.host.rsync import run_rsync
from rollouts.remote.host.ssh import SSHTransport
from rollouts.remote.run import mirror_files, registry
from rollouts.remote.run.mirror import pull_files
from rollouts.run_dir import RunDir
from tests.remote.hosts import WAIT_S, Host, Laptop
from tests.remote.test_gone_runs import register
from tests.remote.test_ssh import transport_to
from tests.remote.test_sync_content import Sender, make_repository

# How they call themselves, and what they refuse as unknown
APPLE = ("rsync  version 2.6.9  protocol version 29", "unknown option")
OPENRSYNC = (
    "openrsync: protocol version 29\nrsync version 2.6.9 compatible",
    "unrecognized option",
)
OLD = ("rsync  version 3.0.9  protocol version 30", "unknown option")
REFUSED = {
    APPLE: "-s|--info=*|--protect-args",
    OPENRSYNC: "-s|--info=*|--protect-args",
    OLD: "--info=*",
}


@pytest.fixture
def old_rsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, str]], Path]:
    """Put a stand-in in rsync's place: it knows as much as that version, and its host's shell reads the paths.

    Returns the file that counts how often it was asked for its version.
    """
    tools, real, asked = tmp_path / "tools", shutil.which("rsync"), tmp_path / "asked"
    tools.mkdir()

    def make(kind: tuple[str, str]) -> Path:
        version, words = kind
        (tools / "rsync").write_text(
            f"""#!/bin/sh
[ "$1" = --version ] && {{ echo x >> {asked}; printf '{version}\n'; exit 0; }}
for word in "$@"; do
  case $word in {REFUSED[kind]}) echo "rsync: $word: {words}" >&2; exit 1 ;; esac
done
exec {real} {"" if kind is OLD else "--old-args"} "$@"
"""
        )
        (tools / "rsync").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        return asked

    rsync_version.rsync_version.cache_clear()
    return make


kinds = pytest.mark.parametrize(
    "kind", [APPLE, OPENRSYNC, OLD], ids=["Apple's", "openrsync", "3.0"]
)


@kinds
def test_code_goes_and_results_come_with_an_old_rsync(
    kind: tuple[str, str], old_rsync: Callable[[tuple[str, str]], Path], tmp_path: Path
) -> None:
    """Goal: an rsync before 3.1 is given no option that it does not know, and is asked for its version once. Red with
    --info=progress2 for each: "unknown option", and nothing could be sent."""
    asked, sender = old_rsync(kind), Sender(tmp_path / "home")
    tree = sender.send(make_repository(tmp_path / "p", {"a b.txt": "x"}), "r")
    assert (tree / "a b.txt").read_text() == "x" and "sent, but for what was there" in sender.said
    run = RunDir(tree.parent.parent)
    run.metrics.write_text("{}\n")
    assert pull_files(LocalTransport(), str(run.path), RunDir(tmp_path / "mirror")) == []
    assert (tmp_path / "mirror/metrics.jsonl").read_text() == "{}\n"
    assert asked.read_text() == "x\n"


@pytest.fixture
def ssh(
    make_host: Callable[..., Host], laptop: Laptop, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SSHTransport]:
    with transport_to(make_host(), laptop, monkeypatch) as transport:
        yield transport


@kinds
def test_paths_on_the_host_with_an_old_rsync(
    kind: tuple[str, str],
    old_rsync: Callable[[tuple[str, str]], Path],
    ssh: SSHTransport,
    tmp_path: Path,
) -> None:
    """Goal: a path with spaces and quotes arrives as it is where the host's shell reads it. Red without the quotes."""
    old_rsync(kind)
    there = tmp_path / "it's a $HOME (`id`) * home"
    there.mkdir()
    (tmp_path / "file").write_text("x")
    done = run_rsync(
        ssh, ["-t", str(tmp_path / "file"), ssh.rsync_path(f"{there}/")], timeout_s=WAIT_S
    )
    assert done.returncode == 0, done.err
    back = [ssh.rsync_path(f"{there}/file"), str(tmp_path / "back")]
    assert run_rsync(ssh, ["-t", *back], timeout_s=WAIT_S).returncode == 0
    assert [path.name for path in there.iterdir()] == ["file"] and (
        tmp_path / "back"
    ).read_text() == "x"


def test_an_option_that_an_rsync_does_not_know(
    old_rsync: Callable[[tuple[str, str]], Path], tmp_path: Path
) -> None:
    """Goal: an rsync that cannot do what is needed is told as such, with the fix. Red with "could not be sent"."""
    old_rsync(OLD)
    with pytest.raises(DeployError, match="is too old") as caught:
        run_rsync(LocalTransport(), ["--info=progress2", str(tmp_path), "x"], timeout_s=WAIT_S)
    assert (
        "--info=progress2: unknown option" in caught.value.text()
        and "brew install rsync" in caught.value.text()
    )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("rsync  version 3.2.7  protocol version 31\n", (3, 2)),
        ("rsync  version v3.2.3  protocol version 31\n", (3, 2)),
        ("rsync  version 3.4.0dev  protocol version 32\n", (3, 4)),
        ("warning: odd locale\nrsync  version 2.6.9  protocol version 29\n", (2, 6)),
        ("openrsync: protocol version 29\nrsync version 2.6.9 compatible\n", (2, 6)),
        ("", (3, 1)),
        ("something else 1.0\n", (3, 1)),
    ],
)
def test_versions(text: str, version: tuple[int, int]) -> None:
    """Goal: each way to write it is read; one that does not tell counts as one of today. Red with the first line."""
    assert rsync_version.parse_version(text) == version


# --- hard links -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_a_registry_without_hard_links(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: where os.link is refused, as on exFAT, a run is registered whole, and a second of its name is refused. Red
    with the link alone: "a file of this machine cannot be used"."""

    def refuse(source: Any, target: Any) -> None:
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "File exists", source, None, target)
        raise OSError(code, os.strerror(code), source, None, target)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setenv("ROLLOUTS_HOME", str(tmp_path / "home"))
    first = register(tmp_path / "home", tmp_path / "results", "r")
    assert registry.find("r") == first and registry._file("r").stat().st_mode & 0o777 == 0o600
    with pytest.raises(DeployError, match="in use here"):
        register(tmp_path / "home", tmp_path / "results", "r")
    assert registry.find("r") == first
    assert [
        file.name for file in (tmp_path / "home/registry").iterdir() if file.name.endswith(".tmp")
    ] == []


def test_two_registrations_at_once_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goal: between the refused link and the entry's name another deploy may take it, and then has it. Red with
    os.replace alone: the second overwrote the first."""

    def other_is_faster(source: Any, target: Any) -> None:
        Path(target).write_text("the other's")
        raise OSError(errno.EPERM, "no links", source, None, target)

    monkeypatch.setattr(os, "link", other_is_faster)
    with pytest.raises(FileExistsError):
        mirror_files.write_new(tmp_path / "r.json", "ours")
    assert (tmp_path / "r.json").read_text() == "the other's" and len(list(tmp_path.iterdir())) == 1
