"""`deploy cp`: files of a run to a place here, whole or not at all, and never over what is another's."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollouts.remote import copy_verb
from rollouts.remote.errors import DeployError
from rollouts.remote.run import registry
from rollouts.run_dir import RunDir
from rollouts.view.screen import Screen
from tests.ports import free_port
from tests.remote.hosts import Host, Laptop, wait_for
from tests.remote.link import Link, link
from tests.remote.test_pull_resumes import kill_at_once, rsyncs_of
from tests.remote.test_remove import fill, home, make_run

assert home  # a fixture
SIZE = 40_000_000  # ssh loses up to 2 MB that are under way at each of three cuts: below the fifth that is allowed
ODD = "a b [1]*?'\"$x\\ é.txt"
CHECKPOINT = "checkpoints/rl/step_000000"


def cp(*words: str, force: bool = False) -> Any:
    return copy_verb.copy(words, Screen(as_json=False), remote=None, force=force)


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of this machine, `mine`; the working directory is empty."""
    _, made = make_run(home, "mine")
    (made.path / "logs").mkdir()
    for name in (ODD, "plain.txt", "a b 1x.txt"):
        (made.path / "logs" / name).write_text(name)
    (made.checkpoints / "rl/latest").symlink_to("step_000000")
    (made.path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_files_and_folders(run: RunDir, tmp_path: Path) -> None:
    """Goal: a file, one with an odd name alone, a folder, what a link leads to, the whole run; into a directory, or to
    a name; links within are left out, and told. Red with wildcards expanded, and with links copied as links."""
    here = Path.cwd()
    answer = cp(f"mine:logs/{ODD}", "mine:metrics.jsonl", "mine:checkpoints/rl/latest", ".")
    assert contents(here) == {
        ODD: ODD.encode(),
        "metrics.jsonl": run.metrics.read_bytes(),
        **{f"latest/{name}": data for name, data in contents(run.path / CHECKPOINT).items()},
    }
    assert [row["files"] for row in answer.document] == [1, 1, 2] and answer.remarks == ()
    cp("mine:metrics.jsonl", "other.jsonl")
    assert Path("other.jsonl").read_bytes() == run.metrics.read_bytes()
    whole = cp("mine:", str(tmp_path / "whole"))
    assert (
        contents(tmp_path / "whole") == contents(run.path) and (tmp_path / "whole/empty").is_dir()
    )
    assert "latest" in whole.remarks[0] and "left out" in whole.remarks[0]
    assert [path.name for path in here.iterdir() if path.name[0] == "."] == []


def test_a_list(run: RunDir) -> None:
    """Goal: without a place here it lists what is there, and copies nothing. Red with DEST taken for `.`"""
    assert [row["name"] for row in cp("mine:").document] == [
        *("checkpoints/", "code/", "empty/", "launch.json", "logs/", "metrics.jsonl"),
        *("status.json", "supervisor.lock"),
    ][: 7 + run.lock.exists()]
    assert cp("mine:logs").text.splitlines()[-1].split() == ["plain.txt", "9", "bytes"]
    assert cp("mine:empty").text == "nothing is there" and contents(Path.cwd()) == {}


def test_what_is_there_already(run: RunDir) -> None:
    """Goal: a file that differs stays, also in a folder, and all of them are named; --force writes over it; the same
    one is left alone, and one that the run went on with is brought up to date. Red with each of the three left out."""
    cp("mine:metrics.jsonl", "mine:logs", ".")
    assert "is as mine:metrics.jsonl already" in cp("mine:metrics.jsonl", ".").text
    with run.metrics.open("a") as stream:
        stream.write('{"stage": "rl", "step": 3}\n')
    assert cp("mine:metrics.jsonl", ".").document[0]["files"] == 1
    assert Path("metrics.jsonl").read_bytes() == run.metrics.read_bytes()
    Path("metrics.jsonl").write_text("mine\n")
    Path("logs/plain.txt").write_text("other txt")
    (run.path / "logs/new").write_text("new")
    os.utime("logs/plain.txt", (1, 1))
    before = contents(Path.cwd())
    for words, name in (
        (("mine:metrics.jsonl",), "metrics.jsonl"),
        (("mine:logs",), "logs/plain.txt"),
    ):
        with pytest.raises(DeployError, match="already") as caught:
            cp(*words, ".")
        assert str(Path.cwd() / name) in caught.value.problems[0].found
        assert "--force" in caught.value.problems[0].fix
    assert contents(Path.cwd()) == before
    cp("mine:metrics.jsonl", "mine:logs", ".", force=True)
    assert contents(Path("logs")) == contents(run.path / "logs")
    assert Path("metrics.jsonl").read_bytes() == run.metrics.read_bytes()


def test_what_is_in_the_way(run: RunDir, tmp_path: Path) -> None:
    """Goal: a file is never put in a folder's place, a folder never in a file's, and nothing goes through a link that
    leads out. Red with the link followed: a file of another directory is written."""
    (tmp_path / "elsewhere").mkdir()
    Path("logs").mkdir()
    Path("logs/plain.txt").mkdir()
    Path("rl").mkdir()
    Path("rl/step_000000").symlink_to(tmp_path / "elsewhere")
    Path("code").write_text("a file")
    for source in ("logs", "checkpoints/rl", "code"):
        for force in (False, True):
            with pytest.raises(DeployError, match="in its way"):
                cp(f"mine:{source}", ".", force=force)
    assert contents(tmp_path / "elsewhere") == {} and Path("code").read_text() == "a file"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mine:none", "."], "mine:none is not there."),
        (["mine:logs/none/x", "mine:nix", "."], "in logs: a b"),
        (["mine:../mine/metrics.jsonl", "."], "leads out of the run's directory"),
        (["mine:/etc/passwd", "."], "leads out of the run's directory"),
        (["metrics.jsonl", "."], "does not say of which run"),
        (["metrics.jsonl", "mine:metrics.jsonl"], "from runs to this machine alone"),
        (["mine:metrics.jsonl", "mine:logs", "none"], "none is not a directory"),
        (["mine:metrics.jsonl", "none/"], "none/ is not a directory"),
        (["mine:metrics.jsonl", "none/x"], "mkdir -p none"),
        (["mine:logs/plain.txt", "mine:plain.txt", "."], "would both be"),
        (["mine:logs/plain.txt", "mine:none", "."], "mine:none is not there."),
        (["other:x", "."], "there is no run 'other'"),
        (["mine@two:x", "."], "mine has no host 'two'"),
    ],
)
def test_words_that_mean_nothing(words: list[str], said: str, run: RunDir) -> None:
    """Goal: one message names the word and what there is; nothing is copied, not even of the sources that are right.
    Red with those copied that are there."""
    with pytest.raises(DeployError) as caught:
        cp(*words)
    assert said in caught.value.text(launching=False) and caught.value.exit_code == 2
    assert list(Path.cwd().iterdir()) == []


def test_the_host_stands_in_what_to_type_next(run: RunDir) -> None:
    """Goal: a command that a message has one type says the host that this one was told. Red without --remote."""
    words = ["mine@one:../x"], ["mine:none", "."]
    for word, said in zip(
        words, ("mine@one: --remote local lists", "mine: --remote local lists"), strict=True
    ):
        with pytest.raises(DeployError) as caught:
            copy_verb.copy(word, Screen(as_json=False), remote="local", force=False)
        assert f"deploy cp {said}" in caught.value.problems[0].fix


def test_a_host_that_is_gone(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: what was pulled of a run is copied where its host does not answer, where the run is gone from it, and where
    that file is; each time it is told. What was not pulled is not there, for both reasons. Red without the mirror."""
    entry, run = make_run(home, "mine")
    (entry.mirror.path / "eval.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    answer = cp("mine:eval.jsonl", ".")
    assert "eval.jsonl is not on local any more: from what was pulled" in answer.remarks[0]
    run.path.rename(tmp_path / "away")
    assert (
        "its directory is gone from local: from what was" in cp("mine:eval.jsonl", "two").remarks[0]
    )
    registry.save(registry.RunEntry(**{**vars(entry), "target": f"127.0.0.1:{free_port()}"}))
    answer = cp("mine:eval.jsonl", "three")
    assert "127.0.0.1" in answer.remarks[0] and answer.document[0]["from"] == entry.local_dir
    assert {Path(name).read_text() for name in ("eval.jsonl", "two", "three")} == {"{}\n"}
    with pytest.raises(DeployError, match="mine:weights is not there") as caught:
        cp("mine:weights", ".")
    assert "127.0.0.1" in caught.value.problems[0].found
    assert "in the run's directory: " in caught.value.problems[0].found


@pytest.fixture
def there(laptop: Laptop, make_host: Callable[..., Host]) -> Host:
    """A host with the run `big`, and a checkpoint of 40 MB."""
    host = make_host()
    run = fill(RunDir(host.run_path("big")))
    (run.path / CHECKPOINT / "model.safetensors").write_bytes(random.Random(1).randbytes(SIZE))
    return host


def copying(laptop: Laptop, way: Link, target: str, down_bytes: int) -> "subprocess.Popen[str]":
    """Return a copy that is under way; the link went down after so many bytes."""
    way.held_at = down_bytes
    process = laptop.start(
        "cp", f"big:{CHECKPOINT}", str(laptop.home / "model"), "--remote", target
    )
    wait_for(lambda: way.is_down or process.poll() is not None, "some bytes")
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.parametrize("fault", ["link", "rsync", "deploy", "SIGTERM", "Ctrl-C"])
def test_a_copy_goes_on_where_it_was(fault: str, laptop: Laptop, there: Host) -> None:
    """Goal: the link cut at random places, kill -9 of rsync, of deploy, SIGTERM, Ctrl-C: nothing has the final name
    before it is whole, the same command goes on, each byte comes about once, and nothing is left over. Red with rsync
    writing to the final name; and without --inplace: what a killed rsync leaves comes along, under its own name."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    final = laptop.home / "model"
    with link(there.port) as way:
        target = laptop.know_by(there, way.port)
        if fault == "link":
            way.cut_at = sorted(rng.randrange(SIZE // 20, SIZE) for _ in range(3))
        else:
            process = copying(laptop, way, target, rng.randrange(SIZE // 4, SIZE // 2))
            assert not final.exists()
            left = rsyncs_of(process.pid)
            if fault == "rsync":
                kill_at_once(left)
            elif fault == "deploy":
                process.kill()
            elif fault in ("Ctrl-C", "SIGTERM"):
                process.send_signal(signal.SIGINT if fault == "Ctrl-C" else signal.SIGTERM)
            way.set_down(fault != "rsync")
            _, err = process.communicate(timeout=200)
            assert fault != "Ctrl-C" or (process.returncode == 130 and "goes on with it" in err)
            assert fault != "SIGTERM" or process.returncode == 143
            if fault == "deploy":  # it goes on by itself, and holds the lock
                kill_at_once(left)
            wait_for(lambda: not any(Path(f"/proc/{p}/fd").exists() for p in left), "rsync's end")
            assert final.exists() == (fault == "rsync"), "deploy starts another one by itself"
            way.set_down(False)
        if fault != "rsync":
            done = laptop.deploy("cp", f"big:{CHECKPOINT}", str(final), "--remote", target)
            assert done.returncode == 0, done.stderr
        assert contents(final) == contents(there.run_path("big") / CHECKPOINT)
        assert way.down_bytes <= 1.2 * SIZE, f"{way.down_bytes / SIZE:.2f} x"
    assert [path.name for path in laptop.home.iterdir() if "deploy-cp" in path.name] == []


def test_two_at_once(laptop: Laptop, there: Host) -> None:
    """Goal: a second copy to the same place is refused while the first runs. Red without the lock."""
    with link(there.port) as way:
        target = laptop.know_by(there, way.port)
        first = copying(laptop, way, target, SIZE // 10)
        with link(there.port) as other:
            second = laptop.deploy(
                *("cp", f"big:{CHECKPOINT}", str(laptop.home / "model")),
                *("--remote", laptop.know_by(there, other.port)),
            )
        assert second.returncode == 2 and "another `deploy cp` is copying" in second.stderr
        way.set_down(False)
        first.communicate(timeout=200)
        assert first.returncode == 0
